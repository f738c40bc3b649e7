"""Noise schedules: alphas_cumprod (the papers' alpha-bar), from a few numbers or kept as a list."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bidm_cli.errors import BidmError
from bidm_cli.transfer import to_device


@dataclass(frozen=True)
class NoiseSchedule:
    """alphas_cumprod, float64 [T] on the CPU, and the recipe it came from (``description``, JSON)."""

    alphas_cumprod: Tensor
    description: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def linear(cls, timesteps: int, start: float, end: float) -> NoiseSchedule:
        """betas = linspace(start, end) (DDPM; LDM calls it "sqrt_linear")."""
        description = {"kind": "linear", "timesteps": timesteps, "start": start, "end": end}
        return cls._from_betas(_linear_betas(description, torch.float64), description)

    @classmethod
    def scaled_linear(cls, timesteps: int, start: float, end: float) -> NoiseSchedule:
        """betas = linspace(sqrt(start), sqrt(end))^2 (what LDM calls "linear", diffusers "scaled_linear")."""
        description = {"kind": "scaled_linear", "timesteps": timesteps, "start": start, "end": end}
        return cls._from_betas(_linear_betas(description, torch.float64), description)

    @classmethod
    def cosine(cls, timesteps: int, offset: float = 0.008, limit: float = 0.999) -> NoiseSchedule:
        """alpha-bar(u) = cos^2((u + offset)/(1 + offset) pi/2), beta <= limit (arXiv 2102.09672, eq. 17)."""

        def alpha_bar(u: float) -> float:
            return math.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2

        betas = [
            min(1 - alpha_bar((i + 1) / timesteps) / alpha_bar(i / timesteps), limit)
            for i in range(timesteps)
        ]
        description = {"kind": "cosine", "timesteps": timesteps, "offset": offset, "limit": limit}
        return cls._from_betas(torch.tensor(betas, dtype=torch.float64), description)

    @classmethod
    def sigmoid(
        cls, timesteps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0, limit: float = 0.999
    ) -> NoiseSchedule:
        """alpha-bar(u) from a sigmoid's flank, beta <= limit (Jabri 2022, arXiv 2212.11972, alg. 1)."""
        # Both ends in float32: the code that uses it (lucidrains) does, and near T, where alpha-bar is their
        # difference, it shows.
        first, last = (float(torch.tensor(edge / tau).sigmoid()) for edge in (start, end))
        u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        alpha_bar = (last - ((u * (end - start) + start) / tau).sigmoid()) / (last - first)
        alpha_bar = alpha_bar / alpha_bar[0]
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(0, limit)
        numbers = {"start": start, "end": end, "tau": tau, "limit": limit}
        return cls._from_betas(betas, {"kind": "sigmoid", "timesteps": timesteps, **numbers})

    @classmethod
    def explicit(cls, alphas_cumprod: Tensor) -> NoiseSchedule:
        """Exactly these alphas_cumprod [T], as read from a file."""
        values = alphas_cumprod.detach().cpu().double()
        return cls(values, {"kind": "explicit", "alphas_cumprod": values.tolist()})

    @classmethod
    def _from_betas(cls, betas: Tensor, description: dict[str, Any]) -> NoiseSchedule:
        return cls(torch.cumprod(1.0 - betas, dim=0), description)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> NoiseSchedule:
        """Rebuild what :attr:`description` says; the values are bit-equal on every machine that rounds alike.

        Raises:
            BidmError: an unknown kind or missing numbers.
        """
        arguments = dict(description)
        kind = arguments.pop("kind", None)
        try:
            if kind == "explicit":
                return cls.explicit(torch.tensor(arguments["alphas_cumprod"], dtype=torch.float64))
            if kind in ("linear", "scaled_linear", "cosine", "sigmoid"):
                return getattr(cls, kind)(**arguments)
        except (TypeError, KeyError, ValueError, RuntimeError) as error:
            raise BidmError(f"the noise schedule {description!r} cannot be built: {error}") from error
        raise BidmError(
            f"unknown noise schedule kind {kind!r}; use linear, scaled_linear, cosine, sigmoid or explicit"
        )

    @property
    def timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 - alpha-bar_t / alpha-bar_{t-1}, float64 [T]."""
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        return 1.0 - self.alphas_cumprod / previous

    def single_precision(self) -> Tensor:
        """alphas_cumprod as code that works in float32 throughout gets them, float32 [T].

        Where there is little noise 1 - alpha-bar is what is left of two numbers near 1, and differs from the
        exact one in the fourth digit.
        """
        if self.description.get("kind") in ("linear", "scaled_linear"):
            betas = _linear_betas(self.description, torch.float32)
        else:
            betas = self.betas.float()
            if torch.equal(self.alphas_cumprod.float().double(), self.alphas_cumprod):
                return self.alphas_cumprod.float()  # made in float32
        return torch.cumprod(1.0 - betas, dim=0)

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha-bar at integer timesteps t [N], shaped [N, 1, 1, 1], in the dtype and device of ``like``."""
        values = self.alphas_cumprod[t.long().cpu()]
        return to_device(values, like.device, like.dtype).reshape(-1, *[1] * (like.dim() - 1))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alpha-bar_t) x0 + sqrt(1 - alpha-bar_t) noise (DDPM, eq. 4)."""
        ab = self.at(t, x0)
        return ab.sqrt() * x0 + (1 - ab).sqrt() * noise


def _linear_betas(description: dict[str, Any], dtype: torch.dtype) -> Tensor:
    power = 1.0 if description["kind"] == "linear" else 0.5
    start, end = (float(description[name]) ** power for name in ("start", "end"))
    return torch.linspace(start, end, description["timesteps"], dtype=dtype) ** (1 / power)

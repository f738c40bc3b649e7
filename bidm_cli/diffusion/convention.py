"""Sampling convention of a family: what has to match for a checkpoint to give its original images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Rounding = Literal["nearest", "truncate"]
Spacing = Literal["ldm", "ddim", "openai_ddim", "openai", "lucidrains", "leading", "linspace", "trailing"]

_DIFFUSERS = ("leading", "linspace", "trailing")
_TRUNCATING = ("ldm", "openai")
_FOLLOW_SPACING = ("float32_coefficients", "stride_end", "noise_at_end")
LATER = ("clip_range", "threshold_quantile", "threshold_max", *_FOLLOW_SPACING, "rounding")
"""Settings that the first two versions of the packed file's format did not have."""


@dataclass(frozen=True)
class SamplingConvention:
    """A family's own habits, as plain JSON (:meth:`to_json`).

    Attributes:
        spacing: which timesteps S steps visit. ``ldm``: range(0, T, T//S) + 1; ``ddim``: range(0, T, T//S);
            ``openai_ddim``: the integer stride that gives exactly S; ``openai``: fractional stride with both
            ends; ``lucidrains``: linspace(-1, T - 1, S + 1)[1:] rounded down;
            ``leading``: arange(S)*(T//S) + steps_offset; ``linspace``, ``trailing`` (diffusers).
        final_alpha: alpha-bar of the step after the last: 1 ("one") or alpha-bar_0 ("first").
        clip: what DDIM does with x0: ``none``; ``keep_eps``: clip x0 to [-1, 1], keep the predicted noise
            (diffusers); ``rederive``: clip, then recompute the noise from the clipped x0 (OpenAI).
        clip_ancestral: the same for ancestral DDPM sampling.
        variance: of ancestral sampling. ``small`` (posterior), ``large`` (beta), ``ddim_noisy``
            (log(1 - ab_t/ab_prev), ermongroup's), ``learned_range`` (between the first two, as the network's
            second half says), ``learned`` (the network's second half).
        steps_offset: for ``leading``.
        guided_channels: channels classifier-free guidance applies to; None for all.
        clip_range: x0 is clipped to [-clip_range, clip_range], where it is clipped.
        threshold_quantile: clip by dynamic thresholding instead (Saharia et al. 2022, arXiv 2205.11487): to
            this quantile of each image's absolute values, from 1 up to threshold_max, and divide by it.
        float32_coefficients: schedule and coefficients of a step are computed in float32, as diffusers does;
            in float64 otherwise.
        stride_end: a DDIM step from t ends at t - T//S, which need not be the next timestep visited.
        noise_at_end: the last ancestral step adds noise, too, unless it comes from t = 0.
        rounding: of images in [-1, 1] to bytes: LDM's and OpenAI's scripts truncate, all others round to the
            nearest.

    float32_coefficients, stride_end and noise_at_end follow ``spacing`` where they are None: True for the
    spacings of diffusers' schedulers, all of which do so, else False.
    """

    spacing: Spacing = "ddim"
    final_alpha: Literal["one", "first"] = "one"
    clip: Literal["none", "keep_eps", "rederive"] = "none"
    clip_ancestral: bool = False
    variance: Literal["small", "large", "ddim_noisy", "learned_range", "learned"] = "small"
    steps_offset: int = 0
    guided_channels: int | None = None
    clip_range: float = 1.0
    threshold_quantile: float | None = None
    threshold_max: float = 1.0
    float32_coefficients: bool = None  # type: ignore[assignment]
    stride_end: bool = None  # type: ignore[assignment]
    noise_at_end: bool = None  # type: ignore[assignment]
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        for name in _FOLLOW_SPACING:
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.spacing in _DIFFUSERS)

    def with_spacing(self, spacing: Spacing) -> SamplingConvention:
        """The convention with another spacing and what follows from it."""
        return replace(self, spacing=spacing, **dict.fromkeys(_FOLLOW_SPACING))  # type: ignore[arg-type]

    def to_json(self, family: str) -> dict[str, Any]:
        """As a packed file has it: without the settings of :data:`LATER` that :meth:`from_json` derives."""
        usual = SamplingConvention.from_json({"spacing": self.spacing}, family)
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in LATER or value != getattr(usual, name)
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], family: str) -> SamplingConvention:
        """The reverse of :meth:`to_json`; settings left out follow the spacing and the family."""
        return cls(**{"rounding": "truncate" if family in _TRUNCATING else "nearest", **values})

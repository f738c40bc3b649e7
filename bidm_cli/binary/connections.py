"""Cross-timestep connections of TBS, the Timestep-friendly Binary Structure.

    CrossTimestepConnections(["output_blocks.7"], timesteps=1000).attach(unet)
    carried = {}
    for x, t in steps:                              # the first step fills carried, the others blend it in
        with unet.connections.carrying(t, carried):
            unet(x, t)

Neighbouring steps of a sampler see nearly the same features, and a binary block's error is far from the same:
blending in the step before averages it out (BiDM, arXiv 2412.05926, sec. 3.2).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.errors import BidmError


class CrossTimestepConnections(nn.Module):
    """h_t = (1 - beta) block(x_t) + beta h_prev, with h_prev the block's output one sampler step before.

    Args:
        block_names: submodules whose output is blended, in order.
        timesteps: T of the schedule.
        buckets: rows of the table; a timestep t uses row floor(t / (T / buckets)).
        initial: where every beta starts.

    Attributes:
        beta: [buckets, blocks], learnable. No gradient flows into h_prev.
    """

    def __init__(
        self, block_names: Sequence[str], timesteps: int, buckets: int = 100, initial: float = 0.3
    ) -> None:
        super().__init__()
        self.block_names, self.timesteps, self.buckets = list(block_names), timesteps, buckets
        self.beta = nn.Parameter(torch.full((buckets, len(self.block_names)), float(initial)))
        self._active: tuple[Tensor, dict[str, Tensor]] | None = None

    def attach(self, network: nn.Module) -> None:
        """Hook the named blocks of ``network`` and register this module as ``network.connections``.

        Raises:
            BidmError: the network has no submodule of a given name.
        """
        modules = dict(network.named_modules())
        for index, name in enumerate(self.block_names):
            if name not in modules:
                raise BidmError(f"tbs.connect: the network has no block {name!r}")
            # A partial, unlike a closure, lets a deep copy of the network refer to the copied betas.
            modules[name].register_forward_hook(functools.partial(self._blend, index))
        network.connections = self

    @contextlib.contextmanager
    def carrying(self, t: Tensor, carried: dict[str, Tensor], fresh: Tensor | None = None) -> Iterator[None]:
        """While open, blocks blend in ``carried`` (empty at the first step) and renew it in place.

        t is [N]; ``fresh`` [N] (bool) marks rows that have no step before and stay plain.
        """
        rows = (t.long() * self.buckets // self.timesteps).clamp(0, self.buckets - 1)
        betas = self.beta[rows.to(self.beta.device)]
        self._active = (betas if fresh is None else betas.masked_fill(fresh[:, None], 0.0), carried)
        try:
            yield
        finally:
            self._active = None

    def _blend(self, index: int, block: nn.Module, inputs: Any, feature: Tensor) -> Tensor:
        """Blend the step before into a block's output and renew ``carried``; plain unless carrying."""
        if self._active is None:
            return feature
        betas, carried = self._active
        name = self.block_names[index]
        previous = carried.get(name)
        if previous is not None:
            feature = self.interpolate(feature, previous, betas[:, index])
        carried[name] = feature.detach() if feature.requires_grad else feature
        return feature

    def interpolate(self, new: Tensor, old: Tensor, betas: Tensor) -> Tensor:
        """(1 - beta) new + beta old for features [N, ...] of the same shape and betas [N]."""
        beta = betas.to(new.dtype).reshape(-1, *[1] * (new.dim() - 1))
        return (1 - beta) * new + beta * old

    @torch.no_grad()
    def project(self, limit: float) -> None:
        """Put every beta back into [0, limit], as an optimizer does after each of its steps.

        Training sees one carried step, sampling a chain of them: a beta near 1 would carry features along for
        1 / (1 - beta) steps. Unbounded betas were seen to pass 1 and training to diverge.
        """
        self.beta.clamp_(0.0, limit)

    def to_json(self) -> dict[str, Any]:
        """Arguments that rebuild the module (beta comes from the weights)."""
        return {"blocks": self.block_names, "buckets": self.buckets, "timesteps": self.timesteps}

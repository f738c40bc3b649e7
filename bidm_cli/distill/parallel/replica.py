"""Student network as one of several replicas, whose gradients are averaged while they are computed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bidm_cli.distill.objective import Losses, TeacherTargets
from bidm_cli.parallel.processes import Processes


class _Step(nn.Module):
    """The student's half of a step as a module that DistributedDataParallel can wrap; ``network`` stays bare.

    A step runs the network twice where it has connections, under hooks that look for it by its own name.
    """

    def __init__(self, network: nn.Module, losses: Callable[[TeacherTargets], Losses]) -> None:
        super().__init__()
        self.network, self._losses = network, losses

    def forward(self, targets: TeacherTargets) -> Losses:
        return self._losses(targets)


class Replica:
    """Losses of the student on this process's rows; gradients are the mean over processes.

    All processes start from the first one's weights. Nothing in a network depends on the other rows of its
    batch (there is no batch norm), so there is nothing else to exchange.
    """

    def __init__(
        self, network: nn.Module, losses: Callable[[TeacherTargets], Losses], processes: Processes
    ) -> None:
        self.losses: Callable[[TeacherTargets], Losses] = losses
        self._wrapped: DistributedDataParallel | None = None
        if processes.size > 1:
            # Betas have no gradient in a step of plain rows alone, which torch cannot know beforehand.
            warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
            # Its new name is not known to the oldest torch that bidm takes.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            with processes.watched():
                self._wrapped = DistributedDataParallel(
                    _Step(network, losses),
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                    find_unused_parameters=True,
                )
            self.losses = cast(Callable[[TeacherTargets], Losses], self._wrapped)

    def exchanging(self, exchange: bool) -> AbstractContextManager[None]:
        """Context of a forward and backward pass, after which gradients are exchanged or only added up."""
        if exchange or self._wrapped is None:
            return contextlib.nullcontext()
        return cast("AbstractContextManager[None]", self._wrapped.no_sync())

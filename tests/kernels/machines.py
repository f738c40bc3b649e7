"""Where the kernels' tests run: a CPU that plays a GPU, in two schedules, and a GPU where there is one.

On a GPU alone, and with what the CPU cannot show:

    python -m pytest tests/kernels -k cupy
    compute-sanitizer --tool racecheck python -m pytest tests/kernels -k cupy
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cupy_kernels.kernel import Launcher
from tests.kernels.host_launcher import HostLauncher, available


@dataclass
class Machine:
    """A launcher, and the device that its tensors are on."""

    launcher: Launcher
    device: str = "cpu"

    def put(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.device) for tensor in tensors)


def host(**options: Any) -> Machine:
    """A CPU that plays a GPU; options as :class:`HostLauncher` takes them."""
    return Machine(HostLauncher(**options))


def machine(name: str) -> Machine:
    """One of NAMES; skips the test where it cannot run."""
    if name != "cupy":
        if not available():
            pytest.skip("no g++ here")
        return host(schedule=int(name[-1]))
    from cupy_kernels.cuda import CudaLauncher, why_not

    reason = why_not()
    if reason:
        pytest.skip(reason)
    return Machine(CudaLauncher(torch.cuda.current_device()), "cuda")


NAMES = ("schedule 0", "schedule 1", "cupy")

"""Where the tests run; see machines.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from bidm_cli.packed import choose
from bidm_cli.packed.backends.cupy import CupyBackend
from tests.kernels.host_launcher import HostLauncher, available
from tests.kernels.machines import NAMES, Machine, machine


@pytest.fixture(autouse=True)
def fresh_memory_is_garbage() -> Iterator[None]:
    """torch.empty gives NaN or the largest integer: what a kernel leaves out must not look like a result."""
    if torch.cuda.is_available():  # where it would also forbid operations
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=NAMES)
def any_machine(request: pytest.FixtureRequest) -> Machine:
    """Every test with this fixture runs on the CPU in both schedules, and on a GPU where there is one."""
    return machine(request.param)


@pytest.fixture
def cupy_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let ``--backend cupy`` run on the CPU, by the launcher that plays a GPU."""
    if not available():
        pytest.skip("no g++ here")
    real = choose.why_not

    def why_not(name: str, device_type: str) -> str:
        return "" if name == "cupy" else real(name, device_type)

    monkeypatch.setattr(choose, "why_not", why_not)
    monkeypatch.setitem(choose._CLASSES, "cupy", "tests.kernels.conftest:HostBackend")
    choose._backend.cache_clear()
    yield
    choose._backend.cache_clear()


class HostBackend(CupyBackend):
    """The cupy backend on a CPU; ``options`` are those of the next one that is made."""

    options: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__(HostLauncher(**self.options))

"""The launcher for GPUs, with a driver in between that runs what it is given on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cupy_kernels import cuda
from cupy_kernels.compiler import architecture_for
from cupy_kernels.cuda import CudaLauncher
from cupy_kernels.kernel import THREADS, Kernel
from cupy_kernels.signs import Norm, normalize
from tests.kernels.checks import Case, check_pack, check_product
from tests.kernels.host_launcher import FLAGS, _library, available
from tests.kernels.machines import Machine

if importlib.util.find_spec("cupy") is None:
    pytest.skip("cupy is not installed", allow_module_level=True)

STREAM = 4711


class Driver:
    """CuPy's driver functions, as far as the launcher uses them. A module is the kernel it was made from."""

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self.asked_for: list[tuple[Any, ...]] = []
        self.streams: list[int] = []
        self.devices: list[int] = []

    def machine_code(self, kernel: Kernel, architecture: str) -> bytes:
        assert architecture == "sm_90"
        self.kernels.append(kernel)
        return str(len(self.kernels)).encode()

    def moduleLoadData(self, image: bytes) -> int:
        return int(image)

    def moduleGetFunction(self, module: int, name: str) -> int:
        assert name == self.kernels[module - 1].name
        return module

    def funcSetAttribute(self, *arguments: Any) -> None:
        self.asked_for.append(arguments)

    def launchKernel(self, function: int, *arguments: int) -> None:
        x, y, z, threads, threads_y, threads_z, shared, stream, parameters, extra = arguments
        assert (z, threads, threads_y, threads_z, extra) == (1, THREADS, 1, 1, 0)
        self.streams.append(stream)
        kernel = self.kernels[function - 1]
        struct = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        run = _library(kernel.source(), (*FLAGS, *kernel.defines))[f"run_{kernel.name}"]
        run.restype = ctypes.c_char_p
        assert run(x, y, threads, ctypes.c_size_t(shared), 0, ctypes.c_void_p(struct)) is None


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    if not available():
        pytest.skip("no g++ here")
    import cupy.cuda

    fake = Driver()
    about = SimpleNamespace(major=9, minor=0, multi_processor_count=4)
    limits = SimpleNamespace(deviceGetAttribute=lambda name, index: 99 * 1024, setDevice=fake.devices.append)
    monkeypatch.setattr(cupy.cuda, "driver", fake)
    monkeypatch.setattr(cupy.cuda, "runtime", limits)
    monkeypatch.setattr(cuda, "machine_code", fake.machine_code)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    yield fake


def test_kernels_get_their_arguments(driver: Driver) -> None:
    machine = Machine(CudaLauncher(0))
    check_pack(machine, 20, 45)
    for tier in ("popc", "bmma"):
        check_product(machine, Case(40, 33), tier)  # type: ignore[arg-type]
    assert [kernel.name for kernel in driver.kernels] == ["pack", "conv_popc", "conv_bmma"]
    assert set(driver.streams) == {STREAM}


def test_a_kernel_is_loaded_once_with_all_shared_memory(driver: Driver) -> None:
    machine = Machine(CudaLauncher(0))
    for _ in range(3):
        check_pack(machine, 5, 33)
    assert driver.asked_for == [(1, 8, 99 * 1024)] and len(driver.streams) == 3


def test_every_launch_is_on_its_own_device(driver: Driver) -> None:
    """Two devices used in turn by one thread."""
    first, second = Machine(CudaLauncher(0)), Machine(CudaLauncher(1))
    for machine in (first, second, first):
        check_pack(machine, 5, 33)
    assert driver.devices == [0, 1, 0]


def test_a_grid_that_is_too_high_is_an_error(driver: Driver) -> None:
    """Normalized images are blocks in y; CUDA's own message would name nothing."""
    with pytest.raises(ValueError, match="group_statistics: 65536 blocks"):
        normalize(CudaLauncher(0), torch.zeros(65536, 1, 1), Norm(1, 1e-5))


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [(75, "sm_75"), (89, "sm_89"), (90, "sm_90"), (93, "sm_90"), (125, "sm_121")],
)
def test_code_for_an_earlier_architecture_where_the_own_is_not_known(
    capability: int, architecture: str
) -> None:
    assert architecture_for(capability) == architecture


@pytest.mark.parametrize(
    ("driver_version", "runtime_version", "capability", "says"),
    [
        (12040, 13000, (9, 0), "the NVIDIA driver is too old: it supports CUDA 12.4"),
        (13000, 13000, (7, 0), "the GPU is sm_70"),
        (13000, 13000, (14, 0), "NVRTC 13.0 knows sm_75 to sm_121, the GPU is sm_140; pip install"),
        (13000, 12090, (9, 0), ""),
    ],
)
def test_why_not(
    driver_version: int,
    runtime_version: int,
    capability: tuple[int, int],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import cupy.cuda

    versions = SimpleNamespace(
        driverGetVersion=lambda: driver_version, runtimeGetVersion=lambda: runtime_version
    )
    monkeypatch.setattr(cupy.cuda, "runtime", versions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = cuda.why_not()
    assert found.startswith(says) and bool(found) == bool(says)


def test_without_cupy_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cuda.why_not() == "cupy is not installed (pip install 'bidm[cuda12]' or 'bidm[cuda13]')"

"""Launches on a GPU: torch's memory and stream, CuPy's access to the driver.

Nothing here synchronises or allocates on the device, so launches can be captured in a CUDA graph once every
kernel of the capture has run before (the first launch loads its code).
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Mapping

import torch

from cupy_kernels.compiler import CompileError, architecture_for, first_line, machine_code
from cupy_kernels.kernel import THREADS, Field, Kernel, arguments_of

OLDEST = 75
"""The first compute capability that the kernels run on."""

_SHARED_MEMORY_ATTRIBUTE = 97
"""cudaDevAttrMaxSharedMemoryPerBlockOptin: the most per block, if the kernel asks for it."""

_MOST_BLOCKS = 65535
"""Of a grid's y axis; its x axis takes more than any tensor needs."""


class CudaLauncher:
    """See :class:`cupy_kernels.kernel.Launcher`; one for each device and process.

    Raises:
        CompileError: NVRTC cannot be used (at a kernel's first launch).
    """

    def __init__(self, device_index: int) -> None:
        self.device = torch.device("cuda", device_index)
        about = torch.cuda.get_device_properties(self.device)
        self.capability = 10 * about.major + about.minor
        self.multiprocessors = about.multi_processor_count
        from cupy.cuda import runtime

        self.shared_memory = runtime.deviceGetAttribute(_SHARED_MEMORY_ATTRIBUTE, device_index)
        self._functions: dict[Kernel, int] = {}
        self._loading = threading.Lock()

    def launch(
        self, kernel: Kernel, grid: tuple[int, int], fields: Mapping[str, Field], shared: int = 0
    ) -> None:
        from cupy.cuda import driver, runtime

        if grid[1] > _MOST_BLOCKS:
            raise ValueError(f"{kernel.name}: {grid[1]} blocks, a grid has at most {_MOST_BLOCKS} in y")
        arguments = arguments_of(kernel, fields)
        pointers = (ctypes.c_void_p * 1)(arguments.ctypes.data)
        with torch.cuda.device(self.device):
            # The driver wants the device's context current in this thread; torch sets it only when it has to.
            runtime.setDevice(self.device.index)
            function = self._functions.get(kernel) or self._load(kernel)
            stream = torch.cuda.current_stream().cuda_stream
            driver.launchKernel(
                function, *grid, 1, THREADS, 1, 1, shared, stream, ctypes.addressof(pointers), 0
            )

    def _load(self, kernel: Kernel) -> int:
        from cupy.cuda import driver

        with self._loading:
            if kernel not in self._functions:
                module = driver.moduleLoadData(machine_code(kernel, architecture_for(self.capability)))
                function = driver.moduleGetFunction(module, kernel.name)
                attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                driver.funcSetAttribute(function, attribute, self.shared_memory)
                self._functions[kernel] = function
            return self._functions[kernel]


def why_not() -> str:
    """Reason why kernels cannot run on this machine's GPU, and the way out; empty if they can."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed (pip install 'bidm[cuda12]' or 'bidm[cuda13]')"
    try:
        import cupy
        from cupy.cuda import runtime
    except Exception as error:  # CuPy raises ImportError, RuntimeError or OSError, by what is broken
        return f"cupy cannot be imported ({first_line(error)})"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU (bidm doctor says more)"
    driver, built_for = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    if driver // 1000 < built_for // 1000:
        return (
            f"the NVIDIA driver is too old: it supports CUDA {_version(driver)}, cupy {cupy.__version__} "
            f"needs CUDA {built_for // 1000}; update the driver, or install the cupy of CUDA {driver // 1000}"
        )
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < OLDEST:
        return f"the GPU is sm_{major}{minor}, the kernels need sm_{OLDEST} or newer"
    try:
        architecture_for(10 * major + minor)
    except CompileError as error:
        return str(error)
    return ""


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"

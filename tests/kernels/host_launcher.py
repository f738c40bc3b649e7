"""Kernels on the CPU: the launcher of cupy_kernels, through g++ and cuda_host.h, for tensors on the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from cupy_kernels.kernel import THREADS, Field, Kernel, arguments_of

HERE = Path(__file__).parent
HEADERS = ("cuda_host.h", "single_launch.h")
FLAGS = ("-std=c++17", "-ffp-contract=off", "-Wno-unknown-pragmas", f"-I{HERE}")
SANITIZERS = (
    "-g",
    "-O1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)

Change = Callable[[str, str], str]
"""(file, source) -> source."""


class KernelFailure(Exception):
    """A kernel that did not compile, diverged, or was stopped by a sanitizer."""


def available() -> bool:
    """Whether there is a compiler."""
    return shutil.which("g++") is not None


class HostLauncher:
    """See :class:`cupy_kernels.kernel.Launcher`.

    Args:
        schedule: 0 or 1, which threads go first; see cuda_host.h.
        process: run every launch in a program of its own: a crash is a failure, not the end of the tests.
        sanitize: that, under AddressSanitizer and UBSan.
        change: applied to every kernel's file and source: plants a bug.
        macros: defined besides the kernel's own.
        capability, multiprocessors, shared_memory: of the device that is played.
    """

    def __init__(
        self,
        schedule: int = 0,
        *,
        process: bool = False,
        sanitize: bool = False,
        change: Change | None = None,
        macros: tuple[str, ...] = (),
        capability: int = 90,
        multiprocessors: int = 3,
        shared_memory: int = 227 * 1024,
    ) -> None:
        self.schedule, self.change, self.macros = schedule, change, macros
        self.process, self.sanitize = process or sanitize, sanitize
        self.capability, self.multiprocessors = capability, multiprocessors
        self.shared_memory = shared_memory
        self.launched: list[str] = []

    def launch(
        self, kernel: Kernel, grid: tuple[int, int], fields: Mapping[str, Field], shared: int = 0
    ) -> None:
        args = arguments_of(kernel, fields)
        source = kernel.source()
        if self.change is not None:
            source = self.change(kernel.file, source)
        if shared > self.shared_memory:
            raise KernelFailure(f"{kernel.name}: {shared} bytes of shared memory")
        self.launched.append(kernel.name)
        options = (*FLAGS, *kernel.defines, *(f"-D{macro}" for macro in self.macros))
        if self.process:
            program = _program(source, (*options, *(SANITIZERS if self.sanitize else ("-O1",))))
            self._run_program(program, kernel, args, grid, fields, shared)
            return
        run = _library(source, options)[f"run_{kernel.name}"]
        run.restype = ctypes.c_char_p
        error = run(*grid, THREADS, ctypes.c_size_t(shared), self.schedule, ctypes.c_void_p(args.ctypes.data))
        if error:
            raise KernelFailure(f"{kernel.name}: {error.decode()}")

    def _run_program(
        self,
        program: Path,
        kernel: Kernel,
        args: np.ndarray,
        grid: tuple[int, int],
        fields: Mapping[str, Field],
        shared: int,
    ) -> None:
        tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        with tempfile.TemporaryDirectory() as folder:
            given, result = Path(folder) / "in", Path(folder) / "out"
            with given.open("wb") as file:
                sizes = (*grid, THREADS, self.schedule, shared, args.nbytes, len(tensors))
                file.write(struct.pack("<7Q", *sizes) + args.tobytes())
                for name, tensor in tensors.items():
                    offset = kernel.layout().fields[name][1]  # type: ignore[index]
                    file.write(struct.pack("<2Q", offset, tensor.nbytes))
                    file.write(_bytes_of(tensor))
            environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
            done = subprocess.run(
                [program, kernel.name, given, result],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
            )
            if done.returncode:
                raise KernelFailure(f"{kernel.name}: status {done.returncode} {done.stderr}")
            content = result.read_bytes()
        for tensor in tensors.values():
            part, content = content[: tensor.nbytes], content[tensor.nbytes :]
            ctypes.memmove(tensor.data_ptr(), part, len(part))


def _bytes_of(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def _kernels(source: str) -> list[str]:
    """Names of the kernels in a file."""
    return re.findall(r'^extern "C" __global__ void .*?(\w+)\(\w+ args\) {$', source, re.MULTILINE)


@cache
def _library(source: str, options: tuple[str, ...]) -> ctypes.CDLL:
    """The kernels of a file, each as run_<name>(grid x, grid y, threads, shared bytes, schedule, args)."""
    calls = [
        f'extern "C" const char* run_{name}(unsigned x, unsigned y, unsigned threads, size_t shared, '
        f"int schedule, const void* args) {{ host::schedule = schedule; "
        f"return host::launch({name}, x, y, threads, shared, args); }}"
        for name in _kernels(source)
    ]
    text = "\n".join(('#include "cuda_host.h"', source, *calls, ""))
    return ctypes.CDLL(str(_compiled(text, (*options, "-O1", "-shared", "-fPIC"))))


def _program(source: str, options: tuple[str, ...]) -> Path:
    """A program that runs one of a file's kernels: program <name> <input> <output>."""
    calls = [
        f'  if (!std::strcmp(arguments[1], "{name}")) '
        f"return host::run_from_files({name}, arguments[2], arguments[3]);"
        for name in _kernels(source)
    ]
    headers = '#include "cuda_host.h"\n#include "single_launch.h"'
    text = "\n".join((headers, source, "int main(int, char** arguments) {", *calls, "  return 2;", "}", ""))
    return _compiled(text, options)


def _compiled(text: str, flags: tuple[str, ...]) -> Path:
    """What g++ makes of a text, kept between runs by the hash of everything it depends on."""
    headers = "".join((HERE / name).read_text() for name in HEADERS)
    digest = hashlib.sha256("\0".join((text, headers, *flags)).encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"bidm-cuda-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    result = folder / digest
    if not result.exists():
        temporary = folder / f"{digest}.{uuid.uuid4().hex[:8]}"
        command = ["g++", *flags, "-x", "c++", "-", "-o", str(temporary)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelFailure(done.stderr)
        temporary.rename(result)
    return result

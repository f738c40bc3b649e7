"""Compilation of kernels by numba, in this process or in several others, which do not import torch for it."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from bidm_cli.packed.cpu.runtime import kernel_cache
from bidm_cli.packed.cpu.runtime.kernel_cache import MachineCode


@dataclass(frozen=True)
class Kernel:
    """A kernel in one form.

    Attributes:
        source: "module:function" of the function that makes it
            (:data:`bidm_cli.packed.cpu.runtime.args.Source`). form: its arguments.
        size: bytes of the kernel's argument struct.
    """

    source: str
    form: tuple[str | int, ...]
    size: int

    @property
    def name(self) -> str:
        """Source and form in words, also in the cache."""
        return "_".join(map(str, (self.source.partition(":make_")[2], *self.form)))


def compile_kernel(kernel: Kernel) -> MachineCode:
    """Compile a kernel to a C function of the address of one argument struct, and keep it in the cache."""
    import numba
    from numba.core.errors import NumbaWarning

    function, args = pkgutil.resolve_name(kernel.source)(*kernel.form)
    signature = numba.types.void(numba.types.CPointer(numba.from_dtype(args)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaWarning)
        compiled: Any = numba.cfunc(signature, error_model="numpy")(function)
    code, _ = compiled._library.serialize_using_object_code()[2]
    found = MachineCode(compiled.native_name, code)
    kernel_cache.write(kernel.name, found)
    return found


def compile_in_processes(kernels: Sequence[Kernel], most: int) -> Iterator[Kernel]:
    """Compile kernels into the cache in at most so many processes; yields each when it is there.

    A process that fails leaves its kernels out.
    """
    root = str(Path(__file__).resolve().parents[4])
    code = f"import sys; sys.path.insert(0, {root!r}); from {__name__} import main; main()"
    output, into = os.pipe()
    processes = []
    try:
        for i in range(min(most, len(kernels))):
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=into,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            processes.append(process)
            assert process.stdin is not None
            with process.stdin:
                process.stdin.write(json.dumps([astuple(kernel) for kernel in kernels[i::most]]))
        os.close(into)
        into = -1
        by_name = {kernel.name: kernel for kernel in kernels}
        with os.fdopen(output) as lines:
            for line in lines:
                yield by_name[line.strip()]
    finally:
        if into >= 0:
            os.close(into)
            os.close(output)
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    """Compile the kernels that standard input describes; a line of standard output says each one's name."""
    for source, form, size in json.loads(sys.stdin.read()):
        kernel = Kernel(source, tuple(form), size)
        compile_kernel(kernel)
        print(kernel.name, flush=True)

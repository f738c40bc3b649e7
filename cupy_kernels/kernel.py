"""Kernels, their argument structs, and the launcher protocol.

Every kernel takes one struct. Its layout is read from the .cu file, so that names, order and types are
written down once; :func:`arguments_of` fills it from tensors and numbers by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent
THREADS = 256
"""Threads per block, of every kernel."""

ACTIVATIONS = {
    torch.float32: "ACTIVATION_FLOAT32",
    torch.float16: "ACTIVATION_FLOAT16",
    torch.bfloat16: "ACTIVATION_BFLOAT16",
}
"""Types that activations may have, by the macro that selects them."""

_NUMBERS = {"int": np.int32, "float": np.float32}
_TENSORS = {"int": torch.int32, "float": torch.float32, "Word": torch.int32}

Field = Tensor | int | float | None


@dataclass(frozen=True)
class Kernel:
    """One ``extern "C" __global__`` function.

    Attributes:
        file: in this folder. name: the function. struct: that of its arguments.
        activation: type of the activations. macros: further ones of the file, as (name, value).
    """

    file: str
    name: str
    struct: str
    activation: torch.dtype
    macros: tuple[tuple[str, int], ...] = ()

    @property
    def defines(self) -> list[str]:
        """The macros as compiler options."""
        return [f"-D{ACTIVATIONS[self.activation]}", *(f"-D{name}={value}" for name, value in self.macros)]

    def source(self) -> str:
        """The file's text with its .cuh files in place; line numbers in messages stay those of the files."""
        return _inlined(self.file)

    def layout(self) -> np.dtype:
        """The struct as the compiler lays it out; a pointer is an int64."""
        return _layout(self.source(), self.struct)[0]


class Launcher(Protocol):
    """Runs kernels somewhere: :class:`cupy_kernels.cuda.CudaLauncher`, or the tests' on a CPU."""

    capability: int
    """Compute capability, 75 for sm_75."""
    multiprocessors: int
    shared_memory: int
    """Bytes of shared memory that one block may have."""

    def launch(
        self, kernel: Kernel, grid: tuple[int, int], fields: Mapping[str, Field], shared: int = 0
    ) -> None:
        """Start blocks of :data:`THREADS` threads with ``shared`` bytes of dynamic shared memory."""


@cache
def _inlined(file: str) -> str:
    def included(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start()) + 2
        return f'#line 1 "{match[1]}"\n{_inlined(match[1])}#line {line} "{file}"'

    text = (FOLDER / file).read_text(encoding="utf-8")
    return re.sub(r'^#include "(\w+\.cuh)"$', included, text, flags=re.MULTILINE)


@cache
def _layout(source: str, struct: str) -> tuple[np.dtype, dict[str, str]]:
    """The struct's layout, and the types that its pointers point to by member."""
    body = re.search(rf"struct {struct} {{\n(.*?)\n}};", source, re.DOTALL)
    if body is None:
        raise ValueError(f"no struct {struct}")
    members = re.findall(r"^ *(?:const )?(\w+)(\*?) (\w+);", body[1], re.MULTILINE)
    fields = [(name, np.int64 if pointer else _NUMBERS[kind]) for kind, pointer, name in members]
    return np.dtype(fields, align=True), {name: kind for kind, pointer, name in members if pointer}


def arguments_of(kernel: Kernel, fields: Mapping[str, Field]) -> np.ndarray:
    """The kernel's argument struct, one element. Fields left out are 0 or null.

    Raises:
        ValueError: a field that the struct lacks, or a tensor that is not what the kernel reads.
    """
    layout, pointers = _layout(kernel.source(), kernel.struct)
    arguments = np.zeros((), layout)
    for name, value in fields.items():
        if isinstance(value, Tensor):
            wanted = _TENSORS.get(pointers.get(name, ""), kernel.activation)
            if value.dtype != wanted or not value.is_contiguous():
                raise ValueError(f"{kernel.name}: {name} must be contiguous {wanted}, it is {value.dtype}")
            arguments[name] = value.data_ptr()
        elif value is not None:
            arguments[name] = value
    return arguments

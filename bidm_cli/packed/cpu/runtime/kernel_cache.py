"""Machine code of kernels on disk, found and linked without numba, whose import takes long.

A file's name carries a digest of all that the code depends on: the sources, the processor, and the versions
of the compiler. Its first bytes are a digest of the rest, as damaged code could do anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from llvmlite import binding as llvm

from bidm_cli.errors import BidmError
from bidm_cli.files import cache_folder, write_atomically
from bidm_cli.packed.cpu.codegen.isa import target

SOURCES = Path(__file__).parents[1]
"""Folder of everything that is compiled into kernels."""

_DIGEST = hashlib.sha256().digest_size
_HELPER = re.compile(rb"\0_?((?:numba|NRT)_\w+)(?=\0)")


class MachineCode(NamedTuple):
    """An object file, and the name of its function."""

    symbol: str
    code: bytes


@functools.cache
def sources_digest(folder: Path = SOURCES) -> str:
    """Digest of all Python sources in a folder and below."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def folder() -> Path:
    """Folder of compiled kernels: $BIDM_KERNEL_CACHE, or bidm/kernels in the user's cache.

    Raises:
        RuntimeError: there is no home folder.
    """
    return Path(os.environ.get("BIDM_KERNEL_CACHE") or cache_folder() / "kernels")


def is_writable() -> bool:
    """True if there is a folder for compiled kernels, and it can be written to."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        return os.access(folder(), os.W_OK)
    except (OSError, RuntimeError):
        return False


def read(name: str) -> MachineCode | None:
    """The code of a kernel, or None if it is not there, or damaged."""
    try:
        contents = _path(name).read_bytes()
    except (OSError, RuntimeError):
        return None
    if hashlib.sha256(contents[_DIGEST:]).digest() != contents[:_DIGEST]:
        return None
    symbol, _, code = contents[_DIGEST:].partition(b"\0")
    return MachineCode(symbol.decode(), code)


def write(name: str, compiled: MachineCode) -> None:
    """Keep a kernel's code for later processes, where that is possible."""
    contents = compiled.symbol.encode() + b"\0" + compiled.code
    with contextlib.suppress(BidmError, RuntimeError), write_atomically(_path(name)) as temporary:
        temporary.write_bytes(hashlib.sha256(contents).digest() + contents)


def link(compiled: MachineCode) -> tuple[int, Any]:
    """(address of the function, object that the code lives as long as)."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # Of numba's runtime only functions for errors are named, which kernels do not raise; without numba in
    # the process something has to stand there.
    for name in {found.decode() for found in _HELPER.findall(compiled.code)}:
        if llvm.address_of_symbol(name) is None:
            stands_in = ctypes.cast(ctypes.pythonapi.Py_FatalError, ctypes.c_void_p).value
            llvm.add_symbol(name, stands_in)
    triple, cpu, features = target()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(compiled.code))
    engine.finalize_object()
    return engine.get_function_address(compiled.symbol), engine


def _path(name: str) -> Path:
    return folder() / f"{name}-{_key()}.o"


@functools.cache
def _key() -> str:
    compilers = [f"{package} {version(package)}" for package in ("numba", "llvmlite")]
    return hashlib.sha256("\n".join([sources_digest(), *target(), *compilers]).encode()).hexdigest()[:16]

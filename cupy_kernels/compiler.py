"""CUDA C to machine code with NVRTC, kept on disk.

NVRTC is a package of its own (nvidia-cuda-nvrtc, which torch brings) and needs neither a GPU nor a driver.
CuPy's RawModule is not used: it cannot ask for sm_90a and always flushes denormal numbers to zero.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

from cupy_kernels.kernel import Kernel

OPTIONS = ("-std=c++17", "--ptxas-options=-v")
"""Of every compilation. The second puts registers used and spilled into the log."""
LEFT_AFTER_SECONDS = 3600.0
"""Age of a temporary file that no process is writing any more; it takes milliseconds."""


class CompileError(Exception):
    """NVRTC refused a kernel, or cannot be used at all."""


def cache_folder() -> Path:
    """Folder of compiled kernels: $BIDM_KERNEL_CACHE, or bidm/kernels in the user's cache."""
    chosen = os.environ.get("BIDM_KERNEL_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bidm" / "kernels"


def machine_code(kernel: Kernel, architecture: str) -> bytes:
    """The kernel's file as a cubin for ``architecture`` ("sm_90"), from the disk if it was compiled before.

    Raises:
        CompileError: see there.
    """
    options = (f"-arch={architecture}", *OPTIONS, *kernel.defines)
    text = "\0".join((kernel.source(), *options, str(_nvrtc().getVersion())))
    path = cache_folder() / f"{kernel.name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    code, _ = compile_source(kernel.source(), kernel.file, options)
    # A cache that cannot be written to costs time at the next start, no more.
    with contextlib.suppress(OSError):
        _keep(path, code)
    return code


def _keep(path: Path, code: bytes) -> None:
    """Write a file whole or not at all, and remove what killed processes left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.stem}.{'[0-9a-f]' * 8}"):
        if time.time() - left.stat().st_mtime > LEFT_AFTER_SECONDS:
            left.unlink(missing_ok=True)
    temporary = path.with_suffix(f".{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_bytes(code)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def architecture_for(capability: int) -> str:
    """Architecture for a GPU of this capability: its own, or the nearest before it that runs there.

    Code for one capability runs on later ones of the same major number, so an NVRTC need not know the newest.

    Raises:
        CompileError: this NVRTC knows none.
    """
    nvrtc = _nvrtc()
    known = nvrtc.getSupportedArchs()
    fitting = [arch for arch in known if arch <= capability and arch // 10 == capability // 10]
    if not fitting:
        version = ".".join(map(str, nvrtc.getVersion()))
        raise CompileError(
            f"NVRTC {version} knows sm_{min(known)} to sm_{max(known)}, the GPU is sm_{capability}; "
            "pip install the cupy and nvidia-cuda-nvrtc of another CUDA version"
        )
    return f"sm_{max(fitting)}"


def compile_source(source: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
    """The cubin, and the compiler's log.

    Raises:
        CompileError: see there.
    """
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source, name, [], [])
    try:
        nvrtc.compileProgram(program, options)
        # CuPy cuts the last byte off.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise CompileError(f"{name} {' '.join(options)}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def _nvrtc() -> Any:
    """CuPy's NVRTC module, with the library loaded."""
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except (RuntimeError, ImportError, OSError) as error:
        raise CompileError(
            f"NVRTC cannot be loaded ({first_line(error)}); "
            "pip install the nvidia-cuda-nvrtc of CuPy's CUDA version"
        ) from error
    return nvrtc


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

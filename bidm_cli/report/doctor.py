"""What packed networks run on here, as lines of text for ``bidm doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.select import CHOICES, backend_for, resolve, why_not

INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
"""The file that pytorch-fid keeps its feature network in."""

_PACKAGES = ("torch", "numba", "llvmlite", "numpy", "safetensors", "timm", "pytorch-fid")
_CUPY = ("cupy-cuda12x", "cupy-cuda13x")

_EXAMPLES = {
    "3x3 convolution 224 -> 224": LayerGeometry("conv2d", 224, 224, (3, 3), (1, 1), (1, 1, 1, 1)),
    "3x3 convolution 64 -> 64, stride 2": LayerGeometry("conv2d", 64, 64, (3, 3), (2, 2), (0, 1, 0, 1)),
    "1x1 convolution 448 -> 224": LayerGeometry("conv2d", 448, 224),
    "linear 896 -> 224": LayerGeometry("linear", 896, 224),
}


def devices() -> list[str]:
    """The CPU and every CUDA device."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    found = [f"cpu: {platform.machine()}, {cores} cores, torch uses {threads} threads"]
    if not torch.cuda.is_available():
        return [*found, "cuda: none that torch sees"]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory / 2**30
        found.append(f"cuda:{index}: {about.name}, sm_{about.major}{about.minor}, {memory:.0f} GiB")
    return found


def backends() -> list[str]:
    """Each backend on each kind of device: usable, or why not."""
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = [f"auto on {kind}: {resolve('auto', kind)}" for kind in kinds]
    for name in CHOICES[1:]:
        kind = "cuda" if name == "cupy" else "cpu"
        lines.append(f"{name}: {why_not(name, kind) or 'ready'}")
    return lines


def kernels() -> list[str]:
    """The CPU's instruction set, threads, and the kernel that a few layers get."""
    if why_not("numba", "cpu"):
        return ["torch only: " + why_not("numba", "cpu")]
    from bidm_cli.packed.cpu.codegen import isa
    from bidm_cli.packed.cpu.runtime import threads as team

    backend = backend_for("numba", "cpu")
    lines = [f"instruction set: {isa.instruction_set()}", f"threads: {team.description()}"]
    return lines + [f"{name}: {backend.kernel(geometry)}" for name, geometry in _EXAMPLES.items()]


def gpu_kernels() -> list[str]:
    """The kernel that a few layers get on the GPU, and where compiled ones are kept; or why there is none."""
    reason = why_not("cupy", "cuda")
    if reason:
        return ["none: " + reason]
    from cupy_kernels.compiler import cache_folder

    backend = backend_for("cupy", "cuda")
    lines = [f"{name}: {backend.kernel(geometry)}" for name, geometry in _EXAMPLES.items()]
    return [*lines, f"compiled kernels: {cache_folder()}"]


def versions() -> list[str]:
    """Python and the installed packages that matter, and how to get TensorBoard's log."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    for name in _PACKAGES + _CUPY:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if importlib.util.find_spec("tensorboard") is None:
        lines.append("tensorboard: not installed (pip install 'bidm[tensorboard]'); runs write log.csv")
    return lines


def inception_weights() -> str:
    """Where pytorch-fid's feature network is, or what to put where."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if path.is_file():
        return f"{path} ({path.stat().st_size:,} bytes)"
    return f"not cached; FID downloads {INCEPTION} to {path.parent}, or put it there, or give --weights"

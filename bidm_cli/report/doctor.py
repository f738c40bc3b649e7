"""Devices, backends, kernels and versions of this machine, as lines of text for ``bidm doctor``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.choose import CHOICES, choose_backend, resolve, why_not
from bidm_cli.report.metrics.networks.base import MissingWeights
from bidm_cli.report.metrics.networks.efficientnet import INSTALL, NAME, wheel_weights
from bidm_cli.report.metrics.networks.inception import INCEPTION_FILE, inception_path

_PACKAGES = (
    "torch",
    "numba",
    "llvmlite",
    "numpy",
    "safetensors",
    "timm",
    "pytorch-fid",
    "efficientnet-lite-pytorch",
)
_CUPY = ("cupy-cuda12x", "cupy-cuda13x")

_EXAMPLES = {
    "3x3 convolution 224 -> 224": LayerGeometry("conv2d", 224, 224, (3, 3), (1, 1), (1, 1, 1, 1)),
    "3x3 convolution 64 -> 64, stride 2": LayerGeometry("conv2d", 64, 64, (3, 3), (2, 2), (0, 1, 0, 1)),
    "1x1 convolution 448 -> 224": LayerGeometry("conv2d", 448, 224),
    "linear 896 -> 224": LayerGeometry("linear", 896, 224),
}


def devices() -> list[str]:
    """CPU and every CUDA device."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    lines = [f"cpu: {platform.machine()}, {cores} cores, torch uses {threads} threads"]
    if not torch.cuda.is_available():
        return [*lines, "cuda: none that torch sees"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        lines.append(f"cuda:{index}: {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB")
    return lines


def backends() -> list[str]:
    """Backends per kind of device: ready, or the reason why not."""
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = [f"auto on {kind}: {resolve('auto', kind)}" for kind in kinds]
    for name in CHOICES[1:]:
        kind = "cuda" if name == "cupy" else "cpu"
        lines.append(f"{name}: {why_not(name, kind) or 'ready'}")
    return lines


def kernels() -> list[str]:
    """Instruction set and threads of the CPU, and the kernels of example layers."""
    reason = why_not("numba", "cpu")
    if reason:
        return ["torch only: " + reason]
    from bidm_cli.packed.cpu.codegen import isa
    from bidm_cli.packed.cpu.runtime import kernel_cache, threads

    backend = choose_backend("numba", "cpu")
    lines = [f"instruction set: {isa.instruction_set()}", f"threads: {threads.description()}"]
    lines += [f"{name}: {backend.kernel(geometry)}" for name, geometry in _EXAMPLES.items()]
    return [*lines, f"compiled kernels: {kernel_cache.folder()}"]


def gpu_kernels() -> list[str]:
    """Kernels of example layers on the GPU and the cache folder of compiled ones, or why there are none."""
    reason = why_not("cupy", "cuda")
    if reason:
        return ["none: " + reason]
    from cupy_kernels.compiler import cache_folder

    backend = choose_backend("cupy", "cuda")
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


def feature_networks() -> list[str]:
    """Weights of the networks for image quality, or how to get them."""
    lines = [f"inception (FID): {_inception_weights()}"]
    try:
        path = wheel_weights()
        return [*lines, f"{NAME}: {path} ({path.stat().st_size:,} bytes)"]
    except MissingWeights:
        return [*lines, f"{NAME}: not installed ({INSTALL})"]


def _inception_weights() -> str:
    """Path of pytorch-fid's feature network, or the file to put there."""
    path = inception_path()
    if path.is_file():
        return f"{path} ({path.stat().st_size:,} bytes)"
    return f"not cached; FID downloads {INCEPTION_FILE} to {path.parent}, or put it there, or give `weights`"

"""Choice of the backend: ``auto`` takes numba on the CPU, cupy on CUDA devices, torch elsewhere."""

from __future__ import annotations

import functools
import importlib
import importlib.util

from bidm_cli.errors import BidmError
from bidm_cli.packed.backend import Backend

CHOICES = ("auto", "torch", "numba", "cupy")
"""Values of ``backend``."""

_CLASSES = {
    "torch": "bidm_cli.packed.backends.torch:TorchBackend",
    "numba": "bidm_cli.packed.backends.numba:NumbaBackend",
    "cupy": "bidm_cli.packed.backends.cupy:CupyBackend",
}


def resolve(choice: str, device_type: str) -> str:
    """Name of the backend for a choice and a device ("cpu", "cuda", ...).

    Raises:
        BidmError: an unknown name, or a backend that cannot run there.
    """
    if choice not in CHOICES:
        raise BidmError(f"unknown backend {choice!r}; use one of {', '.join(CHOICES)}")
    if choice == "auto":
        return next((name for name in ("numba", "cupy") if not why_not(name, device_type)), "torch")
    reason = why_not(choice, device_type)
    if reason:
        raise BidmError(f"the {choice} backend cannot run here: {reason}; use `backend` auto or torch")
    return choice


@functools.cache
def why_not(name: str, device_type: str) -> str:
    """Reason why a backend cannot run on a device; empty if it can."""
    if name == "numba":
        if device_type != "cpu":
            return f"it is for the CPU, the model is on {device_type}"
        return "" if importlib.util.find_spec("numba") else "numba is not installed (pip install numba)"
    if name == "cupy":
        if device_type != "cuda":
            return f"it is for CUDA devices, the model is on {device_type} (choose another `device`)"
        from cupy_kernels import cuda

        return cuda.why_not()
    return ""


def choose_backend(choice: str, device_type: str) -> Backend:
    """The backend object of :func:`resolve`, one per name and process; raises as it does."""
    return _backend(resolve(choice, device_type))


@functools.cache
def _backend(name: str) -> Backend:
    module, kind = _CLASSES[name].split(":")
    return getattr(importlib.import_module(module), kind)()

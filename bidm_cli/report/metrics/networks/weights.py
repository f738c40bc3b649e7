"""Weights files of feature networks: read without executing anything, and loaded whole."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bidm_cli.errors import BidmError


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a .pth (weights only, nothing is executed) or .safetensors file.

    Raises:
        BidmError: it cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling's many, and safetensors' own error class
        raise BidmError(f"{path} cannot be read as weights: {reason_of(error)[:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BidmError(f"{path} is not a state dict of tensors")
    return state


def load_state(network: nn.Module, path: Path, name: str) -> None:
    """Load all weights of ``network`` from a file.

    Raises:
        BidmError: it cannot be read, or does not fit the network ``name``.
    """
    try:
        network.load_state_dict(read_state(path), strict=True)
    except RuntimeError as error:
        raise BidmError(f"{path} does not fit {name}: {misfit(error)}") from error


def misfit(error: RuntimeError) -> str:
    """Complaint of load_state_dict in one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
    return " ".join(lines)[:200]


def reason_of(error: BaseException) -> str:
    """An exception's own words in one line."""
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__

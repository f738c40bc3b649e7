"""Check of ``--device``."""

from __future__ import annotations

from bidm_cli.errors import BidmError, first_line


def choose_device(name: str) -> str:
    """Device to run on; "auto" takes CUDA where there is one.

    Raises:
        BidmError: no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no NVIDIA GPU; bidm doctor says more")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BidmError(f"--device {name}: {first_line(error)}; use cpu") from error
    return name

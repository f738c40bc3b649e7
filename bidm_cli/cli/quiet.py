"""Output of the processes of a run besides the first: errors alone."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any


class _NoTerminal:
    """Standard error on which no progress bar is drawn."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        """False: bars of several processes would overwrite each other."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def quiet_beside_first(rank: int, size: int) -> None:
    """Show nothing of a process that is not the first, but errors and what it passes on to the first."""
    if size > 1:
        # DistributedDataParallel warns of a setting that steps of plain rows alone need. Read with torch.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        sys.stderr = _NoTerminal(sys.stderr)
        warnings.simplefilter("ignore")

"""The two newest states of a run on disk: a damaged one does not cost the run.

    checkpoint.pt           the newest
    checkpoint.before.pt    the one before it

Either is whole or not there. While a state is written there are three for a moment; where the disk has no
room for that, the older one goes first, which is said.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bidm_cli.errors import BidmError, first_line
from bidm_cli.files import write_atomically

NEWEST, BEFORE = "checkpoint.pt", "checkpoint.before.pt"


class StateFiles:
    """States in the run's folder; ``say`` is called with a line when an older one is taken or given up."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.newest, self.before, self._say = folder / NEWEST, folder / BEFORE, say

    def save(self, state: dict[str, Any]) -> None:
        """Write a state, and keep the one before it.

        Raises:
            BidmError: the folder cannot be written to, or the disk is full; the states there stay.
        """
        try:
            self._write(state)
        except BidmError as error:
            if not (self.before.is_file() and self.newest.is_file()):
                raise
            self.before.unlink()
            self._say(f"{error}; {self.before} is removed to make room")
            self._write(state)

    def _write(self, state: dict[str, Any]) -> None:
        with write_atomically(self.newest) as temporary:
            torch.save(state, temporary)
            if self.newest.is_file():
                self.before.unlink(missing_ok=True)
                try:
                    os.link(self.newest, self.before)
                except OSError:  # a file system without hard links
                    os.replace(self.newest, self.before)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The newest state that is whole, on ``device``; None if there is none at all.

        Raises:
            BidmError: there are states, all of them damaged.
        """
        wrong = []
        for path in (self.newest, self.before):
            try:
                state = _read(path, device)
            except FileNotFoundError:
                wrong += [f"{path} is missing"] if path == self.newest else []
            except Exception as error:
                wrong.append(f"{path} cannot be read ({first_line(error)})")
            else:
                if path == self.before:
                    self._say(f"{wrong[0]}: the state before it is taken, after step {state['step']}")
                    # Else the next save would keep the damaged one as the state before.
                    os.replace(self.before, self.newest)
                return state
        damaged = [text for text in wrong if not text.endswith("missing")]
        if damaged:
            raise BidmError(f"{'; '.join(damaged)}; remove what is damaged to start anew")
        return None


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """A state, checked byte for byte; torch itself does not look at the checksums."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} is damaged")
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    if not isinstance(state, dict) or not {"step", "recipe", "seed", "rows", "sums"} <= state.keys():
        raise ValueError("not the state of a run")
    return state

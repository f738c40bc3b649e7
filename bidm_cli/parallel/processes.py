"""Processes of one run, alone or joined by torch.distributed: what they tell each other.

with joined("cuda") as processes:           # this process alone, unless torchrun started several
    folder = processes.from_first(folder)   # the first process's value
    rows = batch[processes.rank :: processes.size]
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from bidm_cli.errors import BidmError, first_line
from bidm_cli.parallel.place import Place, ProcessLost, own_place, settle_claim

EXCHANGE = timedelta(minutes=30)
"""Longest wait for a gradient from another process, which takes seconds unless that process is stuck."""
WAIT = timedelta(days=7)
"""Longest wait for work that one process does alone; one that dies is noticed at once."""
SEEN_WITHIN = 90.0
"""Seconds until all machines have to see a new file; network file systems are late by up to a minute."""


class Processes:
    """The processes of a run, seen from one of them; messages are JSON and go over the CPU.

    Attributes:
        rank: number of this process, from 0. size: how many there are. hosts: name of each one's machine.
        notes: lines for the user, which only the first process can show (:meth:`take_notes`).
    """

    def __init__(self, place: Place | None = None, messages: dist.ProcessGroup | None = None) -> None:
        place = place or Place()
        self.rank, self.size, self._messages = place.rank, place.size, messages
        self.notes: list[str] = []
        self.hosts: list[str] = self.gathered(socket.gethostname())

    @property
    def is_first(self) -> bool:
        """True in the one process that writes and speaks."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """ "process 3", with its machine where there are several."""
        return f"process {rank}" + (f" on {self.hosts[rank]}" if len(set(self.hosts)) > 1 else "")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raise ProcessLost in place of what torch raises when another process cannot be reached."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            own = isinstance(error, torch.OutOfMemoryError) or self.size == 1
            if own or not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
                raise
            raise ProcessLost(
                f"process {self.rank}: another process of the run ended or cannot be reached "
                f"({first_line(error)})"
            ) from error

    def gathered(self, value: Any) -> list[Any]:
        """``value`` (JSON) of every process, by rank."""
        if self.size == 1:
            return [value]
        own = _bytes(value)
        with self.watched():
            lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(own)]), group=self._messages)
            longest = max(int(length) for length in lengths)
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            padded = torch.nn.functional.pad(own, (0, longest - len(own)))
            dist.all_gather(texts, padded, group=self._messages)
        return [_value(text[: int(n)]) for text, n in zip(texts, lengths, strict=True)]

    def from_first(self, value: Any) -> Any:
        """``value`` (JSON) of the first process, in all of them."""
        if self.size == 1:
            return value
        own = _bytes(value if self.is_first else None)
        with self.watched():
            length = torch.tensor([len(own)])
            dist.broadcast(length, 0, group=self._messages)
            text = own if self.is_first else torch.zeros(int(length), dtype=torch.uint8)
            dist.broadcast(text, 0, group=self._messages)
        return _value(text)

    def any(self, flag: bool) -> bool:
        """True if ``flag`` is in any process; all get the same answer."""
        if self.size == 1:
            return flag
        found = torch.tensor([int(flag)])
        with self.watched():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._messages)
        return bool(found)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all processes, on the device they are on."""
        if self.size == 1:
            return values
        total = values.clone()
        with self.watched():
            dist.all_reduce(total)
        return total

    def take_notes(self) -> list[str]:
        """In the first process the :attr:`notes` of all since the last call, equal ones once; else none."""
        found = self.gathered(self.notes)
        self.notes.clear()
        by_line = {line: rank for rank, lines in reversed(list(enumerate(found))) for line in lines}
        return [f"{self.name(rank)}: {line}" for line, rank in by_line.items()] if self.is_first else []

    def wait(self) -> None:
        """Wait until all processes are here, for days if need be."""
        if self.size > 1:
            with self.watched():
                dist.barrier(group=self._messages)

    def check_shared(self, path: Path) -> None:
        """Wait until all processes are here, and check that all see the file ``path`` of one of them.

        Raises:
            BidmError: some machine does not see it.
        """
        self.wait()
        deadline = time.monotonic() + SEEN_WITHIN
        while self.size > 1 and not path.is_file() and time.monotonic() < deadline:
            time.sleep(0.5)
            with contextlib.suppress(OSError):  # a listing makes a network file system look again
                os.listdir(path.parent)
        seen = self.gathered(path.is_file() or self.size == 1)
        if not all(seen):
            blind = ", ".join(self.name(rank) for rank, found in enumerate(seen) if not found)
            raise BidmError(
                f"{path}, which another process wrote, is not seen by {blind}; all machines need the same "
                "folder at the same path, on a network file system, say"
            )

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise BidmError if ``values`` (JSON, by what they are) are not the same in all processes."""
        found = self.gathered(values)
        for what, own in found[0].items():
            other = next((rank for rank, theirs in enumerate(found) if theirs[what] != own), None)
            if other is not None:
                theirs = found[other][what]
                raise BidmError(
                    f"{self.name(other)} has another {what} than process 0 ({theirs}, not {own}); give all "
                    "machines the same files"
                )


def _bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())


@contextlib.contextmanager
def joined(device: str | torch.device) -> Iterator[Processes]:
    """Join the run that this process was started for; it is alone without one.

    Gradients go over NCCL for GPUs and gloo for CPUs, messages over gloo. A group that a script of the user's
    has made is used, and left as it is.

    Raises:
        BidmError: the others cannot be reached.
    """
    if dist.is_initialized():
        size = dist.get_world_size()
        yield Processes(Place(dist.get_rank(), size, 0, size), _messages())
        return
    place = own_place()
    if place.size == 1:
        yield Processes()
        return
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=EXCHANGE)))
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=EXCHANGE)
        settle_claim(lambda: _claims(store, rank))
        processes = Processes(place, _messages())
    except (RuntimeError, ValueError) as error:
        raise BidmError(
            f"process {place.rank} of {place.size} cannot reach the others ({first_line(error)}); start all "
            "with torchrun, and see that its address and port are open"
        ) from error
    yield processes
    # Not after an error: NCCL would wait for the others.
    dist.destroy_process_group()
    settle_claim(None)


def _messages() -> dist.ProcessGroup:
    return cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=WAIT))


def _claims(store: dist.Store, rank: int) -> bool:
    """True if no other process of the run has failed before."""
    try:
        return bool(store.compare_set("bidm/failed", "", str(rank)) == str(rank).encode())
    except RuntimeError:  # the process that kept the store is gone: what started it says so
        return False


def device_of(device: str | torch.device) -> torch.device:
    """Device of this process: with several on a machine each has a GPU of its own.

    Raises:
        BidmError: fewer GPUs than processes here, or one GPU named for all of them.
    """
    device, place = torch.device(device), own_place()
    if device.type != "cuda" or place.size == 1:
        return device
    if device.index is not None and place.local_size > 1:
        raise BidmError(
            f"{place.local_size} processes cannot share {device}; give `device` cuda for one each"
        )
    if place.local_size > torch.cuda.device_count():
        raise BidmError(
            f"{place.local_size} processes on {socket.gethostname()} and {torch.cuda.device_count()} GPUs; "
            "start one process per GPU, or give `device` cpu"
        )
    chosen = torch.device("cuda", place.local_rank if device.index is None else device.index)
    torch.cuda.set_device(chosen)
    return chosen

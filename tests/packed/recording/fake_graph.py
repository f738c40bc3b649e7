"""CUDA graphs on a CPU, as strict as those of a GPU: what torch and the kernels' launcher are told is written
down with the tensors it was told for, and a replay does it again on those.

    with fake_graphs(monkeypatch) as graphs: ...      # CudaRecorder works on a CPU

Whatever would make a GPU wait for its results, or copies from unpinned memory, is refused while recording, as
CUDA refuses it: reading a number out of a tensor, sizes that depend on values, tensors from Python lists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.host_launcher import HostLauncher

REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "lift_fresh", "equal")


class FakeGraph:
    """As torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for work in self.work:
                work()


class Recording(TorchDispatchMode):
    """While open, what is done goes into ``graph``, too."""

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        kwargs = kwargs or {}
        refuse(name, args)
        result = func(*args, **kwargs)
        returns = [value.alias_info for value in func._schema.returns]
        if any(info is not None and not info.is_write for info in returns):
            return result  # a view: nothing is computed

        def again() -> None:
            anew = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(anew), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.graph.work.append(again)
        return result


def refuse(name: str, args: Any) -> None:
    """RuntimeError for what CUDA does not do while a stream is recorded."""
    masks = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)]
    if name in REFUSED or (name == "index" and masks):
        raise RuntimeError(f"operation not permitted when stream is capturing: {name}")


class fake_graphs:
    """Replaces what :class:`bidm_cli.packed.recording.cuda_graph.CudaRecorder` uses of torch.cuda.

    Attributes:
        made: the graphs, in the order of recording.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[FakeGraph] = []
        self.devices: list[torch.device] = []
        self._recording: FakeGraph | None = None
        real_launch = HostLauncher.launch

        def launch(launcher: HostLauncher, *arguments: Any, **named: Any) -> None:
            real_launch(launcher, *arguments, **named)
            if self._recording is not None:
                self._recording.work.append(lambda: real_launch(launcher, *arguments, **named))

        @contextlib.contextmanager
        def graph(made: FakeGraph, pool: Any, stream: Any) -> Iterator[None]:
            self.made.append(made)
            self._recording = made
            try:
                with Recording(made):
                    yield
            finally:
                self._recording = None

        @contextlib.contextmanager
        def device(chosen: torch.device) -> Iterator[None]:
            self.devices.append(chosen)
            yield

        class Stream:
            def wait_stream(self, other: object) -> None: ...

        monkeypatch.setattr(HostLauncher, "launch", launch)
        for name, value in {
            "graph": graph,
            "device": device,
            "CUDAGraph": FakeGraph,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "graph_pool_handle": lambda: (0, 1),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

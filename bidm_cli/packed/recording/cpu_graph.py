"""CPU graph: a network's step captured once and replayed, as CUDA graphs do it on a GPU.

    recorded = CpuRecorder()(step, inputs)      # runs the step and captures its operations
    recorded.replay()                           # runs them again, into recorded.output

At small batches Python, and waking threads up for each layer, takes as long as the layers themselves.
Kernels are launched as sequences (:mod:`bidm_cli.packed.cpu.runtime.sequence_kernel`); torch's operations
between them are called again. Constants are not computed again, and repeated computations on the same small
tensors run once (the SiLU of the time embedding, in every block).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bidm_cli.packed.cpu.runtime.threads import Launched, capturing, is_capturing
from bidm_cli.packed.recording.arena import Arena
from bidm_cli.packed.recording.recorder import Recorded

SMALL = 1 << 16
"""Most bytes of a result that is kept for operations on the same tensors."""

_EMPTY = ("empty", "empty_strided", "empty_permuted")
_FILLED = ("zeros", "ones", "full")
"""Operations that allocate, without "new_" and "_like"."""


class CpuRecorder:
    """Recorder of CPU graphs; one per model, as only one of its graphs runs at a time in a thread."""

    what = "a CPU graph"
    runs_first = True

    def __init__(self) -> None:
        self._own = threading.local()

    def __call__(self, run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Recorded:
        if not hasattr(self._own, "arena"):
            self._own.arena = Arena()
        capture = _Capture(self._own.arena, inputs)
        with capture.listening():
            output = run()
        return Recorded(None if capture.problem else CpuGraph(capture).replay, output, capture.problem)


class _Capture(TorchDispatchMode):
    """Capture of a step: while open, operations (functions) and kernel launches go into ``work``.

    Attributes:
        problem: why the step cannot be replayed; empty if it can.
        kept: objects that have to live as long as the graph.
    """

    def __init__(self, arena: Arena, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.work: list[Any] = []
        self.problem = ""
        self.kept: list[Any] = [arena, *inputs]
        self._arena = arena
        self._inputs = {_storage(tensor) for tensor in inputs}
        self._fixed: set[int] = set()
        self._known: dict[Any, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """A hook of torch's: with True, the first capture would import its compiler (2 s, 150 MB)."""
        return False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note torch's operations and the kernels' launches."""

        def note(launched: Launched) -> None:
            self.work.append(launched)
            self.kept.append(launched.owner)

        with capturing(note), torch.no_grad(), self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.problem or not is_capturing():
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        allocation = name.removeprefix("new_").removesuffix("_like")
        if allocation in _EMPTY:
            return self._empty(func, args, kwargs)
        if func._schema.is_mutable:
            return self._changed(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        key = self._key(func, args, kwargs, tensors)
        if key is not None and key in self._known:
            return self._known[key][0]
        result = func(*args, **kwargs)
        results = tree_leaves(result)
        storages = {_storage(tensor) for tensor in tensors}
        if all(isinstance(leaf, Tensor) and _storage(leaf) in storages for leaf in results):
            return result  # views: nothing is computed
        if not self._changes(tensors) and allocation not in _FILLED and not _is_random(func):
            self._fixed |= {_storage(leaf) for leaf in results if isinstance(leaf, Tensor)}
            self.kept.append(result)
            return result
        if not all(isinstance(leaf, Tensor) for leaf in results) or _depends_on_values(func, tensors):
            self.problem = f"what comes after {name} depends on a tensor's values"
            return result
        result = self._computed(func, args, kwargs, result)
        if key is not None and _is_small(tree_leaves(result)):
            self._known[key] = (result, tensors)
        return result

    def _empty(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        # Memory that is never touched costs nothing; a meta tensor would make torch import its compiler.
        example = func(*args, **kwargs)
        return self._arena.tensor(example.shape, example.stride(), example.dtype)

    def _changed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation that writes into one of its arguments."""
        written = _written(func, args, kwargs)
        if any(_storage(tensor) in self._fixed for tensor in written):
            self.problem = f"{func._schema.name} changes a constant"
        # Results computed from the tensor before are outdated.
        self._known.clear()
        self._note(func, args, kwargs, lambda result: None)
        return func(*args, **kwargs)

    def _computed(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Move a result into the arena, and note how replays compute it there."""

        def moved(value: Tensor) -> Tensor:
            # The tensor's own strides if its numbers lie without gaps in some order, else a contiguous one's.
            strides = torch.empty_like(value).stride()
            return self._arena.tensor(value.shape, strides, value.dtype).copy_(value)

        result = tree_map(moved, result)
        places = [self._arena.alias(place) for place in tree_leaves(result)]

        def bring(result: Any) -> None:
            for place, value in zip(places, tree_leaves(result), strict=True):
                place.copy_(value)

        self._note(func, args, kwargs, bring)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, bring: Callable[[Any], None]) -> None:
        args, kwargs = self._again(args), self._again(kwargs)

        def again() -> None:
            bring(func(*args, **kwargs))

        again.__name__ = f"torch: {func._schema.name.split('::')[1]}"
        self.work.append(again)

    def _again(self, arguments: Any) -> Any:
        """Arguments for a replay: they keep constants alive, but no memory of the arena."""

        def argument(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return self._arena.alias(value) if self._arena.owns(value) else value

        return tree_map(argument, arguments)

    def _changes(self, tensors: Sequence[Tensor]) -> bool:
        """True if any of these differs from step to step."""
        return any(self._arena.owns(t) or _storage(t) in self._inputs for t in tensors)

    def _key(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        """Key of a computation on small tensors; None if this one may not be left out."""
        if not tensors or not _is_small(tensors) or _is_random(func):
            return None

        def named(value: Any) -> str:
            if isinstance(value, Tensor):
                return f"{value.data_ptr()} {tuple(value.shape)} {value.stride()} {value.dtype}"
            return repr(value)

        return func, tuple(named(leaf) for leaf in tree_leaves((args, kwargs))), len(args), tuple(kwargs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_small(tensors: Sequence[Any]) -> bool:
    return all(isinstance(t, Tensor) and t.numel() * t.dtype.itemsize <= SMALL for t in tensors)


def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _depends_on_values(func: Any, tensors: Sequence[Tensor]) -> bool:
    """True if the result's shape depends on values; an index has such a shape only where it is a mask."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    masks = any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
    return masks or func._schema.name != "aten::index"


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that an operation writes into."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    names = [
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info and argument.alias_info.is_write
    ]
    return [leaf for name in names for leaf in tree_leaves(named.get(name)) if isinstance(leaf, Tensor)]


class CpuGraph:
    """A captured step, for replays; consecutive launches become one sequence.

    Attributes:
        work: torch's operations (functions with a name) and kernel launches, in order.
    """

    def __init__(self, capture: _Capture) -> None:
        from bidm_cli.packed.cpu.runtime.sequence import KernelSequence

        self.work, self._kept = capture.work, capture.kept
        self._pieces: list[Callable[[], None]] = []
        for launched, group in itertools.groupby(self.work, lambda work: isinstance(work, tuple)):
            works = list(group)
            self._pieces += [KernelSequence(works).run] if launched else works

    def replay(self) -> None:
        """Run the step again, on the same tensors."""
        with torch.no_grad():
            for piece in self._pieces:
                piece()

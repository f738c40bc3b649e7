"""CPU graph: a network's step captured once and replayed, as CUDA graphs do it on a GPU.

    recorded = CpuRecorder()(step, inputs)      # runs the step and captures what it does
    recorded.replay()                           # does it again, into recorded.output

At small batches Python, and waking threads up for each layer, takes as long as the layers themselves.
Kernels become items of programs (:mod:`bidm_cli.packed.cpu.runtime.sequence_kernel`); what torch computes
between them is called again as it was. What does not depend on the inputs is not computed again, and what is
computed twice from the same small tensors only once (the SiLU of the time embedding, in every block).
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

from bidm_cli.packed.recording.arena import Arena
from bidm_cli.packed.recording.recorder import Recorded

SMALL = 1 << 16
"""Most bytes of a tensor that is kept so as not to be computed twice."""

_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")
_FILLED = (
    "zeros",
    "zeros_like",
    "new_zeros",
    "ones",
    "ones_like",
    "new_ones",
    "full",
    "full_like",
    "new_full",
)


class CpuRecorder:
    """Records steps; one for a model, as in a thread only one of its recordings runs at a time.

    Has the interface of :class:`bidm_cli.packed.recording.recorder.Recorder`.
    """

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
        if capture.problem:
            return Recorded(None, output, True, capture.problem)
        return Recorded(CpuGraph(capture).replay, output, True)


class _Capture(TorchDispatchMode):
    """Capture of a step: while open, ``work`` gets what is done, functions and launches of kernels.

    Attributes:
        problem: why what was done cannot be done again; empty if it can.
        kept: what has to live as long as the recording.
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
        """A hook of torch's: with True, the first recording would import its compiler (2 s, 150 MB)."""
        return False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Write down torch's operations and the kernels' launches."""
        # Here alone, so that the package can be imported without numba.
        from bidm_cli.packed.cpu.runtime.threads import Launched
        from bidm_cli.packed.cpu.runtime.threads import capturing as listening

        def note(launched: Launched) -> None:
            self.work.append(launched)
            self.kept.append(launched.owner)

        with listening(note), torch.no_grad(), self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.problem:
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in _EMPTY:
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
        if not self._changes(tensors) and name not in _FILLED and not _is_random(func):
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
        # Memory that nobody touches costs nothing; a meta tensor would make torch import its compiler.
        example = func(*args, **kwargs)
        return self._arena.tensor(example.shape, example.stride(), example.dtype)

    def _changed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation that writes into a tensor it is given."""
        written = _written(func, args, kwargs)
        if any(_storage(tensor) in self._fixed for tensor in written):
            self.problem = f"{func._schema.name} changes a constant"
        # What was computed from the tensor before is another number now.
        self._known.clear()
        self._note(func, args, kwargs, lambda result: None)
        return func(*args, **kwargs)

    def _computed(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Move a result to a place that stays, and note how it comes there again."""

        def moved(value: Tensor) -> Tensor:
            return self._arena.tensor(value.shape, _dense_strides(value), value.dtype).copy_(value)

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
        """Arguments for a replay: they keep constants alive, but no places of the arena."""

        def argument(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return self._arena.alias(value) if self._arena.owns(value) else value

        return tree_map(argument, arguments)

    def _changes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any of these is another in each step."""
        return any(self._arena.owns(t) or _storage(t) in self._inputs for t in tensors)

    def _key(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        """What tells apart computations on small tensors; None if this one may not be left out."""
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
    """Whether the result's shape does. An index has such a shape only where it is a mask."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    masks = any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
    return masks or func._schema.name != "aten::index"


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes into."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    names = [
        argument.name
        for argument in func._schema.arguments
        if argument.alias_info and argument.alias_info.is_write
    ]
    return [leaf for name in names for leaf in tree_leaves(named.get(name)) if isinstance(leaf, Tensor)]


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's own strides if its numbers lie without gaps in some order, else a contiguous one's."""
    return torch.empty_like(tensor).stride()


class CpuGraph:
    """A captured step, to be replayed; launches that follow each other become one program."""

    def __init__(self, capture: _Capture) -> None:
        from bidm_cli.packed.cpu.runtime.sequence import KernelSequence

        self._work, self._kept = capture.work, capture.kept
        self._pieces: list[Callable[[], None]] = []
        for launched, group in itertools.groupby(self._work, lambda work: isinstance(work, tuple)):
            works = list(group)
            self._pieces += [KernelSequence(works).run] if launched else works

    def replay(self) -> None:
        """Do everything again, on the same tensors."""
        with torch.no_grad():
            for piece in self._pieces:
                piece()

    def pieces(self) -> list[tuple[str, Callable[[], None]]]:
        """Every operation and launch on its own, with a name, in order: for profiles."""
        from bidm_cli.packed.cpu.runtime.compile import kernel_name
        from bidm_cli.packed.cpu.runtime.sequence import KernelSequence

        found: list[tuple[str, Callable[[], None]]] = []
        for work in self._work:
            launched = isinstance(work, tuple)
            found.append(
                (kernel_name(work.kernel), KernelSequence([work]).run) if launched else (work.__name__, work)
            )
        return found

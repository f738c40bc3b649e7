"""A network's step as a CUDA graph: at small batches a GPU waits for launches more than it computes.

    denoise, = denoisers_of(model)                       # recorded where the cupy backend runs
    output = denoise(x, t, context, y, memory)           # as model.denoise, again and again

The first call with inputs of some shape records the step, with tensors of its own for everything that goes in
and out; later calls copy their inputs there and replay. The features that cross-timestep connections carry
stay in such tensors too, for as long as one sampling follows another; where two alternate on one denoiser,
they are copied out and in. The two passes of classifier-free guidance have a denoiser each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bidm_cli.diffusion.model import DiffusionModel, Memory

Inputs = dict[str, Tensor]
Denoiser = Callable[..., Tensor]
"""Called as :meth:`bidm_cli.diffusion.model.DiffusionModel.denoise`."""


class CannotRecord(Exception):
    """Something in a step cannot be part of a CUDA graph."""


class Recorder(Protocol):
    """Records what a function launches; a parameter so that the bookkeeping can be tested without a GPU."""

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(replay, result): replay computes ``run`` anew into the memory of result, from the same tensors.

        Raises:
            CannotRecord: see there.
        """


@dataclass
class _Shape:
    """What belongs to inputs of one shape.

    Attributes:
        inputs: the tensors that recordings read. carries: whether connections carry features.
        features: the tensors in which these stay. owner: the memory that was given them last.
        recordings: by whether there is a step before.
    """

    inputs: Inputs
    carries: bool
    features: Memory = field(default_factory=dict)
    owner: Memory | None = None
    recordings: dict[bool, tuple[Callable[[], None], Tensor]] = field(default_factory=dict)


class GraphedDenoiser:
    """:meth:`bidm_cli.diffusion.model.DiffusionModel.denoise`, replayed.

    The model must stay as it is: what is recorded holds addresses of its weights. One thread at a time. Where
    a step cannot be recorded, a warning says so once and the model is called instead.
    """

    def __init__(self, model: DiffusionModel, record: Recorder | None = None) -> None:
        self.model = model
        self._record = record or CudaRecorder(model.device)
        self._shapes: dict[Any, _Shape] = {}
        self._plain = False

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        memory: Memory | None = None,
        x_self: Tensor | None = None,
    ) -> Tensor:
        given = {"x": x, "t": t, "context": context, "y": y, "x_self": x_self}
        inputs = {name: value for name, value in given.items() if value is not None}
        carries = memory is not None and getattr(self.model.unet, "connections", None) is not None
        if not self._plain:
            try:
                return self._recorded(inputs, memory if carries else None)
            except CannotRecord as error:
                self._give_up(error)
        return self.model.denoise(**inputs, memory=memory)

    def _recorded(self, inputs: Inputs, memory: Memory | None) -> Tensor:
        shape = self._shape(inputs, memory is not None)
        for name, value in inputs.items():
            shape.inputs[name].copy_(value)
        if memory is None:
            return self._replay(shape, False)
        later = bool(memory)
        self._take_over(shape, memory)
        output = self._replay(shape, later)
        memory.update(shape.features)
        return output

    def _give_up(self, error: CannotRecord) -> None:
        self._plain = True
        self._shapes.clear()
        warnings.warn(
            f"the network's step cannot be recorded as a CUDA graph ({error}); it runs without, "
            "which is slower at small batches",
            RuntimeWarning,
            stacklevel=2,
        )

    def _shape(self, inputs: Inputs, carries: bool) -> _Shape:
        key = (carries, *((name, value.shape, value.dtype) for name, value in inputs.items()))
        if key not in self._shapes:
            device = self.model.device
            own = {name: torch.empty_like(value, device=device) for name, value in inputs.items()}
            self._shapes[key] = _Shape(own, carries)
        return self._shapes[key]

    @staticmethod
    def _take_over(shape: _Shape, memory: Memory) -> None:
        """Make ``shape.features`` the features of ``memory``; whoever had them there before gets a copy."""
        if memory is not shape.owner and shape.owner is not None:
            for name, value in shape.features.items():
                if shape.owner.get(name) is value:
                    shape.owner[name] = value.clone()
        for name, value in memory.items():
            if value is shape.features.get(name):
                continue
            if name in shape.features:
                shape.features[name].copy_(value)
            else:
                shape.features[name] = value.clone()
        shape.owner = memory

    def _replay(self, shape: _Shape, later: bool) -> Tensor:
        if later not in shape.recordings:
            shape.recordings[later] = self._recording(shape, later)
        replay, output = shape.recordings[later]
        replay()
        return output.clone()

    def _recording(self, shape: _Shape, later: bool) -> tuple[Callable[[], None], Tensor]:
        def step() -> Tensor:
            memory = dict(shape.features) if later else {}
            output = self.model.denoise(**shape.inputs, memory=memory if shape.carries else None)
            for name, value in memory.items():
                if name not in shape.features:
                    shape.features[name] = torch.empty_like(value)
                shape.features[name].copy_(value)
            return output

        # Recording runs the step, which renews the features.
        before = {name: value.clone() for name, value in shape.features.items()}
        try:
            return self._record(step)
        finally:
            for name, value in before.items():
                shape.features[name].copy_(value)


def is_recordable(model: DiffusionModel) -> bool:
    """Whether the model's steps are recorded: those of packed files on the cupy backend."""
    return model.device.type == "cuda" and getattr(model, "backend", None) == "cupy"


def denoisers_of(model: DiffusionModel, passes: int = 1) -> list[Denoiser]:
    """What a sampler calls for each of ``passes`` passes through the network.

    On the cupy backend these are recorded steps, which the model keeps for the next sampling; elsewhere
    ``model.denoise``.
    """
    if not is_recordable(model):
        return [model.denoise] * passes
    kept: list[Denoiser] = model.recorded  # type: ignore[attr-defined]
    record = CudaRecorder(model.device)
    kept += [GraphedDenoiser(model, record) for _ in range(passes - len(kept))]
    return kept[:passes]


class CudaRecorder:
    """Records with torch.cuda.CUDAGraph; all recordings share one pool, as only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        # torch.cuda works on the current device, which need not be the model's.
        with torch.cuda.device(self.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            # Before it is recorded a step has to have run: kernels are compiled and loaded, tables are made.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=side):
                    output = run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise CannotRecord((str(error).splitlines() or [type(error).__name__])[0]) from error
        return graph.replay, output

"""A network's step, recorded once and replayed: no Python, and no waiting, between its layers.

    denoise, = denoisers_of(model)                       # recorded on the cupy and numba backends
    output = denoise(x, t, context, y, carried)          # as model.denoise, again and again

A call with inputs of a new shape records the step, with tensors of its own for everything that goes in and
out; later calls copy their inputs there and replay. The features that cross-timestep connections carry stay
in such tensors too, for as long as one sampling follows another; where two alternate on one denoiser, they
are copied out and in. The two passes of classifier-free guidance have a denoiser each.

What a recording is depends on the device: :mod:`bidm_cli.packed.recording.cuda_graph` or
:mod:`bidm_cli.packed.recording.cpu_graph`.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bidm_cli.diffusion.model import CarriedFeatures, DiffusionModel
from bidm_cli.packed.recording.recorder import CannotRecord, Recorded, Recorder

Inputs = dict[str, Tensor]
Denoiser = Callable[..., Tensor]
"""Called as :meth:`bidm_cli.diffusion.model.DiffusionModel.denoise`."""


@dataclass
class _Shape:
    """What belongs to inputs of one shape.

    Attributes:
        inputs: the tensors that recordings read. carries: whether connections carry features.
        features: the tensors in which these stay. owner: the memory that was given them last.
        recordings: by whether there is a step before. known: which of the two have run.
    """

    inputs: Inputs
    carries: bool
    features: CarriedFeatures = field(default_factory=dict)
    owner: CarriedFeatures | None = None
    recordings: dict[bool, Recorded] = field(default_factory=dict)
    known: set[bool] = field(default_factory=set)


class RecordedDenoiser:
    """:meth:`bidm_cli.diffusion.model.DiffusionModel.denoise`, replayed.

    The model must stay as it is: what is recorded holds addresses of its weights. Where a step cannot be
    recorded, a warning says so once and the model is called instead.
    """

    def __init__(self, model: DiffusionModel, record: Recorder) -> None:
        self.model = model
        self.recorder = record
        self._shapes: dict[Any, _Shape] = {}
        self._plain = False

    @torch.inference_mode(False)  # tensors made in that mode could not be changed outside of it
    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        carried: CarriedFeatures | None = None,
        x_self: Tensor | None = None,
    ) -> Tensor:
        given = {"x": x, "t": t, "context": context, "y": y, "x_self": x_self}
        inputs = {name: value for name, value in given.items() if value is not None}
        carries = carried is not None and getattr(self.model.unet, "connections", None) is not None
        if not self._plain:
            try:
                return self._recorded(inputs, carried if carries else None)
            except CannotRecord as error:
                self._give_up(str(error))
        return self.model.denoise(**inputs, carried=carried)

    def _recorded(self, inputs: Inputs, carried: CarriedFeatures | None) -> Tensor:
        shape = self._shape(inputs, carried is not None)
        for name, value in inputs.items():
            shape.inputs[name].copy_(value)
        if carried is None:
            return self._step(shape, False)
        later = bool(carried)
        self._take_over(shape, carried)
        output = self._step(shape, later)
        carried.update(shape.features)
        return output

    def _give_up(self, reason: str) -> None:
        self._plain = True
        self._shapes.clear()
        warnings.warn(
            f"the network's step cannot be recorded as {self.recorder.what} ({reason}); it runs without, "
            "which is slower at small batches",
            RuntimeWarning,
            stacklevel=2,
        )

    def _shape(self, inputs: Inputs, carries: bool) -> _Shape:
        # Workspaces of kernels on a CPU belong to a thread, and are made for a number of threads.
        place = threading.get_ident(), torch.get_num_threads()
        key = (place, carries, *((name, value.shape, value.dtype) for name, value in inputs.items()))
        if key not in self._shapes:
            device = self.model.device
            own = {name: torch.empty_like(value, device=device) for name, value in inputs.items()}
            self._shapes[key] = _Shape(own, carries)
        return self._shapes[key]

    @staticmethod
    def _take_over(shape: _Shape, memory: CarriedFeatures) -> None:
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

    def _step(self, shape: _Shape, later: bool) -> Tensor:
        """The step on ``shape.inputs``: replayed, or recorded, or run once before that."""
        recorded = shape.recordings.get(later)
        if recorded is None:
            if self.recorder.runs_first and later not in shape.known:
                shape.known.add(later)
                return self._run(shape, later)
            recorded = shape.recordings[later] = self._recording(shape, later)
            if recorded.replay is None:
                self._give_up(recorded.problem)
            if recorded.ran:
                return recorded.output.clone()
        assert recorded.replay is not None
        recorded.replay()
        return recorded.output.clone()

    def _run(self, shape: _Shape, later: bool) -> Tensor:
        memory = dict(shape.features) if later else {}
        output = self.model.denoise(**shape.inputs, carried=memory if shape.carries else None)
        for name, value in memory.items():
            if name not in shape.features:
                shape.features[name] = torch.empty_like(value)
            if value is not shape.features[name]:
                shape.features[name].copy_(value)
        return output

    def _recording(self, shape: _Shape, later: bool) -> Recorded:
        # Where recording runs the step without its inputs, the features are renewed in vain.
        before = {} if self.recorder.runs_first else {k: v.clone() for k, v in shape.features.items()}
        recorded = None
        try:
            tensors = [*shape.inputs.values(), *shape.features.values()]
            recorded = self.recorder(lambda: self._run(shape, later), tensors)
        finally:
            if recorded is None or not recorded.ran:
                for name, value in before.items():
                    shape.features[name].copy_(value)
        return recorded


def recorder_for(model: DiffusionModel) -> Recorder | None:
    """The recorder of a packed model on a backend that can be recorded; else None."""
    backend = getattr(model, "backend", None)
    if model.device.type == "cuda" and backend == "cupy":
        from bidm_cli.packed.recording.cuda_graph import CudaRecorder

        return CudaRecorder(model.device)
    if model.device.type == "cpu" and backend == "numba":
        from bidm_cli.packed.recording.cpu_graph import CpuRecorder

        return CpuRecorder()
    return None


def denoisers_of(model: DiffusionModel, passes: int = 1) -> list[Denoiser]:
    """The denoisers that a sampler calls, one for each of ``passes`` passes through the network.

    Where the model's steps can be recorded these are :class:`RecordedDenoiser`, which the model keeps for the
    next sampling; elsewhere ``model.denoise``.
    """
    recorder = recorder_for(model)
    kept: list[RecordedDenoiser] | None = getattr(model, "recorded", None)
    if recorder is None or kept is None:
        return [model.denoise] * passes
    if kept:
        recorder = kept[0].recorder
    kept += [RecordedDenoiser(model, recorder) for _ in range(passes - len(kept))]
    return list(kept[:passes])

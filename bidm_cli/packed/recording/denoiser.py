"""Denoiser whose steps are captured once and replayed: no Python, and no waiting, between its layers.

    denoise, = denoisers_of(model)                       # captures on the cupy and numba backends
    output = denoise(x, t, context, y, carried)          # as model.denoise, again and again

A call with inputs of a new shape captures the step, with tensors of its own for inputs and outputs; later
calls copy their inputs there and replay. Carried features stay in such tensors, too, while one sampling
follows another; where two alternate on one denoiser, they are copied out and in. Each pass of classifier-free
guidance has a denoiser. Captures are :mod:`bidm_cli.packed.recording.cuda_graph` or
:mod:`bidm_cli.packed.recording.cpu_graph`, by the device.
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
    """Captured steps for inputs of one shape.

    Attributes:
        inputs: the tensors that the steps read. carries: whether connections carry features.
        features: the tensors of carried features. owner: the dictionary whose features they hold.
        recordings: by whether there is a step before; None if the step has run once, without a capture.
    """

    inputs: Inputs
    carries: bool
    features: CarriedFeatures = field(default_factory=dict)
    owner: CarriedFeatures | None = None
    recordings: dict[bool, Recorded | None] = field(default_factory=dict)

    def take_over(self, carried: CarriedFeatures) -> None:
        """Copy ``carried`` into ``features`` and make it the owner; the one before gets copies to keep."""
        if self.owner is not None and self.owner is not carried:
            for name, value in self.features.items():
                if self.owner.get(name) is value:
                    self.owner[name] = value.clone()
        self.store(carried)
        self.owner = carried

    def store(self, carried: CarriedFeatures) -> None:
        """Copy carried features into ``features``."""
        for name, value in carried.items():
            if name not in self.features:
                self.features[name] = torch.empty_like(value)
            if value is not self.features[name]:
                self.features[name].copy_(value)


class RecordedDenoiser:
    """:meth:`bidm_cli.diffusion.model.DiffusionModel.denoise`, replayed.

    The model must stay as it is: captured steps hold addresses of its weights. Where a step cannot be
    captured, a warning says so once and the model is called instead.
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
        optional = {"context": context, "y": y, "x_self": x_self}
        inputs = {"x": x, "t": t} | {name: value for name, value in optional.items() if value is not None}
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
        shape.take_over(carried)
        output = self._step(shape, bool(carried))
        carried.update(shape.features)
        return output

    def _give_up(self, reason: str) -> None:
        self._plain = True
        self._shapes.clear()
        warnings.warn(
            f"the network's step cannot be captured as {self.recorder.what} ({reason}); it runs without, "
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

    def _step(self, shape: _Shape, later: bool) -> Tensor:
        """The step on ``shape.inputs``: replayed, or captured, or run once before that."""
        recorded = shape.recordings.get(later)
        if recorded is None:
            if self.recorder.runs_first and later not in shape.recordings:
                shape.recordings[later] = None
                return self._run(shape, later)
            recorded = shape.recordings[later] = self._capture(shape, later)
            if recorded.replay is None:
                self._give_up(recorded.problem)
            if self.recorder.runs_first:
                return recorded.output.clone()
        assert recorded.replay is not None
        recorded.replay()
        return recorded.output.clone()

    def _run(self, shape: _Shape, later: bool) -> Tensor:
        carried = dict(shape.features) if later else {}
        output = self.model.denoise(**shape.inputs, carried=carried if shape.carries else None)
        shape.store(carried)
        return output

    def _capture(self, shape: _Shape, later: bool) -> Recorded:
        # Where the capture runs the step without its inputs, the features are restored after it.
        before = {} if self.recorder.runs_first else {k: v.clone() for k, v in shape.features.items()}
        try:
            tensors = [*shape.inputs.values(), *shape.features.values()]
            return self.recorder(lambda: self._run(shape, later), tensors)
        finally:
            for name, value in before.items():
                shape.features[name].copy_(value)


def recorder_for(model: DiffusionModel) -> Recorder | None:
    """The recorder for a packed model's backend and device; None if there is none."""
    backend = getattr(model, "backend", None)
    if model.device.type == "cuda" and backend == "cupy":
        from bidm_cli.packed.recording.cuda_graph import CudaRecorder

        return CudaRecorder(model.device)
    if model.device.type == "cpu" and backend == "numba":
        from bidm_cli.packed.recording.cpu_graph import CpuRecorder

        return CpuRecorder()
    return None


def denoisers_of(model: DiffusionModel, passes: int = 1) -> list[Denoiser]:
    """Denoisers for a sampler, one for each of ``passes`` passes through the network.

    :class:`RecordedDenoiser`, which the model keeps for the next sampling, where its steps can be captured;
    elsewhere ``model.denoise``.
    """
    recorder = recorder_for(model)
    kept: list[RecordedDenoiser] | None = getattr(model, "recorded", None)
    if recorder is None or kept is None:
        return [model.denoise] * passes
    if kept:
        recorder = kept[0].recorder
    kept += [RecordedDenoiser(model, recorder) for _ in range(passes - len(kept))]
    return list(kept[:passes])

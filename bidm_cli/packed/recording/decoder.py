"""Decoder whose work is captured once and replayed, as :mod:`.denoiser` does with steps.

    decode = decoder_of(model)
    images = decode(z)                  # as model.decode(z), again and again

Besides Python's time this saves getting large tensors from the system anew for each picture.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.packed.recording.arena import trim_heap
from bidm_cli.packed.recording.denoiser import recorder_for
from bidm_cli.packed.recording.recorder import CannotRecord, Recorded, Recorder

MOST = 8
"""Captures that a decoder keeps, by thread and shape; each has the memory of a whole decoding."""


class RecordedDecoder:
    """``model.decode``: captured, and then replayed.

    The model must stay as it is: captures hold addresses of its weights. What cannot be captured is called.
    The capture unused for the longest time goes when there are more than :data:`MOST`.
    """

    def __init__(self, model: DiffusionModel, recorder: Recorder) -> None:
        self.model, self.recorder = model, recorder
        self._known: dict[Any, tuple[Tensor, Recorded | None]] = {}

    @torch.inference_mode(False)  # tensors made in that mode could not be changed outside of it
    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Images of latents z, as :meth:`DiffusionModel.decode`."""
        # Workspaces of kernels on a CPU belong to a thread, and are made for a number of threads.
        key = (threading.get_ident(), torch.get_num_threads(), z.shape, z.dtype)
        if key not in self._known:
            # The layers make their workspaces, which must not lie in the memory of a capture.
            trim_heap()
            self._known[key] = z.clone(), None
            if len(self._known) > MOST:
                del self._known[next(iter(self._known))]
            return self.model.decode(z)
        own, recorded = self._known[key] = self._known.pop(key)
        own.copy_(z)
        if recorded is None:
            recorded = self._capture(own)
            self._known[key] = own, recorded
            return recorded.output.clone()
        if recorded.replay is None:
            return self.model.decode(z)
        recorded.replay()
        return recorded.output.clone()

    def _capture(self, own: Tensor) -> Recorded:
        try:
            return self.recorder(lambda: self.model.decode(own), [own])
        except CannotRecord:
            return Recorded(None, self.model.decode(own))


def decoder_of(model: DiffusionModel) -> Callable[[Tensor], Tensor]:
    """``model.decode``; as a :class:`RecordedDecoder`, which the model keeps, on the numba backend."""
    recorder = None if model.first_stage is None else recorder_for(model)
    if recorder is None or not recorder.runs_first:
        return model.decode
    kept: Any = model
    if kept.recorded_decoder is None:
        # The steps' recorder, if there is one: they run at other times, and share its memory.
        recorder = kept.recorded[0].recorder if kept.recorded else recorder
        kept.recorded_decoder = RecordedDecoder(model, recorder)
    return kept.recorded_decoder  # type: ignore[no-any-return]

"""Packed model: a network on bits with everything needed to sample from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.packed.backend import Backend
from bidm_cli.packed.choose import choose_backend
from bidm_cli.packed.format.layer_table import LayerRecord
from bidm_cli.packed.layers import RunsOnBackend

if TYPE_CHECKING:
    from bidm_cli.packed.diffusers import DiffusersUNetAdapter


@dataclass
class PackedModel(DiffusionModel):
    """A packed file as a :class:`DiffusionModel` that runs on one backend.

    Attributes:
        recipe: the resolved recipe. layers: the layer table.
        provenance: source file, its SHA-256, steps, seed, versions. training: losses and errors.
        connections: where cross-timestep connections are, or None.
        caveats: what was assumed about the original, as records "kind", "text"
            (:func:`bidm_cli.checkpoints.evidence.caveats_of`).
        stage_form: the first stage's "keep", "weights" and "errors", and "layers" of a binary decoder;
            None where it is whole, in floats.
        requested_backend: as ``backend`` takes it; ``bound_backend`` is the one for the model's device.
        recorded: captured steps (:func:`bidm_cli.packed.recording.denoiser.denoisers_of`); they hold
            addresses of this model's tensors.
        recorded_decoder: the same for the first stage (:func:`bidm_cli.packed.recording.decoder.decoder_of`).
    """

    path: Path = Path()
    recipe: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    connections: dict[str, Any] | None = None
    caveats: list[dict[str, str]] = field(default_factory=list)
    stage_form: dict[str, Any] | None = None
    requested_backend: str = "auto"
    bound_backend: Backend = field(init=False, repr=False, compare=False)
    recorded: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)
    recorded_decoder: Any = field(default=None, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Copies capture their own steps."""
        return {**self.__dict__, "recorded": [], "recorded_decoder": None}

    @property
    def backend(self) -> str:
        """Name of the backend in use: "torch", "numba" or "cupy"."""
        return self.bound_backend.name

    def to(self, device: str | torch.device) -> PackedModel:
        """Move network, first stage and conditioner; returns self.

        Raises:
            BidmError: the requested backend cannot run there.
        """
        backend = choose_backend(self.requested_backend, torch.device(device).type)
        super().to(device)
        self._bind(backend)
        return self

    def denoise(self, *arguments: Any, **named: Any) -> Tensor:
        """See :meth:`DiffusionModel.denoise`."""
        with _without_tf32(self.device):
            return super().denoise(*arguments, **named)

    def decode(self, z: Tensor) -> Tensor:
        """See :meth:`DiffusionModel.decode`."""
        with _without_tf32(self.device):
            return super().decode(z)

    def warm_up(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Compile this model's kernels now rather than in the first step: some seconds, once per machine.

        ``say`` is called with the pieces of a line about it, only if something is compiled.
        """
        warm_up = getattr(self.bound_backend, "warm_up", None)
        if warm_up is not None:
            parts = [part for part in (self.unet, self.first_stage) if part is not None]
            modules = (module for part in parts for module in part.modules())
            warm_up({use for m in modules if isinstance(m, RunsOnBackend) for use in m.uses()}, say)

    def as_diffusers(self, connections: Literal["carried", "off"] = "carried") -> DiffusersUNetAdapter:
        """Wrap the network as the ``unet`` of a diffusers pipeline (:mod:`bidm_cli.packed.diffusers`).

        Raises:
            BidmError: the model is not of the diffusers family.
        """
        from bidm_cli.packed.diffusers import DiffusersUNetAdapter

        return DiffusersUNetAdapter(self, connections)

    def _bind(self, backend: Backend) -> None:
        """Bind network and binary decoder to a backend."""
        self.recorded.clear()
        self.recorded_decoder = None
        self.bound_backend = backend
        bind_modules(self.unet, backend)
        if self.first_stage is not None and has_packed_layers(self.first_stage):
            bind_modules(self.first_stage, backend)


def has_packed_layers(network: nn.Module) -> bool:
    """True if any module of a network runs on a backend."""
    return any(isinstance(module, RunsOnBackend) for module in network.modules())


def bind_modules(network: nn.Module, backend: Backend) -> None:
    """Bind all modules of a network to a backend, and lay out float convolutions as its layers do."""
    layout = torch.channels_last if backend.channels_last else torch.contiguous_format
    for module in network.modules():
        if isinstance(module, RunsOnBackend):
            module.bind(backend)
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=layout)


@contextlib.contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """Keep all bits of float32 in a GPU's float convolutions: torch lets cuDNN drop 13, and signs flip."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before

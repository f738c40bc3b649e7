"""What the rest of bidm works with: network, schedule and first stage, whatever file they came from.

An original checkpoint (:class:`bidm_cli.checkpoints.checkpoint.Checkpoint`) and a packed file
(:class:`bidm_cli.packed.load.PackedModel`) are both a :class:`DiffusionModel`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

Memory = dict[str, Tensor]
"""Features of the previous sampler step by block name; a network with connections reads and renews them."""


@dataclass
class DiffusionModel:
    """A denoising network with everything needed to sample from it.

    Attributes:
        family: "ldm", "ddpm", ...
        unet: the denoising network, eval mode.
        sample_shape: (C, H, W) of what the network denoises.
        architecture: JSON: ``{"unet": {"kind", "args"}, "first_stage": ... or None, "conditioner": ... or
            None}``, each as :func:`bidm_cli.networks.registry.build` takes it.
        prediction: what the network's output means.
        first_stage: latents to images and back; None for pixel models.
        scale_factor: latents are multiplied by it for the network (encode) and divided by it (decode).
        conditioner: labels [N] to context [N, L, D]; None when labels go to the network as ``y``, or not at
            all.
        null_label: the label that stands for "no class" in classifier-free guidance; None if there is none.
        num_classes: number of labels, the null label included; None if unconditional.
        time_scale: the network sees t * time_scale (OpenAI's rescaled timesteps).
    """

    family: str
    unet: nn.Module
    sample_shape: tuple[int, int, int]
    schedule: NoiseSchedule
    convention: SamplingConvention
    architecture: dict[str, Any]
    prediction: Literal["epsilon", "x0", "v"] = "epsilon"
    first_stage: nn.Module | None = None
    scale_factor: float = 1.0
    conditioner: nn.Module | None = None
    null_label: int | None = None
    num_classes: int | None = None
    time_scale: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)

    def denoise(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        memory: Memory | None = None,
        x_self: Tensor | None = None,
    ) -> Tensor:
        """Raw network output for x [N, C, H, W] at t [N] (indices into the schedule).

        ``memory`` holds the previous step's features of a network with cross-timestep connections. It is
        renewed in place; an empty dict means the first step. Networks without connections ignore it.
        ``x_self`` is the x0 of the previous step, for self-conditioned networks alone.
        """
        given = {} if x_self is None else {"x_self": x_self}
        connections = getattr(self.unet, "connections", None)
        if connections is None or memory is None:
            return self.unet(x, self.network_time(t), context, y, **given)
        with connections.carrying(t, memory):
            return self.unet(x, self.network_time(t), context, y, **given)

    def network_time(self, t: Tensor) -> Tensor:
        """Schedule indices t [N] in the unit that the network was trained with."""
        return t if self.time_scale == 1.0 else t.float() * self.time_scale

    def condition(self, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(context, y) for class labels [N]; (None, None) for an unconditional model.

        Raises:
            BidmError: labels for a model without classes, out of range, or missing where they are needed.
        """
        if self.num_classes is None:
            if labels is not None:
                raise BidmError("this model has no classes; leave out --label")
            return None, None
        if labels is None:
            raise BidmError(
                f"this model is class-conditional; give --label, a number from 0 to {self.num_classes - 1}"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            raise BidmError(f"labels run from 0 to {self.num_classes - 1}, not {labels.unique().tolist()}")
        labels = labels.to(self.device)
        return (None, labels) if self.conditioner is None else (self.conditioner(labels), None)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents [N, C, H, W] to images [N, 3, H', W'] in about [-1, 1]; identity for pixel models."""
        return z if self.first_stage is None else self.first_stage.decode(z / self.scale_factor)  # type: ignore[operator]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to latents; identity for pixel models."""
        if self.first_stage is None:
            return images
        return self.first_stage.encode(images) * self.scale_factor  # type: ignore[operator]

    @property
    def device(self) -> torch.device:
        """Where the network's tensors are."""
        for tensor in (*self.unet.parameters(), *self.unet.buffers()):
            return tensor.device
        return torch.device("cpu")

    def to(self, device: str | torch.device) -> DiffusionModel:
        """Move network, first stage and conditioner; returns self."""
        for part in (self.unet, self.first_stage, self.conditioner):
            if part is not None:
                part.to(device)
        return self

    def requires_label(self) -> bool:
        """Whether sampling needs labels."""
        return self.num_classes is not None

    def metadata(self) -> dict[str, Any]:
        """Everything but weights, as JSON; a packed file carries it."""
        return {
            "family": self.family,
            "architecture": self.architecture,
            "sample_shape": list(self.sample_shape),
            "schedule": self.schedule.description,
            "convention": self.convention.to_json(),
            "prediction": self.prediction,
            "scale_factor": self.scale_factor,
            "null_label": self.null_label,
            "num_classes": self.num_classes,
            "time_scale": self.time_scale,
        }

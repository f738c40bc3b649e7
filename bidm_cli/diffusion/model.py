"""Diffusion model: network, schedule and first stage, whatever file they came from.

An original checkpoint (:class:`bidm_cli.checkpoints.checkpoint.Checkpoint`) and a packed file
(:class:`bidm_cli.packed.model.PackedModel`) are both a :class:`DiffusionModel`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from bidm_cli.diffusion.augmentation import NoiseAugmentation
from bidm_cli.diffusion.condition import Condition, check_concat, check_context, shape_text
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.networks.layers import DenoisingNetwork, NetworkInputs
from bidm_cli.transfer import to_device

Model = TypeVar("Model", bound="DiffusionModel")

TOKENS = 77
"""Length of CLIP's and LDM's text embeddings, where the network does not say another."""
CarriedFeatures = dict[str, Tensor]
"""Features of the previous sampler step (h_prev) by block name; connections blend them in and renew them."""


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
        first_stage: latents to images and back; None for pixel models, and where it is not at hand.
        latent: what is denoised are latents, though there may be no first stage (see :attr:`is_latent`).
        scale_factor: latents are multiplied by it for the network (encode) and divided by it (decode).
        conditioner: labels [N] to context [N, L, D], or segmentation maps to conditioning channels; None
            when labels go to the network as ``y``, or not at all.
        augmentation: noise put on conditioning images, at the level that the label says; None for most.
        null_context: [1, L, D], what an empty prompt is embedded as, for classifier-free guidance.
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
    null_context: Tensor | None = None
    augmentation: NoiseAugmentation | None = None
    latent: bool = False

    def denoise(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        y: Tensor | None = None,
        carried: CarriedFeatures | None = None,
        x_self: Tensor | None = None,
        fresh: Tensor | None = None,
    ) -> Tensor:
        """Raw network output for x [N, C, H, W] at t [N] (indices into the schedule).

        Args:
            x: conditioning channels, if the network takes any, come after its own (:meth:`Condition.join`).
            carried: features of the previous step, for cross-timestep connections; renewed in place, empty
                at the first step. Networks without connections ignore it.
            x_self: x0 of the previous step, for self-conditioned networks alone.
            fresh: rows without a previous step, bool [N], for training.
        """
        if x.shape[1] == self.sample_shape[0]:
            check_concat(None, self.concat_channels, self.sample_shape[1:])
        more = {} if x_self is None else {"x_self": x_self}
        connections = getattr(self.unet, "connections", None)
        if connections is None or carried is None:
            return self.unet(x, self.network_time(t), context, y, **more)
        with connections.carrying(t, carried, fresh):
            return self.unet(x, self.network_time(t), context, y, **more)

    def network_time(self, t: Tensor) -> Tensor:
        """Schedule indices t [N] in the unit that the network was trained with."""
        return t if self.time_scale == 1.0 else t.float() * self.time_scale

    def embed_labels(self, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(context, y) for class labels [N]; (None, None) for an unconditional model.

        Raises:
            BidmError: labels for a model without classes, out of range, or missing where they are needed.
        """
        self._check_labels(labels)
        if labels is None:
            return None, None
        labels = to_device(labels, self.device)
        return (None, labels) if self.conditioner is None else (self.conditioner(labels), None)

    def _check_labels(self, labels: Tensor | None) -> None:
        if self.num_classes is None:
            if labels is not None:
                raise BidmError("this model has no classes; leave out `labels`")
            return
        if labels is None:
            what = "is class-conditional" if self.augmentation is None else "needs its noise's level"
            raise BidmError(f"this model {what}; give `labels`, a number from 0 to {self.num_classes - 1}")
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            raise BidmError(f"labels run from 0 to {self.num_classes - 1}, not {labels.unique().tolist()}")

    def check(self, labels: Tensor | None, others: Condition) -> None:
        """Raise BidmError unless labels [N] and ``others`` (context, concat) are what the network takes."""
        if self.vector_width is not None:
            raise BidmError(
                f"this network takes a vector [{self.vector_width}] besides its context (unCLIP's image "
                "embedding), which bidm can neither sample nor train with; Checkpoint.denoise takes it as y"
            )
        embeds, width = self.embeds_labels, self.context_width
        check_context(others.context, width, needed=width is not None and not embeds)
        check_concat(others.concat, self.concat_channels, self.sample_shape[1:])
        if others.context is None or not embeds:
            self._check_labels(labels)
        elif labels is not None:
            raise BidmError("this model's context is its class; give either `labels` or `context`")

    def make_condition(self, labels: Tensor | None = None, others: Condition | None = None) -> Condition:
        """Condition of a batch on the model's device: labels [N], context and channels from ``others``.

        Raises:
            BidmError: something that the network needs is missing, of the wrong shape, or not wanted.
        """
        others = others or Condition()
        self.check(labels, others)
        others = others.map(lambda values: to_device(values, self.device, torch.float32))
        if others.context is not None and self.embeds_labels:
            return others
        context, y = self.embed_labels(labels)
        if self.augmentation is not None and others.concat is not None and y is not None:
            others = replace(others, concat=self.augmentation.apply(others.concat, y))
        return replace(others, y=y, context=others.context if context is None else context)

    def unconditional(self, condition: Condition) -> Condition:
        """``condition`` with the null label or context, for classifier-free guidance; channels stay.

        Raises:
            BidmError: the model knows neither.
        """
        self.check_guidance()
        context, y = condition.context, condition.y
        if y is not None and self.null_label is not None:
            y = torch.full_like(y, self.null_label)
        if context is not None and self.null_context is not None:
            context = self.null_context.to(context).expand(len(context), -1, -1)
        elif context is not None and self.embeds_labels:
            labels = torch.full((len(context),), self.null_label or 0, device=context.device)
            context = self.embed_labels(labels)[0]
        return replace(condition, context=context, y=y)

    def check_guidance(self) -> None:
        """Raise BidmError unless the model knows what "no condition" is: a null label or a null context."""
        if self.null_label is not None or self.null_context is not None:
            return
        if self.context_width is not None and not self.embeds_labels:
            raise BidmError(
                "guidance needs what the model was trained on as no prompt (the empty prompt's embedding); "
                f"give it with `unconditional_context`, {shape_text(('L', self.context_width))}"
            )
        raise BidmError(
            "this model has no null label, so classifier-free guidance cannot be used; leave out `guidance`, "
            "or name the label with `settings` null_label=N if it was trained with one"
        )

    def with_null_context(self, context: Tensor) -> DiffusionModel:
        """The same model, sharing all networks, with this null context [L, D] or [1, L, D].

        Raises:
            BidmError: it is of another shape than the model's contexts.
        """
        context = context[None] if context.dim() == 2 else context
        if context.dim() == 3 and len(context) != 1:
            raise BidmError(
                f"the unconditional context is {shape_text(context.shape)}; it has to be one, "
                f"{shape_text(('L', self.context_width or 'D'))} (`unconditional_context`)"
            )
        check_context(context, self.context_width, needed=True)
        changed = copy.copy(self)
        changed.null_context = context.to(self.device, torch.float32)
        return changed

    def example(self, n: int, labels: Tensor | None = None) -> Condition:
        """A condition for ``n`` images where only shapes or speed matter.

        Class 0 unless ``labels`` [n] say otherwise; context (as long as the null context, or 77 tokens) and
        channels of standard normal noise from a fixed seed.
        """
        generator = torch.Generator().manual_seed(0)
        context, concat = None, None
        if self.context_width is not None and not self.embeds_labels:
            null = self.null_context
            length = (self.context_tokens or TOKENS) if null is None else null.shape[1]
            context = torch.randn(n, length, self.context_width, generator=generator)
        if self.concat_channels:
            concat = torch.randn(n, self.concat_channels, *self.sample_shape[1:], generator=generator)
        if labels is None and self.num_classes is not None:
            labels = torch.zeros(n, dtype=torch.long)
        return self.make_condition(labels, Condition(context=context, concat=concat))

    @property
    def embeds_labels(self) -> bool:
        """True if the context is made of class labels by the model's own conditioner."""
        return self.conditioner is not None and self.num_classes is not None

    @property
    def inputs(self) -> NetworkInputs:
        """Inputs that the network declares; those of an unconditional one for a plain ``nn.Module``."""
        return self.unet.inputs if isinstance(self.unet, DenoisingNetwork) else NetworkInputs()

    @property
    def context_width(self) -> int | None:
        """Width D of the context [N, L, D] that the network attends to; None if it attends to none."""
        return self.inputs.context_width

    @property
    def context_tokens(self) -> int | None:
        """Length L of every context, where the network takes no other (U-ViT); else None."""
        return self.inputs.context_tokens

    @property
    def vector_width(self) -> int | None:
        """Width of the vector that the network takes in place of a label; None for most."""
        return self.inputs.vector_width

    @property
    def concat_channels(self) -> int:
        """Conditioning channels that the network takes after those it denoises; 0 for most."""
        return max(0, (self.inputs.channels or 0) - self.sample_shape[0])

    @property
    def is_latent(self) -> bool:
        """True if the network denoises latents: by its first stage, its file or its channels.

        A stage that only changes the range of values leaves them pixels.
        """
        stage = self.architecture.get("first_stage") or {}
        has_stage = self.first_stage is not None and stage.get("kind") != "value_range"
        return self.latent or has_stage or self.sample_shape[0] not in (1, 3)

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
        """Device of the network's tensors."""
        first = next(itertools.chain(self.unet.parameters(), self.unet.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    def to(self, device: str | torch.device) -> DiffusionModel:
        """Move network, first stage and conditioner; returns self."""
        for part in (self.unet, self.first_stage, self.conditioner):
            if part is not None:
                part.to(device)
        if self.null_context is not None:
            self.null_context = self.null_context.to(device)
        return self

    @classmethod
    def from_metadata(cls: type[Model], metadata: Mapping[str, Any], unet: nn.Module, **more: Any) -> Model:
        """The model that :meth:`metadata` describes, with its networks and further fields given by name.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, BidmError: a description that makes no sense.
        """
        channels, height, width = (int(n) for n in metadata["sample_shape"])
        same = ("architecture", "prediction", "null_label", "num_classes")
        return cls(
            family=str(metadata["family"]),
            unet=unet,
            sample_shape=(channels, height, width),
            schedule=NoiseSchedule.from_description(metadata["schedule"]),
            convention=SamplingConvention.from_json(metadata["convention"], str(metadata["family"])),
            scale_factor=float(metadata["scale_factor"]),
            time_scale=float(metadata.get("time_scale", 1.0)),
            augmentation=NoiseAugmentation.from_json(metadata.get("augmentation")),
            latent=metadata.get("latent") is True,
            **{key: metadata[key] for key in same},
            **more,
        )

    def metadata(self) -> dict[str, Any]:
        """Everything but weights, as JSON; a packed file carries it."""
        augmentation = {} if self.augmentation is None else {"augmentation": self.augmentation.to_json()}
        # Said where neither the first stage nor the number of channels does.
        untold = self.first_stage is None and self.sample_shape[0] in (1, 3)
        latent = {"latent": True} if self.latent and untold else {}
        return (
            augmentation
            | latent
            | {
                "family": self.family,
                "architecture": self.architecture,
                "sample_shape": list(self.sample_shape),
                "schedule": self.schedule.description,
                "convention": self.convention.to_json(self.family),
                "prediction": self.prediction,
                "scale_factor": self.scale_factor,
                "null_label": self.null_label,
                "num_classes": self.num_classes,
                "time_scale": self.time_scale,
            }
        )

"""Base of the patch transformers' families (DiT, U-ViT), whose weights show everything but the heads."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from bidm_cli.checkpoints import family as base
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import assumed
from bidm_cli.checkpoints.reading.config import Config, Section
from bidm_cli.checkpoints.reading.shapes import Shapes
from bidm_cli.checkpoints.reading.state import shapes_of
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_OVERRIDE = "override with `settings` num_heads=N"


@dataclass(frozen=True)
class TransformerSettings(base.NetworkSettings):
    """Settings of a configuration, of training options or of ``settings``; None where they do not say.

    Attributes:
        options: a configuration's arguments of the constructor. origin: where ``heads`` come from.
        context_tokens: length of the context. null_label: the last label means "no class".
        prediction, schedule: of a configuration that says more than the network.
        latent: the training options say that it is one of latents.
    """

    options: Section = field(default_factory=lambda: Section({}, ""))
    heads: int | None = None
    origin: str = "the configuration"
    num_classes: int | None = None
    context_tokens: int | None = None
    null_label: bool | None = None
    prediction: Literal["epsilon", "x0"] = "epsilon"
    schedule: NoiseSchedule | None = None
    latent: bool = False


class PatchTransformer(base.OneNetworkFamily[TransformerSettings]):
    """Family of patch transformers.

    Attributes:
        title: the network's name. heads: of the published networks, by width. width: that argument's name.
        agreeing: arguments that a configuration has to have as the weights do. decoder: of the latents.
        released: why a bare state dict holds averages, if all published ones do.
    """

    network_name = "transformer"
    latent_scale = 0.18215  # Stable Diffusion's, on which both families' published models are trained
    title: ClassVar[str]
    heads: ClassVar[dict[int, int]]
    width: ClassVar[str]
    agreeing: ClassVar[tuple[str, ...]]
    decoder: ClassVar[str]
    released: ClassVar[str] = ""

    @abstractmethod
    def file_settings(self, detected: base.Detected, config: Config | None) -> TransformerSettings:
        """Settings for loading: the configuration's, else the file's own."""

    @abstractmethod
    def inferred(self, shapes: Shapes, settings: TransformerSettings, notes: list[str]) -> dict[str, Any]:
        """The network's arguments but for the heads."""

    def load(self, detected: base.Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
        notes = list(detected.evidence)
        settings = self.file_settings(detected, config)
        asked = Section(detected.settings, "`settings`")
        if "num_heads" in asked:
            settings = replace(settings, heads=self.configured_heads(asked), origin="`settings`")
        choice = base.choose_weights(detected.weights, ema, notes, source=source, released=self.released)
        tensors = choice.weights.tensors
        arguments = self.inferred(shapes_of(tensors), settings, notes)
        arguments["num_heads"] = self._heads(arguments[self.width], settings, notes)
        base.check_agreement(settings.options, arguments, self.agreeing)
        notes.append("architecture inferred from names and shapes")
        about: dict[str, Any] = {"source": source, "ema": choice.averaged}
        return self.assemble(settings, self.built(arguments, tensors, notes, ignored=choice.spare, **about))

    def _heads(self, width: int, settings: TransformerSettings, notes: list[str]) -> int:
        """Heads as configured, else as the published network's of this width, else of 64 channels; noted."""
        heads, reason = settings.heads, f"from {settings.origin}"
        if heads is None and width in self.heads:
            heads, reason = self.heads[width], f"as the published {self.title} of width {width}; {_OVERRIDE}"
        elif heads is None:
            heads, reason = width // 64, f"assumed: 64 channels each; {_OVERRIDE}"
            if width % 64:
                raise BidmError(
                    f"the number of attention heads is not in the file and no published {self.title} has the "
                    f"width {width}; give it, as in `settings` num_heads=8"
                )
        line = f"attention heads: {heads} ({reason})"
        notes.append(assumed(line) if settings.heads is None else line)
        return heads

    def note_decoder(self, channels: int, notes: list[str]) -> None:
        """Note that the decoder of latents is missing."""
        notes.append(
            f"first stage: none; this denoises latents of {channels} channels, whose decoder "
            f"({self.decoder}) is another file: give it with `first_stage`, or sample with `raw`"
        )

    @staticmethod
    def configured_heads(section: Section) -> int | None:
        """``num_heads`` of a configuration; None if it does not say."""
        if "num_heads" not in section:
            return None
        heads = section.integer("num_heads")
        if not 1 <= heads <= 1024:
            raise section.wrong("num_heads", "1 to 1024", heads)
        return heads

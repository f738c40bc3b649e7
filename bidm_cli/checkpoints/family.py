"""Checkpoint families: what each implements, their registry, and the steps that several of them share.

A family is one class; an outside package adds its own without an edit here:

    @register_family
    class Mine(OneNetworkFamily[MySettings]):
        signature = Signature("mine", "my trainer's checkpoints", (("stem.weight", "head.weight"),))
        network_kind = "my_unet"     # see bidm_cli.networks.registry.register_network
        ...                          # config_kind, read_settings, load, assemble and, to be exported, export

The command line finds it if the package names the module as an entry point of the group ``bidm.families``.
The built-in ones are listed in :mod:`bidm_cli.checkpoints.detect`. Functions in a family's modules raise
BidmError where the methods that call them say so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.choice import Choice as Choice
from bidm_cli.checkpoints.choice import check_trained as check_trained
from bidm_cli.checkpoints.choice import choose_weights as choose_weights
from bidm_cli.checkpoints.evidence import assumed, left_out
from bidm_cli.checkpoints.reading.config import Config, Section, first
from bidm_cli.checkpoints.reading.pickle_names import printable
from bidm_cli.checkpoints.reading.state import Weights, load_strictly, on_meta
from bidm_cli.checkpoints.value_range import Range, set_value_range
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

INFERRED = "inferred from names and shapes"
SET_SCHEDULE = "override with `settings` beta_schedule=..., beta_start, beta_end, timesteps"


@dataclass(frozen=True)
class Signature:
    """A family's name, what it is in words, and names that all of its state dicts have.

    ``alternatives`` are complete sets of names; one of them has to be there.
    """

    family: str
    described: str
    alternatives: tuple[tuple[str, ...], ...]

    def matched(self, names: Mapping[str, Any]) -> tuple[int, int, str]:
        """(names present, names asked for, an example) of the alternative that fits best."""
        best = (0, 1, "")
        for alternative in self.alternatives:
            present = [name for name in alternative if name in names]
            if present and len(present) / len(alternative) > best[0] / best[1]:
                best = (len(present), len(alternative), present[0])
        return best

    def is_complete(self, names: Mapping[str, Any]) -> bool:
        """True if all names of an alternative are there."""
        present, wanted, _ = self.matched(names)
        return present == wanted


@dataclass(frozen=True)
class Detected:
    """Family of a file's contents.

    Attributes:
        weights: the file's state dicts that have the family's names, in file order.
        evidence: why.
        contents: the whole file's, for what a family keeps beside its weights (settings, versions).
        settings: what the user gives by name, for what a family cannot do without.
        unplaced: averages that fit no weights, by place, and why.
    """

    family: str
    weights: list[Weights]
    evidence: list[str]
    contents: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    unplaced: Mapping[str, str] = field(default_factory=dict)


class FirstStageAlone(BidmError):
    """Error for a path that holds a first stage (autoencoder) and no denoising network."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is a first stage (autoencoder) alone; give it with `first_stage` beside the checkpoint "
            "of its latents"
        )


class Family(ABC):
    """A family of checkpoints: detection, loading and export.

    Attributes:
        exports_first_stage: its layout has a place for the first stage.
        exports_value_range: its configuration says whether images are in [-1, 1].
        latent_scale: scale of the latents of a first stage in a file of its own that does not say it.
        reads_folders: a model may be a folder (:meth:`load_folder`).
    """

    signature: ClassVar[Signature]
    exports_first_stage: ClassVar[bool] = False
    exports_value_range: ClassVar[bool] = False
    latent_scale: ClassVar[float | None] = None
    reads_folders: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return self.signature.family

    @abstractmethod
    def config_kind(self, values: Mapping[str, Any]) -> str | None:
        """:attr:`Config.kind` if ``values`` are the top of a configuration of this family, else None."""

    def accepts(self, config: Config) -> bool:
        """True if a configuration can go with this family's files."""
        return config.layout == self.name

    def settle(
        self, detected: Detected, find_config: Callable[[str], Config | None], latent: bool
    ) -> Detected:
        """``detected``, or another family that has the same names and fits better.

        Args:
            find_config: the configuration given, else the one of this family beside the file.
            latent: a first stage comes with the file.
        """
        return detected

    @abstractmethod
    def load(self, detected: Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
        """A checkpoint from a file found to be of this family.

        Args:
            config: one that the family :meth:`accepts`; None to infer.
            ema: use the averaged weights where the file has them.

        Raises:
            BidmError: weights and architecture do not fit, or settings are missing or make no sense.
        """

    def load_folder(self, root: Path, config: Config | None, ema: bool) -> Checkpoint:
        """A checkpoint from a folder; for families with ``reads_folders``."""
        raise NotImplementedError

    @abstractmethod
    def from_config(self, config: Config) -> Checkpoint:
        """The networks of a bare configuration, on the meta device.

        Raises:
            BidmError: settings are missing or make no sense.
        """

    def export(self, model: DiffusionModel, weights: Mapping[str, Tensor], path: Path) -> Path:
        """Write ``weights``, the network's by name, as a float checkpoint; returns its configuration's path.

        Raises:
            BidmError: a setting that the layout cannot say, or no place to write.
        """
        raise BidmError(f"models of the family {self.name!r} cannot be exported yet")


@dataclass(frozen=True)
class NetworkSettings:
    """Base of the settings that a configuration says.

    Attributes:
        unet: the network's arguments, or None.
        value_range: of a pixel model, where it is not [-1, 1], and the setting that says so.
        notes: on defaults that were assumed, and on settings that were passed over.
    """

    unet: dict[str, Any] | None = None
    value_range: tuple[Range, str] | None = field(default=None, kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)


S = TypeVar("S", bound=NetworkSettings)


@dataclass(frozen=True)
class Found:
    """A denoising network built from a file or a configuration.

    Attributes:
        arguments: its constructor's. notes: the evidence so far, to be added to.
        about: ``source``, ``ema`` and ``has_weights`` of :class:`Checkpoint`.
    """

    arguments: dict[str, Any]
    network: nn.Module
    notes: list[str]
    about: dict[str, Any]


class OneNetworkFamily(Family, Generic[S]):
    """Base of families whose files hold one denoising network: no first stage and no conditioner.

    Attributes:
        network_kind: the network's, in :mod:`bidm_cli.networks.registry`. network_name: for messages.
        assumed_version: added to the evidence of a bare configuration.
    """

    network_kind: ClassVar[str]
    network_name: ClassVar[str] = "U-Net"
    assumed_version: ClassVar[str] = ""

    @abstractmethod
    def read_settings(self, config: Config) -> S:
        """The settings of a configuration.

        Raises:
            BidmError: a setting is missing, of the wrong type, or of something bidm does not have.
        """

    @abstractmethod
    def assemble(self, settings: S, found: Found) -> Checkpoint:
        """The checkpoint of a network; adds to the evidence what it had to assume."""

    def bare_arguments(self, config: Config, settings: S) -> dict[str, Any]:
        """All arguments of the network, from a configuration without weights."""
        if settings.unet is None:
            raise BidmError(f"{config.path} does not say the {self.network_name}'s architecture")
        return settings.unet

    def from_config(self, config: Config) -> Checkpoint:
        settings = self.read_settings(config)
        arguments = self.bare_arguments(config, settings)
        notes = [f"family {self.name}: configuration {config.path}; no weights"]
        if self.assumed_version:
            notes.append(assumed(f"architecture as of {self.assumed_version} (assumed: no weights tell)"))
        notes.extend(getattr(settings, "notes", ()))
        network = on_meta(self.architecture(arguments))
        about = {"source": config.path, "has_weights": False}
        return self.assemble(settings, Found(arguments, network, notes, about))

    def architecture(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """As :func:`bidm_cli.networks.registry.build` takes it."""
        return {"kind": self.network_kind, "args": arguments}

    def built(
        self,
        arguments: dict[str, Any],
        tensors: Mapping[str, Tensor],
        notes: list[str],
        origin: str = "inferred from its names",
        ignored: Collection[str] = (),
        **about: Any,
    ) -> Found:
        """The network with exactly these weights: see :func:`load_strictly` and :class:`Found`."""
        architecture, name = self.architecture(arguments), self.network_name
        network = load_strictly(architecture, tensors, name, origin=origin, ignored=ignored.__contains__)
        return Found(arguments, network, notes, about)

    def checkpoint(self, found: Found, **more: Any) -> Checkpoint:
        """A :class:`Checkpoint` of the network alone; ``more`` are its other fields."""
        architecture = {"unet": self.architecture(found.arguments), "first_stage": None, "conditioner": None}
        about = {"family": self.name, "architecture": architecture, "evidence": found.notes, **found.about}
        return Checkpoint(unet=found.network, **about, **more)

    def pixel_checkpoint(self, settings: S, found: Found, **more: Any) -> Checkpoint:
        """As :meth:`checkpoint`, with the range of values that ``settings`` say."""
        checkpoint = self.checkpoint(found, **more)
        return set_value_range(checkpoint, *settings.value_range) if settings.value_range else checkpoint


F = TypeVar("F", bound=type[Family])
REGISTERED: dict[str, Family] = {}
"""Families by name, in the order of their registration."""


def register_family(family: F) -> F:
    """Add a family to those that bidm detects, loads and exports; a class decorator.

    Raises:
        ValueError: another class has its name.
    """
    name, known = family.signature.family, REGISTERED.get(family.signature.family)
    if known is not None and type(known).__qualname__ != family.__qualname__:
        raise ValueError(f"the family {name!r} is registered already, as {type(known).__qualname__}")
    REGISTERED[name] = family()
    return family


def check_agreement(section: Section, arguments: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raise BidmError if settings ``names`` of a configuration differ from ``arguments``, the weights'."""
    for name in names:
        actual = arguments[name]
        said = first(Section.numbers if isinstance(actual, list) else Section.integer, (section, name))
        if said not in (None, actual):
            raise BidmError(
                f"{section.where}: {name} is {said}, but the weights have {actual}; give the "
                "configuration that belongs to the file"
            )


def assumed_linear(reason: str, notes: list[str]) -> NoiseSchedule:
    """DDPM's schedule, which configurations of whole families do without; noted."""
    notes.append(assumed(f"schedule: linear, T=1000, 0.0001 to 0.02 (assumed, {reason}; {SET_SCHEDULE})"))
    return NoiseSchedule.linear(1000, 1e-4, 0.02)


def defaults_of(section: Section, names: Iterable[str], override: str) -> list[str]:
    """Note on settings that a configuration leaves to the original's defaults; "a|b" are two names of one."""
    missing = [name for name in names if not any(word in section for word in name.split("|"))]
    if not missing:
        return []
    words = ", ".join(name.partition("|")[0] for name in missing)
    reason = f"assumed, the original's default: {section.where} does not say"
    return [assumed(f"{words} ({reason}; {override})")]


def unknown_in(section: Section, known: Iterable[str]) -> list[str]:
    """Note on settings that a configuration has, that are set, and that bidm does not know."""
    names = [name for name in section.values if str(name) not in set(known) and section.values[name]]
    if not names:
        return []
    shown = ", ".join(printable(str(name), 40) for name in names[:8]) + (", ..." if len(names) > 8 else "")
    return [left_out(f"settings that bidm does not know are passed over: {shown} ({section.where})")]


def channels_of(network: int, said: int | None, where: str, notes: list[str]) -> int:
    """Channels of the images: the network's where a configuration says others, which is noted."""
    if said in (None, network) or 2 * (said or 0) == network:
        return said or network
    notes.append(
        left_out(f"{where} says images of {said} channels; the network denoises {network}, which counts")
    )
    return network


def has_learned_variance(arguments: Mapping[str, Any], notes: list[str]) -> bool:
    """True if twice as many channels come out as go in, in a family whose code has no such network; noted."""
    inputs, outputs = arguments["in_channels"], arguments["out_channels"]
    if outputs != 2 * inputs:
        return False
    reason = "assumed, as OpenAI's; override with `settings` learn_sigma=false"
    notes.append(assumed(f"learned variance: {outputs} channels out for {inputs} ({reason})"))
    return True


def note_concatenation(checkpoint: Checkpoint, notes: list[str]) -> None:
    """Note the conditioning channels of ``checkpoint``, if its network takes any."""
    if checkpoint.concat_channels:
        notes.append(
            f"conditioned by concatenation: {checkpoint.concat_channels} channels besides the "
            f"{checkpoint.sample_shape[0]}"
        )


def network_section(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Constructor arguments of the network in JSON: under "unet" or "nnet", or at the top."""
    return next((values[name] for name in ("unet", "nnet") if isinstance(values.get(name), dict)), values)

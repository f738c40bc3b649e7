"""Configuration files: the families' own YAML, or JSON with the arguments of the original constructors.

config = read_config(Path("config.yaml"))
config.layout                                    # "ldm", "ddpm", ...: whose configuration it is
config.root.section("model").integer("ch")       # checked; errors name the file and the place
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bidm_cli.checkpoints.reading.unpickle import existing_file
from bidm_cli.errors import BidmError

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_LARGEST_FILE = 16 << 20
_LARGEST_YAML = 1 << 19
_MOST_VALUES = 1 << 20
_LONGEST_LIST = 64
_MISSING = object()
_OPENAI_ALONE = {"learn_sigma", "rescale_timesteps", "sigma_small", "predict_xstart", "noise_schedule"}
_LDM_ALONE = {
    "linear_start", "linear_end", "parameterization", "conditioning_key", "scale_factor", "scale_by_std",
    "first_stage", "first_stage_config", "cond_stage_config", "beta_schedule",
}  # fmt: skip


class Section:
    """A mapping of a configuration file; reading from it checks types and says where something is wrong."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """The value as it stands; null counts as absent.

        Raises:
            BidmError: absent, and no default.
        """
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise BidmError(f"{self.where} has no {name!r}")
        return default

    def section(self, name: str) -> Section:
        """The mapping under ``name``; an empty one if it is absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self.wrong(name, "a mapping", value)
        return Section(value, f"{self.where}: {name}" if ": " not in self.where else f"{self.where}.{name}")

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A finite number; YAML reads 1e-4 as text, which counts too."""
        value = self.get(name, default)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.wrong(name, "a number", value) from None
        if isinstance(value, bool) or not math.isfinite(number):
            raise self.wrong(name, "a number", value)
        return number

    def integer(self, name: str, default: Any = _MISSING) -> int:
        """A whole number."""
        number = self.number(name, default)
        if number != int(number):
            raise self.wrong(name, "a whole number", number)
        return int(number)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, (bool, int)):
            raise self.wrong(name, "true or false", value)
        return bool(value)

    def text(self, name: str, default: Any = _MISSING) -> str:
        """A string."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, "text", value)
        return value

    def numbers(self, name: str, default: Any = _MISSING) -> list[Any]:
        """A list of numbers (a single one counts); whole numbers come as int, others as float."""
        value = self.get(name, default)
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(items) > _LONGEST_LIST:
            raise self.wrong(name, f"a list of at most {_LONGEST_LIST} numbers", value)
        found = [Section({name: item}, self.where).number(name) for item in items]
        return [int(number) if number == int(number) else number for number in found]

    def wrong(self, name: str, wanted: str, value: Any) -> BidmError:
        """The error for a value of the wrong type."""
        shown = repr(value)
        return BidmError(f"{self.where}: {name} must be {wanted}, not {shown[:60]}")


@dataclass(frozen=True)
class Config:
    """A configuration file.

    Attributes:
        layout: the family it belongs to ("ldm", "ddpm", or one that bidm only recognises); None if unknown.
        kind: "yaml" for the family's own file, "arguments" for JSON of constructor arguments.
    """

    path: Path
    root: Section
    layout: str | None
    kind: str


def read_config(path: str | Path) -> Config:
    """Read a YAML or JSON file and see whose it is.

    Raises:
        BidmError: no such file, or not a configuration.
    """
    path = existing_file(path)
    try:
        # YAML is read by Python, some hundred kB a second.
        if path.stat().st_size > (_LARGEST_FILE if path.suffix == ".json" else _LARGEST_YAML):
            raise BidmError(f"{path} is too large for a configuration file")
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        message = " ".join(str(error).split())[:160]
        raise BidmError(f"{path} is not valid YAML or JSON: {message}") from error
    if not isinstance(values, dict) or not values:
        raise BidmError(f"{path} is not a configuration: it holds no named settings")
    if _expanded(values, {}) > _MOST_VALUES:
        raise BidmError(f"{path} is not a configuration: its references unfold to millions of values")
    layout, kind = _layout_of(values)
    return Config(path, Section(values, str(path)), layout, kind)


def _expanded(value: Any, known: dict[int, float]) -> float:
    """Number of values with every YAML alias written out; infinite where one contains itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(item, known) for item in inner)
    return known[id(value)]


def sibling_config(checkpoint: Path, family: str) -> Config | None:
    """The configuration of this family that lies beside a checkpoint, if one does.

    Looked for, in this order: a file of the checkpoint's own name, config, project, model, hparams with
    .yaml, .yml or .json; then the layout of LDM's training logs (``checkpoints/`` beside ``configs/``).
    Files that are not of the family are passed over.
    """
    stems = [checkpoint.stem, "config", "project", "model", "hparams"]
    candidates = [checkpoint.with_name(stem + suffix) for stem in stems for suffix in CONFIG_SUFFIXES]
    if checkpoint.parent.name == "checkpoints":
        candidates += sorted((checkpoint.parent.parent / "configs").glob("*project.yaml"))
        candidates.append(checkpoint.parent.parent / "config.yaml")
    for candidate in candidates:
        if not candidate.is_file():
            continue
        try:
            config = read_config(candidate)
        except BidmError:
            continue
        if config.layout == family:
            return config
    return None


def is_network_alone(config: Config) -> bool:
    """Whether JSON says nothing but the arguments of the U-Net that LDM and OpenAI's codes share."""
    return (
        config.layout == "ldm" and config.kind == "arguments" and not _names(config.root.values) & _LDM_ALONE
    )


def _is_openai(values: dict[str, Any]) -> bool:
    """Whether arguments are OpenAI's: LDM has the same network and none of these settings."""
    unet, names = values.get("unet"), _names(values)
    same_network = "model_channels" in (unet if isinstance(unet, dict) else values)
    openai = bool(names & _OPENAI_ALONE) and not names & _LDM_ALONE
    return "num_channels" in values or (same_network and openai)


def _names(values: Mapping[str, Any]) -> set[str]:
    """Names at the top and of the diffusion settings."""
    diffusion = values.get("diffusion")
    return set(values) | (set(diffusion) if isinstance(diffusion, dict) else set())


def _layout_of(values: dict[str, Any]) -> tuple[str | None, str]:
    """(family, kind) of a configuration, by the names in it."""
    model = values.get("model")
    if isinstance(model, dict):
        if isinstance(model.get("params"), dict):
            latent = "unet_config" in model["params"]
            return ("ldm" if latent else "first stage" if "ddconfig" in model["params"] else None), "yaml"
        if "nf" in model and "ch_mult" in model:
            return "score-sde", "yaml"
        if "ch" in model and "ch_mult" in model:
            return "ddpm", "yaml"
    if "_class_name" in values:
        return "diffusers", "json"
    unet = next((values[name] for name in ("unet", "nnet") if isinstance(values.get(name), dict)), values)
    if values.get("library") in ("guided", "improved", "openai") or _is_openai(values):
        return "openai", "arguments"
    if str(model).startswith("DiT-"):
        return "dit", "arguments"
    if "attn" in unet and "ch_mult" in unet:
        return "w86763777", "arguments"
    for key, family in (
        ("model_channels", "ldm"),
        ("ch_mult", "ddpm"),
        ("dim_mults", "lucidrains"),
        ("dim", "lucidrains"),
        ("hidden_size", "dit"),
        ("img_size", "uvit"),
    ):
        if key in unet:
            return family, "arguments"
    return None, "arguments"

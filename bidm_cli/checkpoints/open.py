"""Open a checkpoint of any family, or a bare configuration.

ckpt = load_checkpoint("model.ckpt")
for line in ckpt.evidence: print(line)
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.detect import Detected, described, detect
from bidm_cli.checkpoints.families.diffusers.files import is_part
from bidm_cli.checkpoints.first_stages.file import FirstStageAlone, join_first_stage, load_first_stage
from bidm_cli.checkpoints.overrides import Settings, apply_settings
from bidm_cli.checkpoints.reading.config import Config, is_network_alone, read_config, sibling_config
from bidm_cli.checkpoints.reading.hub import downloaded, is_hub_id
from bidm_cli.checkpoints.reading.unpickle import existing_file, read_file, safetensors_metadata
from bidm_cli.errors import BidmError

# Each family's module has load(detected, config, ema, source) and from_config(config).
_FAMILIES = {
    "ldm": "bidm_cli.checkpoints.families.ldm.load",
    "ddpm": "bidm_cli.checkpoints.families.ddpm",
    "lucidrains": "bidm_cli.checkpoints.families.lucidrains.load",
    "dit": "bidm_cli.checkpoints.families.dit",
    "uvit": "bidm_cli.checkpoints.families.uvit",
    "openai": "bidm_cli.checkpoints.families.openai.load",
    "diffusers": "bidm_cli.checkpoints.families.diffusers.load",
    "w86763777": "bidm_cli.checkpoints.families.w86",
    "score-sde": "bidm_cli.checkpoints.families.score_sde.load",
}


def load_checkpoint(
    path: str | Path,
    config: str | Path | None = None,
    ema: bool = True,
    family: str | None = None,
    settings: Settings | None = None,
    first_stage: str | Path | None = None,
) -> Checkpoint:
    """Open an original checkpoint: a PyTorch file or .safetensors of a known family, or a diffusers folder.

    Weights come on the CPU, memory-mapped where the file allows it: it must not be overwritten in place while
    the model is in use. Half-precision ones become float32 when their network is first used.

    Args:
        config: the family's own YAML, or JSON with the original constructors' arguments. Without it, a
            configuration beside the file is used; without that, the weights tell the architecture.
        ema: use the averaged weights if there are any.
        family: take the file for one of this family ("ldm", "openai", ...), whatever its names say.
        settings: by name, in place of what the file, its configuration or a rule says (see
            :mod:`bidm_cli.checkpoints.overrides`).
        first_stage: a first stage in a file of its own (see :mod:`bidm_cli.checkpoints.first_stages.file`).

    Raises:
        BidmError: no such file, damaged, unsafe, of no known family, or its weights do not fit.
    """
    settings = settings or {}
    _check_family(family)
    checkpoint = _load(path, config, ema, family, settings, first_stage is not None)
    if first_stage is not None:
        join_first_stage(checkpoint, load_first_stage(first_stage))
    return apply_settings(checkpoint, settings) if settings else checkpoint


def _load(
    path: str | Path,
    config: str | Path | None,
    ema: bool,
    forced: str | None,
    settings: Settings,
    latent: bool,
) -> Checkpoint:
    given = None if config is None else read_config(config)
    if is_hub_id(path):
        path = downloaded(path)
    if Path(path).is_dir():
        if forced not in (None, "diffusers"):
            raise BidmError(f"{path} is a folder, which only diffusers writes; name the file in it")
        return _load_folder(Path(path), given, ema)
    path = existing_file(path)
    if is_part(path):
        return _load_folder(path.parent, given, ema)
    if "bidm" in (safetensors_metadata(path) or {}):
        raise BidmError(f"{path} is a packed file; open it with bidm_cli.load_packed")
    contents = read_file(path)
    detected = detect(contents, path, forced)
    if forced is None:
        detected = _as_configured(detected, given, path, latent)
    detected = replace(detected, settings=settings)
    if detected.family == "first stage":
        raise FirstStageAlone(path)
    family = _module(detected.family, path)
    if given is not None and (detected.family == "openai" and is_network_alone(given)):
        given = replace(given, layout="openai")
    _check_layout(given, detected.family, path)
    used = given or sibling_config(path, detected.family)
    detected.evidence.extend(_container_notes(contents))
    try:
        return family.load(detected, used, ema, path)
    except BidmError as error:
        raise _located(error, path) from error


def _check_family(family: str | None) -> None:
    if family is not None and family not in _FAMILIES:
        raise BidmError(f"no family {family!r}; bidm knows {', '.join(_FAMILIES)}")


def _load_folder(path: Path, given: Config | None, ema: bool) -> Checkpoint:
    _check_layout(given, "diffusers", path)
    try:
        return _module("diffusers", path).load_folder(path, given, ema)
    except FirstStageAlone:
        raise
    except BidmError as error:
        raise _located(error, path) from error


def _check_layout(given: Config | None, family: str, path: Path) -> None:
    if given is not None and given.layout != family:
        raise BidmError(
            f"{given.path} is {_kind(given)}, but {path} is of the family {family}; give the configuration "
            "that belongs to it"
        )


def load_architecture(path: str | Path, settings: Settings | None = None) -> Checkpoint:
    """Open a bare configuration: an LDM config.yaml, a ddim .yml or JSON of constructor arguments.

    The networks are on the meta device: shapes without memory.

    Raises:
        BidmError: no such file, no configuration of a known family, or its settings make no sense.
    """
    config = read_config(path)
    if config.layout is None:
        keys = ", ".join(map(str, config.root.values))[:200]
        raise BidmError(f"{path} is no configuration that bidm knows: top-level keys {keys}")
    try:
        checkpoint: Checkpoint = _module(config.layout, config.path).from_config(config)
        return apply_settings(checkpoint, settings) if settings else checkpoint
    except BidmError as error:
        raise _located(error, config.path) from error


def _module(family: str, path: Path) -> Any:
    if family not in _FAMILIES:
        raise BidmError(
            f"{path} looks like {described(family)}, which this version of bidm cannot load; "
            f"it loads {', '.join(described(name) for name in _FAMILIES)}"
        )
    return importlib.import_module(_FAMILIES[family])


def _as_configured(detected: Detected, config: Config | None, path: Path, latent: bool) -> Detected:
    """A bare U-Net under OpenAI's names is LDM's if the configuration says so, if it attends to a context, or
    if it comes with a first stage (``latent``).
    """
    if detected.family != "openai":
        return detected
    if config is None and sibling_config(path, "openai") is None:
        config = sibling_config(path, "ldm")
    context = "middle_block.1.transformer_blocks.0.attn2.to_k.weight" in detected.weights[0].tensors
    if not context and not latent and (config is None or config.layout != "ldm" or is_network_alone(config)):
        return detected
    reason = "it attends to a context" if context else "a first stage comes with it"
    if config is not None and config.layout == "ldm":
        reason = f"{config.path} says so"
    evidence = f"family ldm, the U-Net alone (names such as input_blocks.0.0.weight; {reason})"
    return Detected("ldm", detected.weights, [evidence])


def _located(error: BidmError, path: Path) -> BidmError:
    return error if str(error).startswith(str(path)) else BidmError(f"{path}: {error}")


def _kind(config: Config) -> str:
    return "of no known family" if config.layout is None else f"for {described(config.layout)}"


def _container_notes(contents: Any) -> list[str]:
    """What the file says about its making."""
    if not isinstance(contents, Mapping) or "pytorch-lightning_version" not in contents:
        return []
    numbers = [
        f"{name.replace('_', ' ')} {contents[name]}"
        for name in ("epoch", "global_step")
        if isinstance(contents.get(name), int)
    ]
    return [", ".join(["PyTorch Lightning file", *numbers])]

"""Family of a file, by the names of its tensors, and of a configuration, by the names of its settings."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from bidm_cli.checkpoints.choice import unplaced_notes
from bidm_cli.checkpoints.evidence import Note, left_out, unreadable
from bidm_cli.checkpoints.family import REGISTERED, Detected, Family, Signature
from bidm_cli.checkpoints.reading.averages import find, parts_of
from bidm_cli.checkpoints.reading.config import CONFIG_SUFFIXES, Config, read_section
from bidm_cli.checkpoints.reading.pickle_names import printable
from bidm_cli.checkpoints.reading.state import Weights, averages_without_names, state_dicts
from bidm_cli.errors import BidmError

_BUILT_IN = {
    "ldm": "bidm_cli.checkpoints.families.ldm.load",
    "ddpm": "bidm_cli.checkpoints.families.ddpm",
    "openai": "bidm_cli.checkpoints.families.openai.load",
    "diffusers": "bidm_cli.checkpoints.families.diffusers.load",
    "lucidrains": "bidm_cli.checkpoints.families.lucidrains.load",
    "w86763777": "bidm_cli.checkpoints.families.w86",
    "dit": "bidm_cli.checkpoints.families.dit",
    "uvit": "bidm_cli.checkpoints.families.uvit",
    "score-sde": "bidm_cli.checkpoints.families.score_sde",
}
"""Modules that register the built-in families, in the order in which names are compared.

The first complete match counts, so a wrapper's names come before those of what it wraps. Families of other
packages come after them.
"""

FIRST_STAGE = Signature(
    "first stage",
    "a first stage (autoencoder) alone",
    (("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight"),),
)
"""No family, but recognised: it is joined to a model."""

_CONFIG_NAMES = ("config", "project", "model", "hparams", "args")
_CHECKPOINT_FOLDERS = ("checkpoints", "checkpoint", "ckpts", "ckpt", "models", "weights")


def families() -> list[Family]:
    """All families: the built-in ones, then those of other packages in the order of their registration."""
    _import_families()
    others = [family for name, family in REGISTERED.items() if name not in _BUILT_IN]
    return [*(REGISTERED[name] for name in _BUILT_IN), *others]


@functools.cache
def _import_families() -> None:
    for module in _BUILT_IN.values():
        importlib.import_module(module)
    for point in entry_points(group="bidm.families"):
        try:
            point.load()
        except Exception as error:
            raise BidmError(
                f"the family {point.name!r} of {point.value} cannot be imported: {error}"
            ) from error


def family_named(name: str) -> Family:
    """The family of this name; BidmError if there is none."""
    known = {family.name: family for family in families()}
    if name not in known:
        raise BidmError(f"no family {name!r}; bidm knows {', '.join(known)}")
    return known[name]


def described(family: str) -> str:
    """A family in words."""
    return next((s.described for s in _signatures() if s.family == family), family)


def _signatures() -> list[Signature]:
    return [*(family.signature for family in families()), FIRST_STAGE]


def read_config(path: str | Path) -> Config:
    """Read a YAML or JSON file and find its family.

    Raises:
        BidmError: no such file, or not a configuration.
    """
    root = read_section(path)
    for family in families():
        kind = family.config_kind(root.values)
        if kind is not None:
            return Config(Path(path), root, family.name, kind)
    model = root.values.get("model")
    params = model.get("params") if isinstance(model, dict) else None
    if isinstance(params, dict) and "ddconfig" in params:
        return Config(Path(path), root, FIRST_STAGE.family, "yaml")
    return Config(Path(path), root, None, "arguments")


def sibling_config(checkpoint: Path, family: str, notes: list[str]) -> Config | None:
    """The configuration of this family that lies beside a checkpoint, if one does.

    Looked for, in this order: a file of the checkpoint's own name, config, project, model, hparams, args with
    .yaml, .yml or .json, flagfile.txt and hydra's .hydra/config.yaml; then, for a file in a folder such as
    ``checkpoints/``, the layout of LDM's training logs (``configs/`` beside it) and the same names one folder
    up. Those that cannot be read, or are not of the family, are passed over, which is added to ``notes``.
    """
    for candidate in filter(_is_file, _candidates(checkpoint)):
        try:
            config = read_config(candidate)
        except BidmError as error:
            notes.append(
                unreadable(f"a configuration lies beside the file and was not used: {error}; mend it")
            )
            continue
        if config.layout == family:
            return config
        kind = "of no known family" if config.layout is None else f"for {described(config.layout)}"
        notes.append(left_out(f"{candidate} is passed over: a configuration {kind}, not for {family}"))
    return None


def _candidates(checkpoint: Path) -> Iterator[Path]:
    """Places of a checkpoint's configuration."""
    folder, outer = checkpoint.parent, checkpoint.parent.parent
    yield from _in_folder(folder, tuple(dict.fromkeys((checkpoint.stem, *_CONFIG_NAMES))))
    if folder.name in _CHECKPOINT_FOLDERS:
        yield from sorted((outer / "configs").glob("*project.yaml"))
        yield from _in_folder(outer, _CONFIG_NAMES)


def _in_folder(folder: Path, stems: tuple[str, ...]) -> Iterator[Path]:
    yield from (folder / (stem + suffix) for stem in stems for suffix in CONFIG_SUFFIXES)
    yield from (folder / "flagfile.txt", folder / ".hydra" / "config.yaml")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def detect(contents: Any, path: Path, family: str | None = None) -> Detected:
    """Find the family of a file's contents.

    Args:
        family: take it for this one, whatever its names say.

    Raises:
        BidmError: nothing known; says what the file has at its top and which family comes nearest.
    """
    found = state_dicts(contents)
    if family is not None:
        return _forced(contents, path, found, family)
    for signature in _signatures():
        fitting = [weights for weights in found if signature.is_complete(weights.tensors)]
        if fitting:
            _, _, example = signature.matched(fitting[0].tensors)
            return _detected(signature, found, contents, f"keys such as {example} in")
    for signature in _signatures():
        if any(parts_of(signature.alternatives, weights) for weights in found):
            return _detected(signature, found, contents, "its names below")
    raise BidmError(f"{path}: {_unknown(contents, found)}")


def _detected(signature: Signature, found: list[Weights], contents: Any, how: str) -> Detected:
    """The file as one of the family, with all that it holds of the network."""
    inside = find(signature.alternatives, found, contents)
    places = ", ".join(weights.where or "the whole file" for weights in inside.named)
    evidence = [f"family {signature.family}, {signature.described}: {how} {places}"]
    evidence += [*unplaced_notes(inside), *_outside(inside.weights, found)]
    return Detected(signature.family, inside.weights, evidence, contents, unplaced=inside.unplaced)


def _outside(inside: list[Weights], found: list[Weights]) -> list[Note]:
    """Notes on what lies beside the network in its state dict, where the network is below a prefix."""
    notes = []
    for weights in found:
        start = f"{weights.where}." if weights.where else ""
        below = [f"{part.where[len(start) :]}." for part in inside if part.where.startswith(start)]
        if any(part.where == weights.where for part in inside) or not below:
            continue
        others = {name.partition(".")[0] for name in weights.tensors if not name.startswith(tuple(below))}
        others -= {name for name in others if name in weights.tensors}
        if others:
            notes.append(left_out(f"beside the network in the file and not used: {_few(sorted(others))}"))
    return notes


def _forced(contents: Any, path: Path, found: list[Weights], family: str) -> Detected:
    """The file as the user says; the state dicts with the family's names, else the largest one."""
    if not found:
        raise BidmError(f"{path}: no tensors by name in this file ({_top_level(contents)})")
    evidence = f"family {family}, {described(family)}: as asked for (`family`)"
    signature = family_named(family).signature
    if any(parts_of(signature.alternatives, weights) for weights in found):
        detected = _detected(signature, found, contents, "")
        return replace(detected, evidence=[evidence, *detected.evidence[1:]])
    fitting: list[Weights] = []
    # Names of another family that shares the network, or none that bidm knows; loading will tell.
    with contextlib.suppress(BidmError):
        fitting = detect(contents, path).weights
    fitting = fitting or [max(found, key=lambda weights: len(weights.tensors))]
    return Detected(family, fitting, [evidence], contents)


def _unknown(contents: Any, found: list[Weights]) -> str:
    if isinstance(contents, Mapping) and {"state", "param_groups"} <= set(map(str, contents)):
        return "an optimizer's state, not a network; give the model's (or better the EMA) file instead"
    if not found and (lists := averages_without_names(contents)):
        return (
            f"averaged (EMA) weights without names ({', '.join(lists)}) and none as trained, which would say "
            "their order; save both in one file, or copy the averages to the network and save its state dict"
        )
    if not found:
        return f"no tensors by name in this file ({_top_level(contents)})"
    scores = [
        (present / wanted, signature, example)
        for signature in _signatures()
        for weights in found
        for present, wanted, example in [signature.matched(weights.tensors)]
        if present
    ]
    nearest = "it resembles none of the known families"
    if scores:
        share, best, example = max(scores, key=lambda score: score[0])
        nearest = f"nearest is {best.family}, {best.described} ({share:.0%} of its marks: {example})"
    names = list(max(found, key=lambda weights: len(weights.tensors)).tensors)
    return (
        f"not a checkpoint that bidm knows: {_top_level(contents)}, tensors such as {_few(names)}; "
        f"{nearest}. If you know what it is, say so with `family` NAME"
    )


def _top_level(contents: Any) -> str:
    if isinstance(contents, Mapping):
        return f"top-level keys {_few([str(key) for key in contents])}"
    if isinstance(contents, (list, tuple)):
        return f"a list of {len(contents)}"
    return f"a {type(contents).__name__}"


def _few(names: list[str]) -> str:
    shown = ", ".join(printable(name, 60) for name in names[:6])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 6 else shown

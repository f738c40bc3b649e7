"""Choice among a file's state dicts: averaged (EMA) weights or those as trained, and what is said of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from bidm_cli.checkpoints.evidence import Note, assumed, left_out
from bidm_cli.checkpoints.reading.averages import Found
from bidm_cli.checkpoints.reading.state import Weights, is_average_place, is_ema_name
from bidm_cli.errors import BidmError

_RATE = re.compile(r"(?<!\d)(?:0?\.\d+|9{2,})(?!\d)")
_LOWEST_RATE = 0.5
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
_FOLDER = re.compile(r"ema|.*[-_.]ema|ema_(unet|net|model|diffusion.*_model)", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """State dict to load.

    Attributes:
        weights: averaged ones are completed with those as trained that have no average.
        averaged: these are averages. alone: there are none beside it.
        spare: names that came from the weights as trained, which the network may not have.
    """

    weights: Weights
    averaged: bool
    alone: bool
    spare: frozenset[str] = frozenset()


def choose_weights(
    found: list[Weights],
    ema: bool,
    notes: list[str],
    *,
    source: Path | None = None,
    released: str = "",
    known: str = "",
) -> Choice:
    """Averaged or trained weights, as asked for, and a note on which these are.

    Args:
        found: the network's state dicts. ema: prefer averaged ones.
        source: the file, whose name may say that it holds averages, and which may have them beside it.
        released: why a bare state dict is taken for averages where neither file nor name says anything.
        known: why weights without averages in their file are averages.

    Raises:
        BidmError: trained weights are asked for, and the file has none; or averages of other weights.
    """
    averaged = [weights for weights in found if weights.is_average]
    trained = [weights for weights in found if not weights.is_average]
    # A running average may keep a copy of the weights as trained; the trainer's own come first.
    trained.sort(key=lambda weights: is_average_place(weights.where.replace("online", "")))
    check_trained(trained, ema)
    if averaged and (ema or not trained):
        return _averages(averaged, trained, notes)
    chosen = trained[0]
    if averaged:
        notes.append(
            f"weights: as trained ({chosen.where or 'the whole file'}); the averaged (EMA) ones were not "
            "asked for"
        )
        return Choice(chosen, False, False)
    notes.extend(_others(chosen, trained))
    return Choice(chosen, _is_average_alone(chosen, ema, source, known, released, notes), True)


def unplaced_notes(found: Found) -> list[Note]:
    """Notes on averages without names that fit no weights of the file."""
    return [
        left_out(f"averaged (EMA) weights without names, at {place} in the file, are not used: {why}")
        for place, why in found.unplaced.items()
    ]


def check_trained(trained: object, ema: bool) -> None:
    """Raise BidmError if there are averages alone (``trained`` is empty), and they were not asked for."""
    if not trained and not ema:
        raise BidmError("the file holds averaged (EMA) weights alone; load it with them")


def _averages(averaged: list[Weights], trained: list[Weights], notes: list[str]) -> Choice:
    """The average of the highest rate, completed."""
    chosen = _slowest(averaged)
    if chosen.orphans:
        names = ", ".join(f"{chosen.where}.{name}" for name in sorted(chosen.orphans)[:3])
        raise BidmError(
            f"{len(chosen.orphans)} averaged (EMA) weights belong to no weight of the network, such "
            f"as {names}; load the file with `ema=False`"
        )
    partners = [part for part in trained if _is_partner(part, chosen)]
    spare: frozenset[str] = frozenset()
    text = f"weights: EMA ({chosen.where or 'the whole file'})"
    if partners:
        rest = {name: t for name, t in partners[0].tensors.items() if name not in chosen.tensors}
        start = _common_start(chosen)
        plain = sum(name.startswith(start) for name in rest)
        text += f"; {plain} have no average and are as trained" if plain else ""
        chosen, spare = replace(chosen, tensors=rest | chosen.tensors), frozenset(rest)
    notes.append(text)
    others = [part.where for part in averaged if part.where != chosen.where]
    if others:
        notes.append(
            left_out(f"other averages in the file, of lower or unknown rates: {', '.join(others[:8])}")
        )
    return Choice(chosen, True, False, spare)


def _slowest(averaged: list[Weights]) -> Weights:
    """The average of the highest rate; where no place names one, the last of a list, else the first."""
    rates = [rate_of(part.where) for part in averaged]
    if any(rate is not None for rate in rates):
        return max(zip(rates, averaged, strict=True), key=lambda pair: pair[0] or 0)[1]
    return averaged[-1 if all(part.where.endswith("]") for part in averaged) else 0]


def rate_of(name: str) -> float | None:
    """The rate of an average that a place or a file's name says (0.9999, or 9999 for it)."""
    found = [float(text if "." in text else f"0.{text}") for text in _RATE.findall(name)]
    return max((rate for rate in found if _LOWEST_RATE <= rate < 1), default=None)


def _is_partner(part: Weights, average: Weights) -> bool:
    """True if ``part`` are the weights that ``average`` is the average of."""
    return 2 * len(part.tensors.keys() & average.tensors.keys()) >= len(average.tensors)


def _common_start(weights: Weights) -> str:
    """Common start of all names, up to a dot."""
    names = list(weights.tensors)
    low, high = min(names, default=""), max(names, default="")
    shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[:shared].rpartition(".")[0]


def _others(chosen: Weights, trained: list[Weights]) -> list[Note]:
    """Notes on further weights of the same network, which no word calls averages."""
    others = [part.where for part in trained if part is not chosen and "online" not in part.where]
    if not others:
        return []
    text = f"other weights of such a network in the file, at {', '.join(others[:8])}; taken: {chosen.where}"
    return [left_out(text)]


def _is_average_alone(
    chosen: Weights, ema: bool, source: Path | None, known: str, released: str, notes: list[str]
) -> bool:
    """True if weights without averages in their file are averages: known, by its name or as ``released``."""
    name = "" if source is None else averaged_name(source)
    if known or name:
        notes.append(f"weights: EMA ({known or f'by the name, {name}'})")
        if not ema:
            notes.append(
                left_out(
                    "weights as trained were asked for: they are in another file (OpenAI's: modelNNNNNN.pt)"
                )
            )
        return True
    beside = None if source is None else averages_beside(source)
    if beside is not None:
        notes.append("weights: as trained; the averages (EMA) are in another file")
        text = f"averaged (EMA) weights are in {beside.parent.name}/{beside.name}; name that file for them"
        notes.append(left_out(text) if ema else text)
        return False
    if released and chosen.where == "":
        notes.append(assumed(f"weights: taken for averages (EMA), {released}; the file does not say"))
        return True
    notes.append(
        "weights: as trained: no averages (EMA) in the file, and whether these are averaged it does not say"
    )
    return False


def averaged_name(source: Path) -> str:
    """The file's name, or its folder's with it, where that says that the weights are averaged; else ""."""
    if is_ema_name(source.name):
        return source.name
    folder = source.parent.name
    return f"{folder}/{source.name}" if _FOLDER.fullmatch(folder) else ""


def averages_beside(source: Path) -> Path | None:
    """The averaged weights of the same step in a file beside ``source``, of the highest rate.

    OpenAI's ``ema_0.9999_000010.pt`` beside ``model000010.pt``, ``x_ema.pt`` beside ``x.pt``, or a file in a
    folder ``x_ema/`` beside the folder ``x/``.
    """
    folders = [source.parent]
    with_average = [f"{source.parent.name}_ema", f"ema_{source.parent.name}"]
    folders += [source.parent.with_name(name) for name in with_average if source.parent.name]
    found = []
    for folder in folders:
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in inside[:1000]:
            is_named = is_ema_name(path.name) if folder == source.parent else path.stem == source.stem
            if path != source and path.suffix in _SUFFIXES and is_named and _belongs(source, path):
                found.append(path)
    return max(found, key=lambda path: (rate_of(path.name) or 0, path.name), default=None)


def _belongs(source: Path, average: Path) -> bool:
    """True if the names have the same numbers, but for the rate, and the average no other word."""
    names = (average.stem, _RATE.sub("", average.stem))
    word = re.sub(r"ema|swa", "", _letters(average.stem))
    same_step = _numbers(source.stem) in [_numbers(name) for name in names]
    return same_step and word in ("", "model", _letters(source.stem))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d{1,12}", name)]

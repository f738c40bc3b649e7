"""Fingerprint of a run's model, conditions and data, kept in its folder: it is resumed with the same alone.

    check_same_run(folder, model, conditions, resume)       # model.json, conditions.sha256
    check_same_data(folder, summary, resume)                # data.json

The recipe and the seed are the trainer's to compare (:meth:`bidm_cli.distill.trainer.Trainer.resume`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from bidm_cli.checkpoints.evidence import caveats_json
from bidm_cli.data.summary import DataSummary
from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically

_SAME_DATA = ("kind", "count", "digest", "labels_digest", "conversion")
_WORDS = {
    "unet": "other weights of the network",
    "first_stage": "another first stage",
    "conditioner": "another conditioner",
}


def check_same_run(folder: Path, model: DiffusionModel, conditions: ConditionSet, resume: bool) -> None:
    """Write the fingerprint of model and conditions; a resumed run must have the same.

    Raises:
        BidmError: other weights, contexts or conditions, or other settings from ``settings``, ``family``,
            ``config`` or ``first_stage``, than the run was started with.
    """
    kept, now = folder / "model.json", _described(model)
    if resume and kept.is_file():
        try:
            before = json.loads(kept.read_text(encoding="utf-8"))
            differing = differences(before["settings"], now["settings"])
            weights = before["weights"]
            differing += [_WORDS[part] for part, value in now["weights"].items() if weights[part] != value]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BidmError(f"{kept} cannot be read ({error}); choose another `run_dir`") from error
        if differing:
            raise BidmError(
                f"{folder} was started from another model ({', '.join(differing)}); resume with the same "
                "checkpoint, `settings`, `family`, `config`, `first_stage` and `ema=False`, or choose "
                "another `run_dir`"
            )
    with write_atomically(kept) as temporary:
        temporary.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    kept = folder / "conditions.sha256"
    digest = digest_of((conditions.context, conditions.concat, model.null_context))
    if resume and kept.is_file() and kept.read_text().strip() != digest:
        raise BidmError(
            f"{folder} was started with other contexts or conditions; resume with the same ones or choose "
            "another `run_dir`"
        )
    if len(conditions):
        with write_atomically(kept) as temporary:
            temporary.write_text(digest + "\n")


def check_same_data(folder: Path, summary: DataSummary, resume: bool) -> None:
    """Write what the data are; a resumed run must have the same, wherever they lie.

    Runs of earlier versions have no such record and are resumed with the data at hand.

    Raises:
        BidmError: other samples, or other labels or another range of the same ones.
    """
    kept, now = folder / "data.json", summary.to_json()
    if resume and kept.is_file():
        try:
            before = json.loads(kept.read_text(encoding="utf-8"))
            # Synthetic samples differ by recipe and seed alone, which the trainer compares.
            keys = _SAME_DATA[:1] if now["kind"] == before["kind"] == "synthetic" else _SAME_DATA
            differing = [key for key in keys if before[key] != now[key]]
            words = [_data_words(record) for record in (before, now)]
        except (ValueError, KeyError, TypeError) as error:
            raise BidmError(f"{kept} cannot be read ({error}); choose another `run_dir`") from error
        if differing:
            wrong = f"{words[0]}, not {words[1]}"
            if differing == ["labels_digest"]:
                wrong = f"other labels of {words[1]}"
            elif words[0] == words[1]:
                wrong = f"other {words[1]} (names, sizes, content or range differ)"
            raise BidmError(
                f"{folder} was started with {wrong}; resume with the same `data` or choose another `run_dir`"
            )
        return
    with write_atomically(kept) as temporary:
        temporary.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def _data_words(record: dict[str, Any]) -> str:
    if record["kind"] == "synthetic":
        return "samples of the original (no `data`)"
    return f"{record['count']:,} {record['kind']} of {record['name']}"


def _described(model: DiffusionModel) -> dict[str, Any]:
    """As JSON gives it back, with lists where there were tuples."""
    parts = {"unet": model.unet, "first_stage": model.first_stage, "conditioner": model.conditioner}
    tensors = {
        name: [*part.parameters(), *part.buffers()] if part is not None else []
        for name, part in parts.items()
    }
    weights = {name: digest_of(values) for name, values in tensors.items()}
    about = {"settings": model.metadata(), "weights": weights, "caveats": caveats_json(model)}
    described: dict[str, Any] = json.loads(json.dumps(about))
    return described


def digest_of(parts: Iterable[Tensor | None]) -> str:
    """SHA-256 of values in float32, whatever type they are in at the moment."""
    digest = hashlib.sha256()
    for part in parts:
        if part is None:
            digest.update(b"none")
        else:
            digest.update(part.detach().float().cpu().contiguous().numpy().reshape(-1).view("uint8").data)
    return digest.hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any], within: str = "") -> list[str]:
    """Names of what differs, such as "prediction epsilon, now v" or "architecture.unet.args.num_heads"."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        left, right, name = before.get(key), now.get(key), f"{within}{key}"
        if left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{name}.")
        elif len(f"{left}{right}") < 60:
            found.append(f"{name} {left}, now {right}")
        else:
            found.append(name)
    return found

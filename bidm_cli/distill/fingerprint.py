"""What a run was started with, kept in its folder, so that it is resumed with the same or not at all.

    keep_model(folder, model, resume)         # model.json: how the checkpoint was read, and its weights
    keep_conditions(folder, model, rows, resume)

The recipe and the seed are the trainer's to compare (:meth:`bidm_cli.distill.trainer.Trainer.resume`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically

_WORDS = {
    "unet": "other weights of the network",
    "first_stage": "another first stage",
    "conditioner": "another conditioner",
}


def keep_model(folder: Path, model: DiffusionModel, resume: bool) -> None:
    """Remember what the run distils from; a resumed run must have the same model, read the same way.

    Raises:
        BidmError: other weights, or other settings from ``--set``, ``--family``, ``--config`` or
            ``--first-stage``, than the run was started with.
    """
    kept, found = folder / "model.json", _described(model)
    if resume and kept.is_file():
        try:
            before = json.loads(kept.read_text(encoding="utf-8"))
            differing = _differences(before["settings"], found["settings"])
            weights = before["weights"]
            differing += [_WORDS[part] for part, value in found["weights"].items() if weights[part] != value]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BidmError(f"{kept} cannot be read ({error}); choose another --run-dir") from error
        if differing:
            raise BidmError(
                f"{folder} was started from another model ({', '.join(differing)}); resume with the same "
                "checkpoint, --set, --family, --config, --first-stage and --no-ema, or choose another "
                "--run-dir"
            )
    with write_atomically(kept) as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def keep_conditions(folder: Path, model: DiffusionModel, rows: ConditionSet, resume: bool) -> None:
    """Remember which contexts and conditions a run was started with; a resumed run must have the same.

    Raises:
        BidmError: other contexts or conditions than the run was started with.
    """
    kept, found = folder / "conditions.sha256", _digest((rows.context, rows.concat, model.null_context))
    if resume and kept.is_file() and kept.read_text().strip() != found:
        raise BidmError(
            f"{folder} was started with other contexts or conditions; resume with the same ones or choose "
            "another --run-dir"
        )
    if len(rows):
        with write_atomically(kept) as temporary:
            temporary.write_text(found + "\n")


def _described(model: DiffusionModel) -> dict[str, Any]:
    """As JSON gives it back, with lists where there were tuples."""
    parts = {"unet": model.unet, "first_stage": model.first_stage, "conditioner": model.conditioner}
    found: dict[str, Any] = json.loads(
        json.dumps(
            {
                "settings": model.metadata(),
                "weights": {name: _digest(_tensors(part)) for name, part in parts.items()},
            }
        )
    )
    return found


def _tensors(network: nn.Module | None) -> list[Tensor]:
    return [] if network is None else [*network.parameters(), *network.buffers()]


def _digest(parts: Iterable[Tensor | None]) -> str:
    """SHA-256 of values in float32, whatever type they are in at the moment."""
    digest = hashlib.sha256()
    for part in parts:
        if part is None:
            digest.update(b"none")
        else:
            digest.update(part.detach().float().cpu().contiguous().numpy().reshape(-1).view("uint8").data)
    return digest.hexdigest()


def _differences(before: dict[str, Any], now: dict[str, Any], within: str = "") -> list[str]:
    """Names of what differs, such as "prediction epsilon, now v" or "architecture.unet.args.num_heads"."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        left, right, name = before.get(key), now.get(key), f"{within}{key}"
        if left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            found += _differences(left, right, f"{name}.")
        elif len(f"{left}{right}") < 60:
            found.append(f"{name} {left}, now {right}")
        else:
            found.append(name)
    return found

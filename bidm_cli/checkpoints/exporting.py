"""Steps that the families' exporters share: writing, and saying a model's settings in a layout's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically


def write_checkpoint(path: Path, content: Any, config: dict[str, Any], suffix: str = ".json") -> Path:
    """Write a PyTorch file and its configuration beside it; returns the configuration's path.

    Raises:
        BidmError: the two names are the same, or there is no place to write.
    """
    config_path = path.with_suffix(suffix)
    if config_path == path:
        raise BidmError(f"{path} is where the configuration goes; name the checkpoint .ckpt or .pth")
    with write_atomically(path) as temporary:
        torch.save(content, temporary)
    with write_atomically(config_path) as temporary:
        text = json.dumps(config, indent=1) if suffix == ".json" else yaml.safe_dump(config, sort_keys=False)
        temporary.write_text(text, encoding="utf-8")
    return config_path


def square_side(model: DiffusionModel) -> int:
    """Side of the model's images; BidmError if they are not square."""
    _, height, width = model.sample_shape
    if height != width:
        raise BidmError(f"this layout has square images only, this model's are {height}x{width}")
    return height


def schedule_ends(model: DiffusionModel, kinds: Mapping[str, str] | None = None) -> tuple[str, float, float]:
    """(kind, first beta, last beta) of the model's schedule; BidmError if ``kinds``, the layout's words by
    ours, have none for it.
    """
    described, kinds = model.schedule.description, kinds or {"linear": "linear"}
    if described.get("kind") not in kinds:
        raise BidmError(f"this layout cannot say a noise schedule of kind {described.get('kind')!r}")
    return kinds[described["kind"]], described["start"], described["end"]


def name_of_schedule(model: DiffusionModel, known: Mapping[str, NoiseSchedule]) -> str:
    """Name of the schedule among ``known`` that is the model's; BidmError if it is none of them."""
    for name, schedule in known.items():
        if torch.allclose(schedule.alphas_cumprod, model.schedule.alphas_cumprod, rtol=1e-6, atol=0):
            return name
    raise BidmError(f"this layout cannot say the model's noise schedule, only its own {' or '.join(known)}")


def word_for(value: str, words: Mapping[Any, Any], what: str) -> Any:
    """The layout's word for ``value``; BidmError if it has none."""
    if value not in words:
        raise BidmError(f"this layout cannot say the {what} {value!r}, only {' or '.join(words)}")
    return words[value]

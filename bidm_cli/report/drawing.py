"""Images that a report compares, drawn from each model with the same seeds and conditions.

settings = common_settings(models, SamplingOptions())
drawn = draw_set(model, Path("model.bidm"), 64, settings)
drawn.path      # samples/report/model-0123abcd: drawn once, completed by later calls
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bidm_cli.data.condition_files import ConditionSource, gather
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.files import sha256_of
from bidm_cli.packed.model import PackedModel
from bidm_cli.parallel.processes import Processes
from bidm_cli.sampling.folder import SampleFolder
from bidm_cli.sampling.options import SamplingOptions
from bidm_cli.sampling.sample import Inputs, SamplingPlan, clipping

FOLDER = Path("samples", "report")
_RECORDED = ("steps", "sampler", "eta", "seed", "guidance", "skip")


@dataclass(frozen=True)
class DrawnSet:
    """Folder of images that a model drew.

    Attributes:
        seconds: per image, decoding included; None if all were there already, or several processes drew them.
        count: number of images.
        settings: all that the images depend on, under the names that ``bidm sample`` has for them.
        own_clip: what the model's own convention does with x0, where that is not what was done.
    """

    path: Path
    seconds: float | None = None
    count: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    own_clip: str | None = None


def common_settings(models: Sequence[DiffusionModel], options: SamplingOptions) -> SamplingOptions:
    """Settle steps, sampler, eta and clipping for all models.

    What is not given is the first packed one's recipe's. If one of them needs its x0 clipped (a binarized
    pixel model), that of all is: equal conditions.

    Raises:
        BidmError: as :meth:`bidm_cli.sampling.options.SamplingOptions.resolved`.
    """
    options = options.resolved(next((one for one in models if isinstance(one, PackedModel)), models[0]))
    clipped = any(clipping(one, options.sampler or "", options.clip) != "none" for one in models)
    return replace(options, clip=clipped or None) if options.clip is None else options


def draw_set(
    model: DiffusionModel,
    path: Path,
    n: int,
    options: SamplingOptions,
    conditions: ConditionSource = ConditionSource(),
    folder: Path = FOLDER,
    processes: Processes | None = None,
) -> DrawnSet:
    """Draw what is missing of images 0 to n - 1; the classes of a class-conditional model are used in turn.

    Args:
        path: the model's file, whose content the images' folder is named for.
        processes: share the drawing out.

    Raises:
        BidmError: conditions that are missing or do not fit, or a folder with more images than ``n``.
    """
    model, gathered = gather(model, conditions)
    plan = SamplingPlan.settle(model, options)
    classes = [label for label in range(model.num_classes or 0) if label != model.null_label]
    labels = torch.tensor([classes[i % len(classes)] for i in range(n)]) if classes else None
    inputs = Inputs(None, labels, conditions=gathered).checked(plan.model, n, len(plan.steps))
    record = _record(plan, path, classes, conditions)
    name = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    images = SampleFolder(folder / f"{path.stem or path.name}-{name}", record, n, processes=processes)
    drawn = images.fill(plan, inputs)
    alone = processes is None or processes.size == 1
    own = clipping(model, plan.options.sampler or "")
    return DrawnSet(
        images.path,
        drawn.seconds / drawn.images if drawn.images and alone else None,
        n,
        record,
        None if own == plan.clip else own,
    )


def _record(
    plan: SamplingPlan, path: Path, classes: list[int], conditions: ConditionSource
) -> dict[str, Any]:
    """All that the images depend on, under the names that ``bidm sample`` has for them."""
    files = {name: source for name, source in vars(conditions).items() if source is not None}
    return {
        "model": sha256_of(path) if path.is_file() else str(path.resolve()),
        "label": classes or None,
        **{name: getattr(plan.options, name) for name in _RECORDED},
        "clip": plan.clip,
        **{name.replace("_", "-"): sha256_of(Path(source)) if Path(source).is_file() else str(source)
           for name, source in files.items()},
    }  # fmt: skip

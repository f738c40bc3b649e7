"""The noise that Stability's upscalers put on the small image, from ``low_scale_config`` or buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.checkpoints.reading.schedules import one_line, schedule_from_buffers
from bidm_cli.checkpoints.reading.state import with_prefix
from bidm_cli.diffusion.augmentation import NoiseAugmentation
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

_PREFIX = "low_scale_model."
_LEVELS = 350


@dataclass(frozen=True)
class LowScale:
    """Settings of a configuration; ``schedule`` is None where the image is taken without noise."""

    schedule: NoiseSchedule | None
    levels: int


def read_low_scale(model: Section) -> LowScale | None:
    """``low_scale_config`` of ``model.params``; None if there is none.

    Raises:
        BidmError: settings of the wrong type, or of a model that bidm does not have.
    """
    if "low_scale_config" not in model:
        return None
    section = model.section("low_scale_config")
    name = section.text("target").rpartition(".")[2]
    if name == "SimpleImageConcat":
        return LowScale(None, 1)
    if name != "ImageConcatWithNoiseAugmentation":
        raise BidmError(f"{section.where}: the low-resolution model {name!r} is not supported")
    params = section.section("params")
    schedule = params.section("noise_schedule_config")
    kind = schedule.text("beta_schedule", "linear")
    timesteps = schedule.integer("timesteps", 1000)
    ends = (schedule.number("linear_start", 1e-4), schedule.number("linear_end", 2e-2))
    if kind != "linear" or not 2 <= timesteps <= 100_000 or not 0 < ends[0] <= ends[1] < 1:
        raise BidmError(f"{schedule.where}: no schedule of noise levels that bidm knows ({kind})")
    levels = params.integer("max_noise_level", 1000)
    if not 1 <= levels <= timesteps:
        raise params.wrong("max_noise_level", f"1 to {timesteps}", levels)
    return LowScale(NoiseSchedule.scaled_linear(timesteps, *ends), levels)


def augmentation_of(
    configured: LowScale | None, tensors: Mapping[str, Tensor], notes: list[str]
) -> NoiseAugmentation | None:
    """The noise of a model's small images; the file's buffers come before the configuration.

    Raises:
        BidmError: the buffers are no noise schedule.
    """
    schedule = None if configured is None else configured.schedule
    found = schedule_from_buffers(with_prefix(tensors, _PREFIX), schedule)
    if found is not None:
        schedule = found[0]
    if schedule is None:
        return None
    levels, reason = (
        (_LEVELS, "assumed, as the published one") if configured is None else (configured.levels, "")
    )
    levels = min(levels, schedule.timesteps)
    notes.append(
        f"the small image gets noise of the level that the label says, 0 to {levels - 1} "
        f"({', '.join(filter(None, [one_line(schedule), reason]))})"
    )
    return NoiseAugmentation(schedule, levels)

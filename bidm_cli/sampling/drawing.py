"""Fill a folder with the samples of a plan: the work of ``bidm sample``."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from bidm_cli.sampling.folder import SampleFolder
from bidm_cli.sampling.images import decode
from bidm_cli.sampling.sample import Inputs, SamplingPlan


@dataclass(frozen=True)
class Drawn:
    """What a run added to a folder: images drawn, of them not finite, and seconds for all of it."""

    images: int
    not_finite: int
    seconds: float


def fill(folder: SampleFolder, plan: SamplingPlan, inputs: Inputs, labels: list[int] | None = None) -> Drawn:
    """Draw the images that ``folder`` is missing, keep each group as it is done, and finish the folder.

    Args:
        inputs: checked for ``folder.n`` images from number 0.
        labels: class of each image, for the array's own labels.

    Raises:
        BidmError: the folder cannot be written to, or the disk is full.
    """
    missing = set(folder.missing())
    lanes = [lane for lane in plan.lanes(0, folder.n) if missing.intersection(lane.numbers)]
    not_finite, began = 0, time.perf_counter()
    with tqdm(total=len(lanes) * len(plan.steps), unit="step", desc="sampling", disable=None) as bar:
        for lane in lanes:
            # A whole lane even if few are missing: on a GPU the bits depend on its size.
            latents = plan.run(lane, inputs, bar.update)
            wanted = [i for i, number in enumerate(lane.numbers) if number in missing]
            not_finite += int((~torch.isfinite(latents[wanted]).flatten(1).all(dim=1)).sum())
            images = decode(plan.model, latents[wanted]) if folder.images else None
            for position, i in enumerate(wanted):
                image = None if images is None else images[position]
                folder.add(lane.numbers[i], image, latents[i].cpu().numpy())
    folder.finish(labels)
    return Drawn(len(missing), not_finite, time.perf_counter() - began)

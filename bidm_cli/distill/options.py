"""Settings of a compression besides its recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bidm_cli.distill.training_data import DataOptions
from bidm_cli.distill.trajectory import TRAJECTORY_POINTS
from bidm_cli.errors import BidmError
from bidm_cli.recipe import Recipe


@dataclass(frozen=True)
class CompressOptions(DataOptions):
    """Settings of one run besides its recipe and its data (:class:`DataOptions`).

    Attributes:
        steps, batch_size, lr, amp, accumulate, checkpoint_activations: override the recipe's ``train``;
            ``lr`` keeps lr_binary's proportion; the last three are those of ``first_stage.train``, too.
        decoder_steps: overrides steps of the latter.
        seed: decides every random choice; the same seed gives the same bytes (CPU, same threads).
        run_dir: see :mod:`bidm_cli.distill.runs`. resume: continue the run there.
        skip_nan: steps in a row that may be left out because their loss or gradient is not finite; 0 stops
            at the first.
        trajectory_points: steps of the teacher's path along which the trajectory error is measured at the
            end; 0 leaves it out.
    """

    steps: int | None = None
    decoder_steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    amp: str | None = None
    accumulate: int | None = None
    checkpoint_activations: bool | None = None
    device: str | torch.device = "cpu"
    seed: int = 0
    run_dir: str | Path | None = None
    resume: bool = False
    skip_nan: int = 0
    trajectory_points: int = TRAJECTORY_POINTS

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with these options in place of its own; BidmError for a value out of range."""
        train = recipe.train
        lr_binary = self.lr * train.lr_binary / train.lr if self.lr and train.lr else None
        names = ("steps", "batch_size", "lr", "amp", "accumulate", "checkpoint_activations")
        own = {name: getattr(self, name) for name in names}
        recipe = recipe.override("train", lr_binary=lr_binary, **own)
        if not recipe.first_stage.is_binary:
            if self.decoder_steps is not None:
                raise BidmError(
                    "`decoder_steps` is for a binary first stage; give a recipe with layers under "
                    "first_stage, such as w1a2-decoder"
                )
            return recipe
        decoder = {name: own[name] for name in names[3:]} | {"steps": self.decoder_steps}
        changes: dict[str, Any] = {name: value for name, value in decoder.items() if value is not None}
        return recipe.override("first_stage", train=dataclasses.replace(recipe.first_stage.train, **changes))

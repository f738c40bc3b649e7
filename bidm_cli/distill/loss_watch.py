"""Losses since the last row of the log, and the steps whose loss is not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from bidm_cli.errors import BidmError


class LossWatch:
    """Values of the steps since the last row of the log, and what a step is worth that is not finite.

    Args:
        seed: of the run, for messages.
        skip_nan: steps in a row that may be left out; 0 stops at the first. The values are read after each
            step then, for which a GPU is waited for; with 0 they are read once per row.
        scaled: the loss is scaled (float16): a gradient that is not finite is the scaler's own business.

    ``skipped`` lists the steps that were left out.
    """

    def __init__(self, seed: int, skip_nan: int = 0, scaled: bool = False) -> None:
        self.seed, self.skip_nan, self.scaled = seed, skip_nan, scaled
        self.values: list[Tensor] = []
        self.skipped: list[int] = []

    def is_usable(self, step: int, values: Tensor) -> bool:
        """Keep the losses of a step and the norm of its gradient, [V] with the latter last; 1 is the first.

        False if the step is to be left out.

        Raises:
            BidmError: more steps in a row than ``skip_nan`` are not finite.
        """
        if self.skip_nan and not self._finite(values[None])[0]:
            self.skipped.append(step)
            in_a_row = sum(step - i == one for i, one in enumerate(reversed(self.skipped)))
            if in_a_row > self.skip_nan:
                raise BidmError(
                    f"{self._what(step)}, nor at the {self.skip_nan} steps before, which were left out "
                    "(`skip_nan`); start a new run with a lower `lr` or a smaller train.clip"
                )
            return False
        self.values.append(values)
        return True

    def check(self, step: int) -> None:
        """Raise BidmError if a kept value is not finite; ``step`` is the last one that was taken."""
        if self.skip_nan or not self.values:
            return
        finite = self._finite(torch.stack(self.values))
        if not all(finite):
            first = step - len(finite) + finite.index(False) + 1
            raise BidmError(
                f"{self._what(first)}; `resume` with `skip_nan` leaves such steps out, from the last state "
                "that was saved; else start a new run with a lower `lr` or a smaller train.clip"
            )

    def take_means(self) -> list[float] | None:
        """Means [V] of the kept values, which are kept no longer; None if there are none."""
        if not self.values:
            return None
        means: list[float] = torch.stack(self.values).mean(dim=0).tolist()
        self.values.clear()
        return means

    def _finite(self, values: Tensor) -> list[bool]:
        """For each of the steps [K, V], whether it may be taken."""
        values = values[:, :-1] if self.scaled else values
        finite: list[bool] = torch.isfinite(values).all(dim=1).tolist()
        return finite

    def _what(self, step: int) -> str:
        return f"the loss or its gradient is no longer finite at step {step} (seed {self.seed})"

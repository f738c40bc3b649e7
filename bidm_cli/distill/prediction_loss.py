"""Loss on the network's output where student and teacher may predict different things.

With alpha = sqrt(alpha-bar), sigma = sqrt(1 - alpha-bar), F the student's output and T the teacher's in the
student's terms, the loss is |F - T|^2 for a student that predicts the noise (or, with ``predict: teacher``,
whatever the teacher does), and alpha |F - T|^2 for one that predicts v or x0. For v that is
alpha^-1 |eps_S - eps_T|^2: between an error in v, which spends itself at the noisy end, and one in the noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bidm_cli.sampling.prediction import Prediction, converted

_LEAST_ALPHA = 1e-4
"""Below it a teacher's noise says nothing of the image, and the loss is zero."""


class OutputTarget(NamedTuple):
    """Target of the student's output, times ``weight``; the weight [N, C, 1, 1] is None for 1."""

    value: Tensor
    weight: Tensor | None = None

    def loss(self, output: Tensor) -> Tensor:
        """Mean squared error of the output [N, C or 2C, H, W], a scalar in float32."""
        output = output[:, : self.value.shape[1]].float()
        weighted = output if self.weight is None else output * self.weight
        return (weighted - self.value.float()).square().mean()


def output_target(
    output: Tensor, x: Tensor, alpha_bar: Tensor, teacher: Prediction, student: Prediction | None
) -> OutputTarget:
    """Target of a student that predicts ``student``, or None for what the teacher does.

    Args:
        output: of the teacher, [N, C or 2C, H, W]; channels beyond those of x (a learned variance) keep their
            meaning.
        x: [N, C, H, W]. alpha_bar: [N, 1, 1, 1].
    """
    if student is None:
        return OutputTarget(output)
    channels = x.shape[1]
    own, rest = output[:, :channels], output[:, channels:]
    if student == "epsilon":
        return OutputTarget(torch.cat([converted(own, x, alpha_bar, teacher, student), rest], dim=1))
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if teacher == "epsilon":
        # alpha T, so that nothing is divided by an alpha that may be 0 (zero terminal SNR).
        scaled = own - sigma * x if student == "v" else x - sigma * own
        known = alpha >= _LEAST_ALPHA
        own = torch.where(known, scaled / alpha.clamp(min=_LEAST_ALPHA).sqrt(), torch.zeros_like(scaled))
        alpha = torch.where(known, alpha, torch.zeros_like(alpha))
    else:
        own = alpha.sqrt() * converted(own, x, alpha_bar, teacher, student)
    weight = alpha.sqrt().expand(-1, channels, -1, -1)
    return OutputTarget(
        torch.cat([own, rest], dim=1), torch.cat([weight, torch.ones_like(rest[:, :, :1, :1])], dim=1)
    )

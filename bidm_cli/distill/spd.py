"""Space Patched Distillation (SPD): teach the student where the teacher's features attend, patch by patch.

    spd = SpacePatchedDistillation(patches=4)
    loss = spd(student_features, teacher_features)          # a scalar; features are lists of [N, C, H, W]

Binary features cannot match a float teacher's values, but their local self-similarity can be compared
(BiDM, arXiv 2412.05926, sec. 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class FeatureMSE:
    """Mean squared error of features, averaged over blocks: the plain alternative to SPD."""

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        return self.compare(student, self.targets(teacher))

    def targets(self, teacher: Sequence[Tensor]) -> list[Tensor]:
        """Compared parts of the teacher's features, one per block."""
        return [self.compared(feature) for feature in teacher]

    def compare(self, student: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Loss of the student's features against :meth:`targets`."""
        pairs = zip(student, targets, strict=True)
        return torch.stack(
            [self.distance(self.compared(feature), target) for feature, target in pairs]
        ).mean()

    def compared(self, feature: Tensor) -> Tensor:
        """Part of one block's feature, [N, C, H, W] or tokens [N, L, D], that is compared."""
        return feature.float()

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distance of a block's :meth:`compared` parts, a scalar."""
        return (student - teacher).square().mean()


class SpacePatchedDistillation(FeatureMSE):
    """Distance of normalised patch attention maps, averaged over patches, samples and blocks.

    A feature F [N, C, H, W] is cut into p x p patches of h x w; a patch has the map G = F F^T [C, h, h] over
    its last axis, and

        loss = || G_s / ||G_s||_F - G_t / ||G_t||_F ||_2

    The norms are taken per sample and patch, so the loss does not depend on the batch size (the published
    code normalises over the whole batch). p shrinks on small maps until a patch has at least 2 x 2 pixels:
    the map of a single pixel says nothing.

    Args:
        patches: p, patches along each side.
    """

    def __init__(self, patches: int = 4) -> None:
        self.patches = patches

    def compared(self, feature: Tensor) -> Tensor:
        """Attention maps of one block's feature."""
        feature = as_map(feature).float()
        return attention_maps(feature, patches_for(feature.shape[-2], feature.shape[-1], self.patches))

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return torch.linalg.vector_norm(student - teacher, dim=(2, 3, 4)).mean()


def attention_maps(feature: Tensor, patches: int) -> Tensor:
    """Normalised maps G/||G|| of every patch: [N, C, H, W] -> [N, p*p, C, h, h]."""
    n, c, height, width = feature.shape
    h, w = height // patches, width // patches
    cut = feature.reshape(n, c, patches, h, patches, w).permute(0, 2, 4, 1, 3, 5)
    cut = cut.reshape(n, patches * patches, c, h, w)
    maps = cut @ cut.transpose(-1, -2)
    norm = torch.linalg.vector_norm(maps, dim=(2, 3, 4), keepdim=True)
    return maps / norm.clamp_min(1e-12)


def patches_for(height: int, width: int, patches: int) -> int:
    """The largest p <= ``patches`` that divides both sides and leaves patches of at least 2 x 2; else 1."""
    fitting = [
        p
        for p in range(1, patches + 1)
        if height % p == 0 and width % p == 0 and min(height, width) // p >= 2
    ]
    return max(fitting, default=1)


def as_map(feature: Tensor) -> Tensor:
    """Features as [N, C, H, W]; tokens [N, L, D] become a square map, without the one or two in front that
    stand for time and label where there are any; a column where no square comes out.
    """
    if feature.dim() == 4:
        return feature
    side = math.isqrt(feature.shape[1])
    if 0 < feature.shape[1] - side * side <= 2 < side:
        feature = feature[:, -side * side :]
    n, length, width = feature.shape
    rows, columns = (side, side) if side * side == length else (length, 1)
    return feature.transpose(1, 2).reshape(n, width, rows, columns)

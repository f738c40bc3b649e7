"""Where clean samples x0 come from: images given by the user, or the teacher's own samples (data-free).

data = open_data(teacher, "digits.npz")
x0, given = data.batch(torch.tensor([3, 14, 15]), generator)      # latents or pixels [3, C, H, W], Condition
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bidm_cli.data.concat import image_shape
from bidm_cli.data.image_sets import fit, read_image_set, to_channels
from bidm_cli.diffusion.condition import Condition, ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically
from bidm_cli.sampling.sample import sample

CACHE_BYTES = 2 << 30
"""Encoded images are kept up to this much memory; beyond it they are encoded anew each time."""


class TrainingData(Protocol):
    """Clean samples by number."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """(x0 [N, C, H, W] as the network denoises them, their conditions) for indices [N].

        ``generator`` draws what does not belong to one sample.
        """
        ...


class GivenConditions:
    """The conditions of given samples: labels and channels by the sample's number, contexts by lot.

    Args:
        labels: [M], or None. rows: contexts and channels. paired: context k belongs to sample k.

    Raises:
        BidmError: they do not fit the model or the ``count`` samples.
    """

    def __init__(
        self,
        model: DiffusionModel,
        count: int,
        labels: Tensor | None,
        rows: ConditionSet,
        paired: bool = False,
    ) -> None:
        model.check(labels, rows.whole)
        if rows.concat is not None and len(rows.concat) not in (1, count):
            raise BidmError(
                f"--condition holds {len(rows.concat)} conditions for {count} samples of --data; give one "
                "for each, in the same order, or leave out --data"
            )
        self.model, self.labels, self.rows, self.paired = model, labels, rows, paired

    @torch.no_grad()
    def of(self, indices: Tensor, generator: torch.Generator) -> Condition:
        """The conditions of samples ``indices`` [N], on the model's device."""
        rows = self.rows.take(indices)
        context = self.rows.context
        if context is not None and len(context) > 1 and not self.paired:
            drawn = torch.randint(len(context), (len(indices),), generator=generator)
            rows = Condition(context=context[drawn], concat=rows.concat)
        return self.model.given(None if self.labels is None else self.labels[indices], rows)


class ImageData:
    """Images of a folder, zip or npz: centre-cropped, resized, encoded by the first stage, cached.

    Args:
        rows: contexts and conditioning channels. paired: context k belongs to image k.

    Raises:
        BidmError: nothing readable there, or labels or ``rows`` that do not fit the model.
    """

    def __init__(
        self,
        model: DiffusionModel,
        path: str | Path,
        rows: ConditionSet | None = None,
        paired: bool = False,
    ) -> None:
        self.model, self.images = model, read_image_set(path)
        self.channels, self.height, self.width = image_shape(model)
        labels = labels_for(model, self.images.labels, path)
        self.given = GivenConditions(model, len(self.images), labels, rows or ConditionSet(), paired)
        size = int(np.prod(model.sample_shape)) * 4
        self._cacheable = len(self.images) * size <= CACHE_BYTES
        self._cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Condition]:
        wanted = indices.tolist()
        missing = [i for i in dict.fromkeys(wanted) if i not in self._cache]
        found: dict[int, Tensor] = {}
        if missing:
            pixels = torch.stack([self._pixels(i) for i in missing]).to(self.model.device)
            found = dict(zip(missing, self.model.encode(pixels), strict=True))
            if self._cacheable:
                self._cache.update(found)
        x0 = torch.stack([found[i] if i in found else self._cache[i] for i in wanted])
        return x0, self.given.of(indices, generator)

    def _pixels(self, index: int) -> Tensor:
        """One image in [-1, 1], [channels, height, width]."""
        pixels = to_channels(self.images[index], self.channels)
        pixels = fit(pixels, self.height, self.width)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def labels_for(model: DiffusionModel, found: np.ndarray | None, path: str | Path) -> Tensor | None:
    """The labels of a data set as the model takes them, [M]; None for models without classes.

    Raises:
        BidmError: there are none, or they go beyond the model's classes.
    """
    if model.num_classes is None:
        return None
    if found is None:
        raise BidmError(
            f"{path}: the model is class-conditional and these images have no labels; put them into "
            "one folder per class, give an .npz with labels, or use --synthetic"
        )
    labels = torch.from_numpy(np.asarray(found)).long()
    if int(labels.max()) >= model.num_classes:
        raise BidmError(
            f"{path}: labels go up to {int(labels.max())}, the model has {model.num_classes} classes"
        )
    return labels


class SyntheticData:
    """The teacher's own samples, drawn once and kept in the run's folder; a rerun continues drawing.

    Args:
        folder: where the pieces are written. count: how many samples. steps: DDIM steps for each.
        progress: called with the number drawn so far.
        rows: contexts and channels; sample k is drawn, and trained on, under a row drawn for it.
    """

    PIECE = 64

    def __init__(
        self,
        model: DiffusionModel,
        folder: Path,
        count: int,
        steps: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        rows: ConditionSet | None = None,
    ) -> None:
        labels, pieces = None, []
        generator = torch.Generator().manual_seed(seed)
        if model.num_classes is not None:
            labels = torch.randint(model.num_classes, (count,), generator=generator)
        rows = rows or ConditionSet()
        drawn = torch.randint(max(1, len(rows)), (count,), generator=generator)
        self.model, self.labels, self.rows, self.drawn = model, labels, rows, drawn
        for first in range(0, count, self.PIECE):
            size = min(self.PIECE, count - first)
            file = folder / f"synthetic-{first:06d}.npy"
            if not file.is_file():
                under = rows.take(drawn[first : first + size])
                x0 = sample(
                    model,
                    n=size,
                    first=first,
                    steps=steps,
                    seed=seed,
                    labels=None if labels is None else labels[first : first + size],
                    context=under.context,
                    condition=under.concat,
                )
                with write_atomically(file) as temporary:
                    np.save(temporary, x0.cpu().numpy())
            pieces.append(torch.from_numpy(np.load(file, allow_pickle=False)))
            if progress is not None:
                progress(first + size, count)
        self.x0, self.device = torch.cat(pieces), model.device

    def __len__(self) -> int:
        return len(self.x0)

    def batch(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Condition]:
        labels = None if self.labels is None else self.labels[indices]
        with torch.no_grad():
            given = self.model.given(labels, self.rows.take(self.drawn[indices]))
        return self.x0[indices].to(self.device), given

"""Images as training data: read in order by several threads, encoded once, and kept.

data = ImageData(teacher, "digits.npz", ConditionSet())
x0, condition = data.batch(torch.tensor([3, 14, 15]), generator)  # latents or pixels [3, C, H, W], Condition
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bidm_cli.data.array_images import digest_of_array, max_value
from bidm_cli.data.concat import image_shape
from bidm_cli.data.image_check import check_images
from bidm_cli.data.image_files import FileImages, ImageSet
from bidm_cli.data.image_sets import fit, read_image_set, to_channels
from bidm_cli.data.summary import DataSummary, bad_text, sizes_text
from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.image_reader import ImageReader, default_workers
from bidm_cli.distill.latents_cache import (
    LatentsCache,
    has_latents,
    latents_key,
    latents_limit,
    open_latents,
)
from bidm_cli.distill.training_data import DataOptions, FileData
from bidm_cli.errors import BidmError
from bidm_cli.progress import Reporter
from bidm_cli.transfer import to_device

KEPT_BYTES = 2 << 30
"""Samples of a data set up to this size are kept in main memory."""
UNREADABLE = 10
"""Images that may fail while they are decoded (or 1 % of them, if that is more) before training stops."""


class ImageData(FileData):
    """Images of a folder, archive or array: centre-cropped, resized, encoded by the first stage, cached.

    All files are looked at first, and those that cannot be used are left out or refused. One that only fails
    when it is decoded is left out then: the next one that can be read takes its place.

    Raises:
        BidmError: nothing readable there, or as :class:`FileData`.
    """

    def __init__(
        self,
        model: DiffusionModel,
        path: str | Path,
        conditions: ConditionSet = ConditionSet(),
        options: DataOptions = DataOptions(),
        reporter: Reporter = Reporter(),
    ) -> None:
        self.images, shape = read_image_set(path, options.data_labels), image_shape(model)
        self.options, self.reporter = options, reporter
        summary = DataSummary("images", Path(path), len(self.images), values="0 to 255 scaled to [-1, 1]")
        if isinstance(self.images, FileImages):
            summary, conditions = self._look(self.images, summary, conditions)
        else:
            first = self.images[0].shape
            digest = digest_of_array(Path(path))
            summary = replace(summary, size=f"{first[1]}x{first[0]}", digest=digest)
            self._content = self._array_content(digest)
        summary = replace(summary, notes=(*self.images.notes, *summary.notes))
        super().__init__(model, summary, self.images.labelling, conditions)
        limit = latents_limit() if options.latents_cache and has_latents(model) else 0
        self._on_disk, self._disk_limit = bool(limit), limit
        self._disk: LatentsCache | None = None
        self._keeps = len(self.images) * int(np.prod(model.sample_shape)) * 4 <= KEPT_BYTES
        self._kept: dict[int, Tensor] = {}
        self._unreadable: set[int] = set()
        self._reader = ImageReader(partial(_pixels, self.images, shape), default_workers())

    def expect(self, indices: Tensor) -> None:
        numbers = dict.fromkeys(indices.tolist())
        self._reader.expect(i for i in numbers if i not in self._kept and self._stored(i) is None)

    def _look(
        self, images: FileImages, summary: DataSummary, conditions: ConditionSet
    ) -> tuple[DataSummary, ConditionSet]:
        """Look at all files and leave out those that cannot be used, and their conditions with them."""
        check = check_images(images, self.reporter)
        if check.bad and self.options.bad_images == "refuse":
            raise BidmError(
                f"{summary.path}: {len(check.bad):,} of {len(images):,} images cannot be used: "
                f"{bad_text(check.bad)}; mend or remove them, or leave them out (`bad_images`=leave-out)"
            )
        if not len(check.kept):
            raise BidmError(
                f"{summary.path}: none of {len(images):,} images can be used: {bad_text(check.bad)}"
            )
        concat = conditions.concat
        if check.bad and concat is not None and len(concat) == len(images) > 1:
            conditions = replace(conditions, concat=concat[torch.from_numpy(check.kept)])
        self.images, self._content = images.keep(check.kept), check.content_digest()
        turned = f"{check.turned:,} turned upright by their EXIF orientation" if check.turned else ""
        return replace(
            summary,
            count=len(check.kept),
            size=sizes_text(check.sizes),
            digest=check.digest(),
            left_out=check.bad,
            notes=(turned,) if turned else (),
        ), conditions

    def _array_content(self, digest: str) -> str:
        """Digest of an array's images as they are read, whatever its layout and white."""
        about = f"{digest} {len(self.images)} {max_value(self.images.path)}"
        ends = b"".join(repr(one.shape).encode() + one.tobytes() for one in (self.images[0], self.images[-1]))
        return hashlib.sha256(about.encode() + ends).hexdigest()

    def _x0(self, indices: Tensor) -> Tensor:
        wanted = indices.tolist()
        found = {i: self._kept[i] for i in wanted if i in self._kept}
        missing = [i for i in dict.fromkeys(wanted) if i not in found]
        new = {i: z for i in missing if (z := self._stored(i)) is not None}
        new |= self._encoded([i for i in missing if i not in new])
        if self._keeps:
            self._kept.update(new)
        found |= new
        return torch.stack([found[i] for i in wanted])

    def _stored(self, index: int) -> Tensor | None:
        """Latents of an image from the disk."""
        if self._on_disk and self._disk is None:
            # The number of threads is part of the key, and known where the encoding is done.
            key = latents_key(self.model, self._content)
            shape, say = self.model.sample_shape, self.reporter.say
            self._disk = open_latents(key, len(self), shape, self._disk_limit, say)
            self._on_disk = self._disk is not None
        found = None if self._disk is None else self._disk.read(index)
        return None if found is None else to_device(found, self.model.device)

    def _encoded(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """Samples of images by number.

        Encoded one by one: in a batch the last bits of an image depend on its place (measured:
        :mod:`bidm_cli.sampling.fixed_batch`), and so would depend on what was encoded before.
        """
        if not indices:
            return {}
        self._reader.expect(indices)
        numbers, images = zip(*(self._readable(i) for i in indices), strict=True)
        pixels = to_device(torch.from_numpy(np.stack(images)), self.model.device)
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        encoded = [self.model.encode(one[None])[0].float() for one in pixels.contiguous()]
        for index, number, latents in zip(indices, numbers, encoded, strict=True):
            # What takes the place of an image that cannot be read is not what that image is.
            if self._disk is not None and index == number:
                self._disk.write(index, latents)
        return dict(zip(indices, encoded, strict=True))

    def _readable(self, index: int) -> tuple[int, np.ndarray]:
        """(number, pixels uint8 [H, W, C]) of image ``index``, or of the next one that can be read."""
        count = len(self.images)
        for i in (number % count for number in range(index, index + count)):
            if i in self._unreadable:
                continue
            try:
                return i, self._reader.take(i)
            except BidmError as error:
                if self.options.bad_images == "refuse":
                    raise BidmError(f"{error} (`bad_images`=leave-out does without it)") from error
                self._unreadable.add(i)
                if len(self._unreadable) > max(UNREADABLE, count // 100):
                    raise BidmError(f"{error}; {len(self._unreadable)} images fail by now") from error
                self.reporter.say(f"Left out from here on: {error}; the next image takes its place")
        raise BidmError(f"{self.summary.path}: no image can be read any more")


def _pixels(images: ImageSet, shape: tuple[int, int, int], index: int) -> np.ndarray:
    """Image ``index`` cropped and resized to ``shape`` [C, H, W], uint8 [H, W, C]."""
    channels, height, width = shape
    return fit(to_channels(images[index], channels), height, width)

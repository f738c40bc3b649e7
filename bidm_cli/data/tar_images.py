"""Images of tar archives: one, or the numbered shards of a webdataset, read in place and never extracted.

In a webdataset (https://github.com/webdataset/webdataset) the files of a sample share the name up to its
first dot: 000001.jpg, 000001.cls, 000001.json. The class is in the .cls; .json and .txt are not used.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from bidm_cli.data.image_files import (
    FileImages,
    image_names,
    is_hidden,
    is_image,
    is_label_file,
    labels_of_files,
    no_images,
)
from bidm_cli.data.label_files import cls_labels
from bidm_cli.data.labels import Labels
from bidm_cli.data.tar_index import TAR_SUFFIXES, TarIndex
from bidm_cli.errors import BidmError

MOST_SHARDS = 100_000
_SAMPLE = frozenset({"cls", "json", "txt"})
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")


class TarImages(FileImages):
    """Images of one or several archives; of several, each name begins with that of its archive.

    Raises:
        BidmError: an archive that is missing, damaged or cut short, or no images.
    """

    def __init__(self, path: Path, shards: Sequence[Path], labels: str | Path | None, upright: bool) -> None:
        indices = [
            TarIndex.read(shard, lambda name: is_image(name) or is_label_file(name)) for shard in shards
        ]
        samples = [_samples(index) for index in indices]
        prefixes = [""] if len(shards) == 1 else [f"{shard}/" for shard in _names(shards)]
        self._places: dict[str, tuple[TarIndex, str]] = {
            prefix + name: (index, name)
            for prefix, index, names in zip(prefixes, indices, samples, strict=True)
            for name in names
        }
        if not self._places:
            raise BidmError(_no_images(path, indices))
        images = list(self._places)
        labelling = self._labelling(indices, images, labels)
        super().__init__(path, images, labelling, upright, _notes(indices, samples))

    def __getitem__(self, index: int) -> np.ndarray:
        with self.open(index) as handle:
            return self._decoded(handle, f"{self.names[index]} in {self.path}")

    def stamp(self, index: int) -> tuple[int, int]:
        archive, name = self._places[self.names[index]]
        entry = archive.files[name]
        return entry.size, archive.time + entry.offset

    def open(self, index: int) -> IO[bytes]:
        archive, name = self._places[self.names[index]]
        return archive.open(name)

    def _labelling(self, indices: Sequence[TarIndex], images: list[str], labels: str | Path | None) -> Labels:
        """Labels from .cls files where there are any, else as in a folder or zip, whatever the archive."""
        if labels is None and any(index.texts for index in indices):
            places = (self._places[image] for image in images)
            return cls_labels(images, [index.texts.get(_key(name) + ".cls") for index, name in places])
        if len(indices) == 1:
            return labels_of_files(images, list(indices[0].files), labels, indices[0].content)
        if labels is not None and labels not in ("folders", "names", "imagenet"):
            return labels_of_files(images, [], labels, indices[0].content)
        return labels_of_files([name for _, name in self._places.values()], [], labels, indices[0].content)


def shards_of(path: Path) -> list[Path] | None:
    """Archives that a name with braces stands for, as train-{0000..0146}.tar; None for other names.

    Raises:
        BidmError: there is none, or one is missing.
    """
    if not _BRACES.search(str(path)):
        return None
    names = list(dict.fromkeys(itertools.islice(_expanded(str(path)), MOST_SHARDS + 1)))
    if len(names) > MOST_SHARDS:
        raise BidmError(f"{path} stands for over {MOST_SHARDS:,} files")
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise BidmError(f"{path}: {len(missing):,} of {len(names):,} files are missing (first {missing[0]})")
    return [Path(name) for name in names]


def archives_among(names: Sequence[str]) -> list[str]:
    """Those that name tar archives, sorted; hidden ones left out."""
    found = (name for name in names if name.lower().endswith(TAR_SUFFIXES))
    return sorted(name for name in found if not is_hidden(name))


def _expanded(text: str) -> Iterator[str]:
    """Names that a pattern stands for: {000..146} counts, {a,b} lists, as in a shell."""
    braces = _BRACES.search(text)
    if braces is None:
        yield text
        return
    numbers = _RANGE.fullmatch(braces[1])
    values: Iterator[str] | list[str] = braces[1].split(",")
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2])
        width = (
            max(len(digits) for digits in numbers.groups()) if "0" in (numbers[1][0], numbers[2][0]) else 0
        )
        step = 1 if last >= first else -1
        values = (f"{number:0{width}d}" for number in range(first, last + step, step))
    for value in values:
        yield from _expanded(text[: braces.start()] + value + text[braces.end() :])


def _names(shards: Sequence[Path]) -> list[str]:
    """Names of archives, with as much of their folders as tells them apart."""
    names = [shard.name for shard in shards]
    return names if len(set(names)) == len(names) else [shard.as_posix() for shard in shards]


def _key(name: str) -> str:
    """Name of a webdataset's sample: a file's, up to the first dot in its last part."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _samples(index: TarIndex) -> list[str]:
    """Names of an archive's images; in a webdataset, one for each sample: others are masks and the like."""
    images = image_names(list(index.files))
    keys = {_key(name) for name in images}
    if not any(_key(name) in keys for name in index.files if name.rpartition(".")[2] in _SAMPLE):
        return images
    found: dict[str, str] = {}
    for name in sorted(images, key=lambda name: (name.rpartition("/")[2].count("."), name)):
        found.setdefault(_key(name), name)
    return sorted(found.values())


def _notes(indices: Sequence[TarIndex], samples: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Lines on what is left out of archives, and how many there are."""
    left_out = sum((index.left_out for index in indices), Counter[str]())
    notes = [f"{len(indices):,} tar archives"] if len(indices) > 1 else []
    if left_out:
        kinds = ", ".join(f"{count:,} x {kind}" for kind, count in sorted(left_out.items()))
        notes.append(f"left out of the archive: {kinds}")
    repeated = sum(index.repeated for index in indices)
    if repeated:
        notes.append(f"{repeated:,} names occur again in their archive, the last of each is taken")
    others = sum(
        len(image_names(list(index.files))) - len(names)
        for index, names in zip(indices, samples, strict=True)
    )
    if others:
        notes.append(f"{others:,} further images of the same samples (masks and the like) are not used")
    return tuple(notes)


def _no_images(path: Path, indices: Sequence[TarIndex]) -> str:
    inside = [name for index in indices for name in archives_among(list(index.files))]
    if inside:
        return f"{path} holds archives ({inside[0]}, ...) and no images; unpack it, and take the folder"
    return no_images(path)

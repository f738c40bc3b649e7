"""Class labels of images: from folders, file names or numbers, and how they meet a model's classes.

    labels = folder_labels(["cat/1.png", "dog/2.png"])
    labels.of_model(classes=2, null_label=None, where="data")    # int64 [N], and how in words

Names get their numbers in sorted order, as torchvision's ImageFolder and guided-diffusion
(guided_diffusion/image_datasets.py) number them; that says something only where all classes are there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bidm_cli.errors import BidmError

FOLDERS = "class folders"
_SPLIT = re.compile(
    r"(?:train|val|test|dev|eval|train(?:ing)|valid|validation|testing|evaluation)"
    r"(?:[ _-]?(?:set|images|data))?(?:[ _-]?\d{4})?",
    re.IGNORECASE,
)
_PACKED = re.compile(r"(?:.*/)?(\d+)/\D*(\d+)\.\w+")
_ENDS_IN_NUMBER = re.compile(r"(\D*)(\d{1,9})")
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Labels:
    """One label per image, and what is known of the numbers.

    Attributes:
        source: where they come from, as in "class folders" or "dataset.json".
        index: int64 [N], labels, or positions in ``names``; None without any.
        names: the classes in order, where labels are names; None where they are numbers.
        in_order: the user has said that the order of ``names`` is the model's.
        problem: why there are no labels, with the way out; empty if there are any.
        notes: how folders were taken.
    """

    source: str
    index: np.ndarray | None
    names: tuple[str, ...] | None = None
    in_order: bool = False
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def numbers(self) -> np.ndarray | None:
        """Labels int64 [N] as far as they are known without a model; None without any."""
        values = whole_numbers(self.names or ())
        return self.index if values is None or self.index is None else np.array(values)[self.index]

    def take(self, kept: np.ndarray) -> Labels:
        """The labels of the images ``kept`` [M]."""
        return self if self.index is None else _replaced(self, self.index[kept])

    def of_model(self, num_classes: int, null_label: int | None, where: str) -> tuple[np.ndarray, str]:
        """Labels int64 [N] for a model, and how they were taken, in words.

        Args:
            num_classes: labels that the model knows, the null label included, if there is one.
            where: the data, for messages.

        Raises:
            BidmError: none, out of range, or names whose numbers in the model are not known.
        """
        classes = num_classes - (null_label is not None)
        if self.index is None:
            raise BidmError(f"{where}: {self.problem}")
        if self.names is None:
            return self.index, self._numbers_text(self.index, num_classes, null_label, where)
        numbers = whole_numbers(self.names)
        if numbers is not None and max(numbers) < num_classes and null_label not in numbers:
            text = f"{self.source} are whole numbers, taken as the labels: {_some(sorted(numbers))}"
            return np.array(numbers)[self.index], f"{text}; {_count(len(numbers), classes)}"
        if len(self.names) > classes or (len(self.names) != classes and not self.in_order):
            raise BidmError(self._refusal(classes, where))
        order = "sorted" if _text_order(self.names) else "in the order of their numbers"
        if classes == 1000 and _are_wnids(self.names):
            order = "sorted, which is ImageNet's order"
        text = f"{len(self.names)} {self.source} for the model's {classes} classes, {order}"
        skipping = self.index if null_label is None else self.index + (self.index >= null_label)
        return skipping, f"{text}: {self._assignments()}"

    def _numbers_text(self, index: np.ndarray, num_classes: int, null_label: int | None, where: str) -> str:
        lowest, highest = int(index.min()), int(index.max())
        classes = num_classes - (null_label is not None)
        if lowest < 0 or highest >= num_classes:
            counted = "; they seem to count from 1" if lowest == 1 and highest == classes else ""
            reach = f"go up to {highest}" if lowest >= 0 else f"go down to {lowest}"
            raise BidmError(
                f"{where}: labels {reach}, the model has {classes} classes, from 0 up{counted}; give the "
                "right ones with `data_labels`"
            )
        found = np.unique(index)
        null = f", {null_label} for no class" if null_label in found else ""
        count = len(found) - bool(null)
        return f"labels {lowest} to {highest} from {self.source}{null}; {_count(count, classes)}"

    def _refusal(self, classes: int, where: str) -> str:
        assert self.names is not None
        known = classes == 1000 and _are_wnids(self.names)
        imagenet = ", or take ImageNet's (`data_labels`=imagenet)" if known else ""
        order = "sorted order" if _text_order(self.names) else "the order of their numbers"
        fits = len(self.names) < classes and self.source == FOLDERS
        as_is = ", or take this order as it is (`data_labels`=folders)" if fits else ""
        return (
            f"{where}: {len(self.names)} {self.source} for a model of {classes} classes; in {order} they "
            f"would become the labels {self._assignments()}. Give a file of their names and numbers "
            f"(`data_labels`){imagenet}{as_is}"
        )

    def _assignments(self) -> str:
        return _some([f"{name} = {number}" for number, name in enumerate(self.names or ())])


def no_labels(source: str, problem: str, *notes: str) -> Labels:
    """Absence of labels, and what to say where a model needs them."""
    return Labels(source, None, problem=problem, notes=notes)


def named(
    source: str, values: Sequence[str], *, in_order: bool = False, notes: tuple[str, ...] = ()
) -> Labels:
    """Labels from one name per image: numbered in sorted order, or by the numbers that all names end in."""
    names = sorted(set(values))
    ends = [_ENDS_IN_NUMBER.fullmatch(name) for name in names]
    if all(ends) and len({end[1] for end in ends if end}) == 1:
        numbers = [int(end[2]) for end in ends if end]
        if len(set(numbers)) == len(names):
            names = [name for _, name in sorted(zip(numbers, names, strict=True))]
    number = {name: i for i, name in enumerate(names)}
    index = np.array([number[value] for value in values], dtype=np.int64)
    return Labels(source, index, tuple(names), in_order, notes=notes)


def whole_numbers(names: Sequence[str]) -> list[int] | None:
    """``names`` as numbers, if all are whole numbers and no two the same; else None."""
    if not names or not all(name.isascii() and name.isdigit() and len(name) < 10 for name in names):
        return None
    numbers = [int(name) for name in names]
    return numbers if len(set(numbers)) == len(numbers) else None


def folder_labels(images: Sequence[str], asked: bool = False) -> Labels:
    """Labels by the first folder that differs between images and is no split (train, val, test).

    Args:
        images: relative POSIX paths. asked: the user wants folders, and the order that they have.
    """
    folders = [name.split("/")[:-1] for name in images]
    notes: tuple[str, ...] = ()
    depth = 0
    while True:
        loose = next((name for name, parts in zip(images, folders, strict=True) if len(parts) <= depth), None)
        if loose is not None:
            return _unlabelled(images, depth, loose, notes)
        level = sorted({parts[depth] for parts in folders})
        if all(_SPLIT.fullmatch(name) for name in level) and len(level) > 1:
            notes = (f"folders {_some(level)} are taken as splits, not classes, all together",)
        elif len(level) > 1:
            break
        depth += 1
    if not asked and (block := _packed_block(images)):
        problem = f"its numbered folders hold {block} and are no classes, and there is no dataset.json"
        return no_labels("folders", f"{problem}; give `data_labels` (=folders takes them as classes)", *notes)
    return named(FOLDERS, [parts[depth] for parts in folders], in_order=asked, notes=notes)


def file_name_labels(images: Sequence[str]) -> Labels:
    """Labels by what file names have before their first underscore, in text order, as in guided-diffusion."""
    prefixes = [prefix_of(name) for name in images]
    names = sorted(set(prefixes))
    number = {name: i for i, name in enumerate(names)}
    index = np.array([number[prefix] for prefix in prefixes], dtype=np.int64)
    # Their underscore keeps them from being taken as numbers: the original's order is the text's.
    return Labels("file-name prefixes", index, tuple(f"{name}_" for name in names))


def prefix_of(name: str) -> str:
    """Beginning of a file's name, up to its first underscore."""
    return name.rpartition("/")[2].split("_")[0]


def imagenet_labels(folders: Labels) -> Labels:
    """Labels by folders named as ImageNet's classes (wnids such as n01440764), numbered as there."""
    from timm.data import ImageNetInfo

    order = {name: i for i, name in enumerate(ImageNetInfo("imagenet1k").label_names())}
    unknown = [name for name in folders.names or ("none",) if name not in order]
    if unknown or folders.index is None:
        return no_labels(
            "folders", f"`data_labels`=imagenet, but its folders are not these: {_some(unknown)}"
        )
    numbers = np.array([order[name] for name in folders.names or ()], dtype=np.int64)
    return Labels("ImageNet's folder names", numbers[folders.index], notes=folders.notes)


def _unlabelled(images: Sequence[str], depth: int, loose: str, notes: tuple[str, ...]) -> Labels:
    where = "" if depth == 0 or not notes else f" ({loose} lies in none)"
    prefixes = {prefix_of(name) for name in images if "_" in name.rpartition("/")[2]}
    hint = ""
    if 1 < len(prefixes) <= len(images) // 2:
        few = _some(sorted(prefixes))
        hint = f"; if the {len(prefixes)} beginnings of file names are classes ({few}), `data_labels`=names"
    return no_labels(
        "none",
        f"the model is class-conditional and these images have no labels{where}; put them into one folder "
        f"per class, give a file of labels (`data_labels`) or an .npz with labels, or use `synthetic`{hint}",
        *notes,
    )


def _packed_block(images: Sequence[str]) -> str:
    """Words for numbered folders that only split a long list of numbered files; empty if these are none.

    NVlabs' dataset_tool.py (00000/img00000000.png), FFHQ (01000/01000.png), img2dataset (00001/000010003.jpg)
    """
    found = [_PACKED.fullmatch(name) for name in images]
    pairs = [(int(one[1]), int(one[2])) for one in found if one]
    if len(pairs) < len(images):
        return ""
    if all(re.fullmatch(r"(?:.*/)?\d{5}/img\d{8}\.\w+", name) for name in images):
        return "img00000000.png and so on, as NVlabs' dataset_tool.py packs them,"
    rules: tuple[tuple[int, Callable[[int, int], int]], ...] = (
        (1000, lambda n, size: n // size),
        (10_000, lambda n, size: n // size),
        (1000, lambda n, size: n // size * size),
    )
    for size, folder in rules:
        if all(folder(number, size) == block for block, number in pairs):
            return f"{size:,} files each in the order of their numbers"
    return ""


def _replaced(labels: Labels, index: np.ndarray) -> Labels:
    return Labels(labels.source, index, labels.names, labels.in_order, labels.problem, labels.notes)


def _are_wnids(names: Sequence[str]) -> bool:
    return all(_WNID.fullmatch(name) for name in names)


def _text_order(names: Sequence[str]) -> bool:
    return list(names) == sorted(names)


def _count(found: int, classes: int) -> str:
    return f"{found} of the model's {classes} classes"


def _some(items: Sequence[object]) -> str:
    """The first four and the last of a list, as text."""
    texts = [str(item) for item in items]
    return ", ".join(texts if len(texts) <= 6 else [*texts[:4], "...", texts[-1]])

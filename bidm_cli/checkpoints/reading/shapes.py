"""Shapes of a state dict's tensors, and what inferring an architecture from them has in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from bidm_cli.errors import BidmError

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by name."""


def count(names: Iterable[str], pattern: str) -> int:
    """Number of different first groups among the names that ``pattern`` matches in full."""
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})


@contextmanager
def inferring(what: str, hint: str = "or give its configuration with `config`") -> Iterator[None]:
    """Raise BidmError for a name that is missing from the weights, or an odd shape, while an architecture is
    inferred; a decorator, too. The message names ``what`` ("U-Net", ...) and ``hint``.
    """
    try:
        yield
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise BidmError(
            f"cannot tell the {what}'s architecture from its weights: {error} is missing or has an odd "
            f"shape; the file is incomplete, {hint}"
        ) from error

"""The one exception a user is meant to read."""

from __future__ import annotations


class BidmError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and the way out.

    Arguments stand in backquotes (`batch_size`): Python users read their names, and the command line, which
    prints the message and exits with status 1, puts its options in their place.
    """


def first_line(error: BaseException) -> str:
    """First line of an error's text, at most 120 characters; the error's type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]

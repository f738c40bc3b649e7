"""The one exception a user is meant to read."""

from __future__ import annotations


class BidmError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and the way out.

    The command line prints the message and exits with status 1; a traceback only comes with ``--debug``.
    """

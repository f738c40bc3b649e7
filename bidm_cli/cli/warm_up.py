"""Message shown while kernels are compiled, once per machine."""

from __future__ import annotations

import click


def compiling(text: str) -> None:
    """Show a piece of the message on standard error, for :meth:`PackedModel.warm_up`."""
    click.echo(text, nl=False, err=True)

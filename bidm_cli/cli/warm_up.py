"""The line that says why the first packed model takes its time: kernels are compiled, once a machine."""

from __future__ import annotations

import click


def compiling(text: str) -> None:
    """Show a piece of the line, on standard error (see :meth:`bidm_cli.packed.model.PackedModel.warm_up`)."""
    click.echo(text, nl=False, err=True)

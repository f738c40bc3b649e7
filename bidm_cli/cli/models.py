"""Opening of a command's MODEL argument, with a line on standard error while kernels are compiled."""

from __future__ import annotations

import functools

import click

from bidm_cli.checkpoints import open as opening

compiling = functools.partial(click.echo, nl=False, err=True)
"""Show a piece of the message that kernels are compiled, once per machine."""
open_model = functools.partial(opening.open_model, say=compiling)
open_any = functools.partial(opening.open_any, say=compiling)

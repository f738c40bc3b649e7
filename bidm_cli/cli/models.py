"""Opening of a command's MODEL argument, with a line on standard error while kernels are compiled."""

from __future__ import annotations

import functools

from bidm_cli.checkpoints import open as opening
from bidm_cli.cli.warm_up import compiling

open_model = functools.partial(opening.open_model, say=compiling)
open_any = functools.partial(opening.open_any, say=compiling)

"""bidm: 1-bit diffusion models that really are small.

The names below are the Python interface; each is imported when first used, so that
``import bidm_cli`` and the command line's help stay quick.

    import bidm_cli
    ckpt = bidm_cli.load_checkpoint("model.ckpt")
    bidm_cli.compress(ckpt, bidm_cli.Recipe.load("w1a1"), out="model.bidm", steps=100)
    images = bidm_cli.sample(bidm_cli.load_packed("model.bidm"), n=4)
"""

from __future__ import annotations

import pkgutil
from typing import Any

from bidm_cli.version import __version__

_HOMES = {
    "open": "bidm_cli.checkpoints.open:open_model",
    "load_checkpoint": "bidm_cli.checkpoints.open:load_checkpoint",
    "Checkpoint": "bidm_cli.checkpoints.checkpoint:Checkpoint",
    "Recipe": "bidm_cli.recipe:Recipe",
    "compress": "bidm_cli.distill.compress:compress",
    "load_packed": "bidm_cli.packed.format.read:load_packed",
    "sample": "bidm_cli.sampling.sample:sample",
    "cost": "bidm_cli.report.cost.cost:cost",
    "BidmError": "bidm_cli.errors:BidmError",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bidm_cli' has no attribute {name!r}")
    return pkgutil.resolve_name(_HOMES[name])


def __dir__() -> list[str]:
    return sorted(__all__)

"""Networks by name, so that an architecture is plain JSON: ``{"kind": "ddpm_unet", "args": {...}}``."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from bidm_cli.errors import BidmError

_KINDS = {
    "ddpm_unet": "bidm_cli.networks.ddpm_unet:DDPMUNet",
    "ldm_unet": "bidm_cli.networks.ldm_unet:LDMUNet",
    "vq_first_stage": "bidm_cli.networks.autoencoder:VQFirstStage",
    "kl_first_stage": "bidm_cli.networks.autoencoder:KLFirstStage",
    "class_embedder": "bidm_cli.networks.conditioners:ClassEmbedder",
}


def build(architecture: dict[str, Any]) -> nn.Module:
    """A freshly initialised network, in eval mode, from ``{"kind": ..., "args": {...}}``.

    Use inside ``torch.device("meta")`` to get the shapes alone.

    Raises:
        BidmError: unknown kind, or arguments that the network does not take.
    """
    kind = architecture.get("kind")
    if kind not in _KINDS:
        raise BidmError(f"unknown network kind {kind!r}; this version of bidm knows {', '.join(_KINDS)}")
    module, name = _KINDS[kind].split(":")
    try:
        network = getattr(importlib.import_module(module), name)(**architecture["args"])
    except (TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise BidmError(f"cannot build network {kind!r} from its arguments: {error}") from error
    return network.eval()

"""Feature networks for image metrics, by name."""

from __future__ import annotations

from pathlib import Path

import torch

from bidm_cli.errors import BidmError
from bidm_cli.report.metrics.networks import efficientnet
from bidm_cli.report.metrics.networks.base import FeatureNetwork, MissingWeights
from bidm_cli.report.metrics.networks.efficientnet import load_efficientnet
from bidm_cli.report.metrics.networks.inception import load_inception
from bidm_cli.report.metrics.networks.timm_models import PREFIX, load_timm

_LOADERS = {"inception": load_inception, efficientnet.NAME: load_efficientnet}


def load_features(
    name: str = "inception", weights: Path | None = None, device: str | torch.device = "cpu"
) -> FeatureNetwork:
    """Load the feature network ``name``: "inception", "efficientnet-lite0", or "timm:NAME" for a timm model's
    pooled features.

    Args:
        weights: a state dict in the network's own layout; default: Inception's from pytorch-fid's cache (or
            downloaded there), EfficientNet-Lite0's from its package, timm's own.

    Raises:
        MissingWeights: they are not on this machine and cannot be downloaded.
        BidmError: an unknown network, or a weights file that does not fit it.
    """
    if weights is not None and not weights.is_file():
        raise BidmError(f"`weights`: there is no file {weights}")
    if name.startswith(PREFIX) and len(name) > len(PREFIX):
        return load_timm(name, weights, torch.device(device))
    if name not in _LOADERS:
        raise BidmError(f"unknown feature network {name!r}; use {', '.join(_LOADERS)} or {PREFIX}NAME")
    return _LOADERS[name](weights, torch.device(device))


def default_features(
    weights: Path | None = None, device: str | torch.device = "cpu"
) -> tuple[FeatureNetwork, MissingWeights | None]:
    """Inception, or EfficientNet-Lite0 if Inception's weights cannot be had, with the reason.

    Raises:
        MissingWeights: neither is there.
        BidmError: as :func:`load_features`.
    """
    try:
        return load_features("inception", weights, device), None
    except MissingWeights as missing:
        try:
            return load_features(efficientnet.NAME, device=device), missing
        except MissingWeights as neither:
            raise MissingWeights(f"{missing}; {neither}") from missing

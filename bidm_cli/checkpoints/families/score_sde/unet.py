"""The arguments of a score-based U-Net (:class:`bidm_cli.networks.score_unet.ScoreUNet`) from its layers.

Their order tells levels, blocks and attention, their names the kind of block and the pyramid. What leaves no
trace is as in the published networks: "biggan" blocks rescale their sums and have NCSN++'s group norms,
"ddpm" ones neither; the binomial filter is there where the pyramid's layers have its names.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, Literal

from bidm_cli.checkpoints.reading.shapes import Shapes, inferring
from bidm_cli.errors import BidmError

_NUMBER = re.compile(r"all_modules\.(\d{1,5})\.(.+)")
_MOST_LAYERS = 4096
Kind = Literal["block", "attention", "resample block", "resample", "pyramid", "other"]
Layer = dict[str, tuple[int, ...]]


@inferring("U-Net", "or a network that bidm does not have")
def infer_score_unet(shapes: Shapes) -> dict[str, Any]:
    """Arguments from the weights, renamed as :mod:`bidm_cli.checkpoints.families.score_sde.load` does."""
    if "all_modules.0.W" in shapes:
        raise BidmError(
            "a network on Fourier features of the noise level, for variance-exploding (VE) models, which "
            "this version of bidm cannot load; it has the variance-preserving ones on positional embeddings"
        )
    layers = _layers(shapes)
    kinds = _kinds(layers)
    levels = _encoder(kinds)
    ch, in_channels = shapes["all_modules.2.weight"][:2]
    biggan = any("Conv_2.weight" in layer for layer in layers)
    return {
        "in_channels": in_channels,
        "ch": ch,
        "ch_mult": [layers[level[0]]["Conv_0.weight"][0] // ch for level in levels],
        "num_res_blocks": _blocks_of(levels, kinds),
        "attention_levels": [i for i, level in enumerate(levels) if kinds[level[0] + 1] == "attention"],
        "kind": "biggan" if biggan else "ddpm",
        "norm_groups": None if biggan else 32,
        "skip_rescale": biggan,
        "fir": any("Conv2d_0.weight" in layer for layer in layers),
        "input_pyramid": "pyramid" in kinds,
        "resamp_with_conv": all(layers),
    }


def _layers(shapes: Shapes) -> list[Layer]:
    """The shapes of each layer by name, {} for a layer without weights."""
    found: dict[int, Layer] = {}
    for name, shape in shapes.items():
        if match := _NUMBER.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[2]] = shape
    count = max(found, default=-1) + 1
    if not 8 <= count <= _MOST_LAYERS:
        raise KeyError("all_modules.*")
    return [found.get(i, {}) for i in range(count)]


def _kinds(layers: list[Layer]) -> list[Kind]:
    """Kind of each layer. A convolution right after a resampler belongs to the pyramid."""
    kinds: list[Kind] = []
    for layer in layers:
        kind = _kind(layer)
        if kind == "resample" and kinds[-1] in ("resample", "resample block"):
            kind = "pyramid"
        kinds.append(kind)
    return kinds


def _kind(layer: Layer) -> Kind:
    if not layer:
        return "resample"
    if "NIN_3.weight" in layer:
        return "attention"
    if "Dense_0.weight" in layer:
        out, channels = layer["Conv_0.weight"][:2]
        return "resample block" if "Conv_2.weight" in layer and out == channels else "block"
    if "Conv2d_0.weight" in layer:
        return "pyramid"
    if "Conv_0.weight" in layer:
        out, channels = layer["Conv_0.weight"][:2]
        return "resample" if out == channels else "pyramid"
    return "other"


def _encoder(kinds: list[Kind]) -> list[list[int]]:
    """The numbers of each level's blocks, finest first; the last one's go on into middle and decoder."""
    resamplers = [i for i, kind in enumerate(kinds) if kind in ("resample", "resample block")]
    # Half of them lead down, half up.
    ends = [2, *resamplers[: len(resamplers) // 2], len(kinds)]
    levels = [[i for i in range(start + 1, end) if kinds[i] == "block"] for start, end in pairwise(ends)]
    if len(resamplers) % 2 or not all(levels):
        raise KeyError("all_modules.* of the encoder")
    return levels


def _blocks_of(levels: list[list[int]], kinds: list[Kind]) -> int:
    """Blocks a level; with one level only, from the number of all blocks: n, two in the middle, n + 1."""
    return len(levels[0]) if len(levels) > 1 else (kinds.count("block") - 3) // 2

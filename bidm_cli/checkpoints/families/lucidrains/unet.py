"""The arguments of a lucidrains U-Net (:class:`bidm_cli.networks.lucidrains_unet.LucidrainsUNet`), from names
and shapes or from the original constructor's arguments, and the era of the code that a file comes from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.checkpoints.reading.pickle_names import printable
from bidm_cli.checkpoints.reading.shapes import Shapes, count, inferring
from bidm_cli.errors import BidmError

TOO_OLD = "bidm reads version 0.30 and later; load it with the version it was trained with"
"""Message for a file from before."""

_HEAD_WIDTH = 32
"""Channels of an attention's head by default, and in all versions that have no setting for it."""
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass(frozen=True)
class Era:
    """Version of the network's code, as far as names and shapes do not show what it computes.

    Attributes:
        name: in words.
        prenorm: attentions are wrapped (names with ``fn.fn.``), before 1.8.
        attention_norm: "layer" before 1.7. average: linear attention averages, up to 1.7.3.
        standardize: how the blocks' convs standardize their weights: "add" eps to the variance (up to
            1.7.0), let it not fall below ("clamp", 1.7.1), or not at all (None).
    """

    name: str
    prenorm: bool = False
    attention_norm: Literal["rms", "layer"] = "rms"
    average: bool = False
    standardize: Literal["add", "clamp"] | None = None


_WRAPPED_ERAS = (
    ((1, 7, 0), Era("0.30 to 1.6", True, "layer", True, "add")),
    ((1, 7, 1), Era("1.7.0", True, "rms", True, "add")),
    ((1, 7, 2), Era("1.7.1", True, "rms", True, "clamp")),
    ((1, 7, 4), Era("1.7.2 or 1.7.3", True, "rms", True)),
)
"""Eras whose names are alike, each with the version that ends it."""


def era_of(names: Iterable[str], version: str | None) -> Era:
    """The era of a U-Net's tensor names (without any prefix), and of the version where the names are alike.

    Raises:
        BidmError: an era that is not covered, or wrapped attentions and no version to tell their era by.
    """
    names = set(names)
    said = "" if version is None else f", version {printable(version, 20)}"
    if any(".ds_conv." in name for name in names):
        raise BidmError(
            f"a ConvNeXt U-Net of denoising-diffusion-pytorch, up to 2022-05 (ds_conv{said}); {TOO_OLD}"
        )
    if "time_mlp.0.weights" in names:
        raise BidmError(f"a U-Net for continuous time (Fourier time embedding{said}), which bidm has not")
    if "null_classes_emb" in names:
        raise BidmError(
            "a class-conditional U-Net of denoising-diffusion-pytorch (classifier_free_guidance.py, "
            "null_classes_emb), which bidm has not"
        )
    if any(".fn.fn." in name for name in names):
        return _wrapped(version)
    if "downs.0.2.norm.g" in names and "downs.0.0.block1.norm.g" in names:
        return Era("2.x")
    if "downs.0.2.norm.g" in names and "downs.0.0.block1.norm.weight" in names:
        return Era("1.8 to 1.x")
    raise BidmError(f"neither names nor norms of a version that bidm knows{said}; {TOO_OLD}")


def _wrapped(version: str | None) -> Era:
    """The era of a version, among those whose names are the same."""
    match = _VERSION.search(version or "")
    if match is None:
        raise BidmError(
            "a U-Net of denoising-diffusion-pytorch before 1.8 (downs.0.2.fn.fn.to_qkv) in a file that does "
            "not say its version, as those before 0.30 (2022-11); if it is a later one, say so with "
            "`settings` version=1.6.4"
        )
    number = (int(match[1]), int(match[2]), int(match[3] or 0))
    if number < (0, 30, 0):
        raise BidmError(f"a U-Net of denoising-diffusion-pytorch {printable(match[0], 20)}; {TOO_OLD}")
    return next((era for end, era in _WRAPPED_ERAS if number < end), Era("1.7.4 to 1.7.x", True))


def as_later(tensors: Mapping[str, Tensor], era: Era) -> dict[str, Tensor]:
    """The weights under the names of 2.x, with the standardization of the blocks' convs carried out.

    w' = (w - mean) / sqrt(variance + 1e-5) for each filter (arXiv 1903.10520): what the conv computes with.
    """
    if not era.prenorm:
        return dict(tensors)
    later = {re.sub(r"\.fn\.(?:fn\.|(?=norm\.g$))", ".", name): tensor for name, tensor in tensors.items()}
    for name, tensor in later.items():
        if era.standardize and re.search(r"\.block[12]\.proj\.weight$", name) and tensor.dim() == 4:
            variance, mean = torch.var_mean(tensor.float(), dim=(1, 2, 3), correction=0, keepdim=True)
            limited = variance + 1e-5 if era.standardize == "add" else variance.clamp(min=1e-5)
            later[name] = (tensor.float() - mean) * limited.rsqrt()
    return later


@inferring("U-Net", "or of a version that bidm does not know")
def infer_lucidrains_unet(shapes: Shapes, settings: Section, era: Era) -> dict[str, Any]:
    """Arguments from the weights, named as in 2.x without any prefix; ``settings`` are the original
    constructor's arguments as far as they are known, for what shapes do not show.
    """
    levels = count(shapes, r"downs\.(\d+)\.0\.block1\..*")
    init_dim, taken = shapes["init_conv.weight"][:2]
    out_dim = shapes["final_conv.weight"][0]
    dim = shapes["time_mlp.1.weight"][0] // 4
    both = settings.flag("self_condition") and settings.flag("learned_variance")
    self_condition = both or taken == 2 * out_dim
    attention = [_attention(shapes, i, settings) for i in range(levels)]
    return {
        "dim": dim,
        "init_dim": init_dim,
        "dim_mults": [_multiple(shapes, f"downs.{i}.3", dim) for i in range(levels)],
        "channels": taken // 2 if self_condition else taken,
        "out_dim": out_dim,
        "self_condition": self_condition,
        "full_attn": [full for full, _, _, _ in attention],
        "attn_heads": [heads for _, heads, _, _ in attention],
        "attn_dim_head": [width for _, _, width, _ in attention],
        "mem_kv": attention[0][3],
        "norm": "rms" if "downs.0.0.block1.norm.g" in shapes else "group",
        "groups": settings.integer("resnet_block_groups", 8),
        "strided": levels > 1 and "downs.0.3.weight" in shapes,
        "theta": settings.number("sinusoidal_pos_emb_theta", 10000),
        "dropout": settings.number("dropout", 0.0),
        "attention_norm": era.attention_norm,
        "average": era.average,
    }


def _multiple(shapes: Shapes, name: str, dim: int) -> int:
    """Width after a level (its resampler's, or its plain conv's) over ``dim``."""
    width = shapes[f"{name}.1.weight" if f"{name}.1.weight" in shapes else f"{name}.weight"][0]
    if width % dim:
        raise ValueError(f"a level's width, {width}, is no multiple of {dim} and")
    return width // dim


def _attention(shapes: Shapes, level: int, settings: Section) -> tuple[bool, int, int, int]:
    """(full, heads, width of a head, learned keys) of a level's attention."""
    name = f"downs.{level}.2"
    full = f"{name}.to_out.weight" in shapes
    hidden = shapes[f"{name}.to_qkv.weight"][0] // 3
    learned = shapes.get(f"{name}.mem_kv")
    if learned is not None:
        _, heads, one, other = learned
        return (full, heads, other, one) if full else (full, heads, one, other)
    widths = settings.numbers("attn_dim_head", _HEAD_WIDTH)
    width = widths[min(level, len(widths) - 1)]
    if not 1 <= width <= hidden or hidden % width:
        raise BidmError(
            f"the attention {name} of {hidden} channels has no heads of {width}; say how wide they are with "
            '`config`, JSON such as {"unet": {"dim": 64, "attn_dim_head": 16}}'
        )
    return full, hidden // width, width, 0


def lucidrains_unet_arguments(unet: Section) -> dict[str, Any]:
    """Arguments from those of the original constructor (2.x), its defaults included."""
    multiples = unet.numbers("dim_mults", (1, 2, 4, 8))
    levels, channels = len(multiples), unet.integer("channels", 3)
    if unet.flag("learned_sinusoidal_cond") or unet.flag("random_fourier_features"):
        raise BidmError(f"{unet.where}: a Fourier time embedding is for continuous time, which bidm has not")
    full = _for_levels(unet.get("full_attn", [*[False] * (levels - 1), True]), levels)
    outputs = channels * (2 if unet.flag("learned_variance") else 1)
    return {
        "dim": unet.integer("dim"),
        "init_dim": unet.integer("init_dim", unet.integer("dim")),
        "dim_mults": multiples,
        "channels": channels,
        "out_dim": unet.integer("out_dim", outputs),
        "self_condition": unet.flag("self_condition"),
        "full_attn": [bool(item) for item in full],
        "attn_heads": _for_levels(unet.get("attn_heads", 4), levels),
        "attn_dim_head": _for_levels(unet.get("attn_dim_head", _HEAD_WIDTH), levels),
        "mem_kv": unet.integer("num_mem_kv", 4),
        "norm": "rms",
        "attention_norm": "rms",
        "average": False,
        "strided": False,
        "groups": unet.integer("resnet_block_groups", 8),
        "theta": unet.number("sinusoidal_pos_emb_theta", 10000),
        "dropout": unet.number("dropout", 0.0),
    }


def _for_levels(value: Any, levels: int) -> list[Any]:
    """One value for each level: a list as it is, a single one repeated."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * min(levels, 64)

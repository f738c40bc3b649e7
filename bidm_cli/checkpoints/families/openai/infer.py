"""The arguments of an OpenAI-style U-Net (:class:`bidm_cli.networks.ldm_unet.LDMUNet`) from names and shapes.

Everything but the attention heads can be read off the weights; for those,
:mod:`bidm_cli.checkpoints.families.published` has the published networks and a rule for others.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from bidm_cli.checkpoints.reading.shapes import Shapes, inferring

NAMES = (
    "time_embed.0.weight",
    "input_blocks.0.0.weight",
    "middle_block.0.in_layers.0.weight",
    "out.2.weight",
)
"""Names that all of the network's state dicts have."""


@inferring("U-Net")
def infer_unet(shapes: Shapes) -> dict[str, Any]:
    """Arguments of :class:`LDMUNet` but for the heads; names are without any prefix."""
    names = list(shapes)
    width = shapes["time_embed.0.weight"][1]
    lengths = _level_lengths(names)
    starts = [1 + sum(length + 1 for length in lengths[:level]) for level in range(len(lengths))]
    blocks = [f"input_blocks.{start}" for start in starts]
    updown = any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", name) for name in names)
    arguments: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "model_channels": width,
        "num_res_blocks": lengths[0] if len(set(lengths)) == 1 else lengths,
        "channel_mult": [_multiple(shapes[f"{block}.0.in_layers.2.weight"][0], width) for block in blocks],
        "attention_resolutions": [2**i for i, block in enumerate(blocks) if _has_attention(shapes, block)],
        "use_scale_shift_norm": _film(shapes),
        "resblock_updown": updown,
        "conv_resample": updown or len(lengths) == 1 or any(".0.op." in name for name in names),
    }
    arguments |= _label_embedding(shapes)
    arguments |= _attention_by_level(shapes, blocks, lengths)
    if "middle_block.1.transformer_blocks.0.attn1.to_q.weight" in shapes:
        arguments |= _transformer(shapes, names)
    return arguments


def _label_embedding(shapes: Shapes) -> dict[str, int]:
    """A table of labels, or layers on a vector: two (``num_classes`` "sequential") or one ("continuous")."""
    if "label_emb.0.0.weight" in shapes:
        return {"adm_in_channels": shapes["label_emb.0.0.weight"][1]}
    if "label_emb.weight" not in shapes:
        return {}
    rows, width = shapes["label_emb.weight"]
    if "label_emb.bias" in shapes:
        return {"adm_in_channels": width, "adm_layers": 1}
    return {"num_classes": rows}


def _indices(names: list[str], prefix: str) -> list[int]:
    pattern = re.compile(re.escape(prefix) + r"\.(\d{1,6})\.")
    return sorted({int(match[1]) for name in names if (match := pattern.match(name))})


def _level_lengths(names: list[str]) -> list[int]:
    """Residual blocks of each level, finest first; a level ends with an up- or downsampler."""
    outputs = _indices(names, "output_blocks")
    if outputs != list(range(len(outputs))) or not outputs:
        raise KeyError("output_blocks.*")
    resamplers = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.0)\.weight")
    ends = sorted(int(match[1]) for name in names if (match := resamplers.fullmatch(name)))
    if ends:
        edges = [-1, *ends, outputs[-1]]
        return [after - before - 1 for before, after in pairwise(edges)][::-1]
    # Downsamplers without weights leave gaps in the numbering of the input blocks.
    inputs = _indices(names, "input_blocks")
    gaps = [k for k in range(1, len(outputs)) if k not in inputs]
    edges = [0, *gaps, len(outputs)]
    return [after - before - 1 for before, after in pairwise(edges)]


def _multiple(channels: int, width: int) -> float:
    """m with int(m * width) == channels; an int where it can be."""
    if channels % width == 0:
        return channels // width
    multiple = channels / width
    return multiple if int(multiple * width) == channels else (channels + 0.5) / width


def _film(shapes: Shapes) -> bool:
    block = "middle_block.0"
    return shapes[f"{block}.emb_layers.1.weight"][0] == 2 * shapes[f"{block}.in_layers.2.weight"][0]


def _attention_by_level(shapes: Shapes, blocks: list[str], lengths: list[int]) -> dict[str, Any]:
    """``num_attention_blocks`` and ``disable_...`` arguments, where the network makes use of them.

    A transformer without self-attention has keys as wide as the context in its first attention. Where the
    context is as wide as the layer, nothing tells, and self-attention is what most networks have.
    """
    found: dict[str, Any] = {}
    counts = []
    for level, length in enumerate(lengths):
        start = sum(below + 1 for below in lengths[level + 1 :])
        places = range(start, start + length + 1)
        counts.append(sum(_has_attention(shapes, f"output_blocks.{i}") for i in places))
    if any(0 < count <= length for count, length in zip(counts, lengths, strict=True)):
        found["num_attention_blocks"] = counts
    alone = [_context_alone(shapes, f"{block}.1") for block in blocks]
    if any(alone):
        found["disable_self_attentions"] = alone
    if _context_alone(shapes, "middle_block.1"):
        found["disable_middle_self_attn"] = True
    return found


def _has_attention(shapes: Shapes, block: str) -> bool:
    return any(f"{block}.1.{name}.weight" in shapes for name in ("qkv", "proj_in"))


def _context_alone(shapes: Shapes, name: str) -> bool:
    first = f"{name}.transformer_blocks.0.attn1"
    if f"{first}.to_q.weight" not in shapes:
        return False
    return bool(shapes[f"{first}.to_k.weight"][1] != shapes[f"{first}.to_q.weight"][1])


def _transformer(shapes: Shapes, names: list[str]) -> dict[str, Any]:
    middle = "middle_block.1"
    depth = len(_indices(names, f"{middle}.transformer_blocks"))
    context = [shapes[f"{middle}.transformer_blocks.{i}.attn2.to_k.weight"][1] for i in range(depth)]
    return {
        "use_spatial_transformer": True,
        "transformer_depth": depth,
        "context_dim": context[0] if len(set(context)) == 1 else context,
        "use_linear_in_transformer": len(shapes[f"{middle}.proj_in.weight"]) == 2,
    }

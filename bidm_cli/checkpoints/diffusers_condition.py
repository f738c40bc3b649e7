"""diffusers' ``UNet2DConditionModel`` (Stable Diffusion and its like) as the network it was converted from.

That is :class:`bidm_cli.networks.ldm_unet.LDMUNet`: arguments come from ``config.json``, the weights get
LDM's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from bidm_cli.checkpoints.config import Section
from bidm_cli.checkpoints.first_stage import Architecture
from bidm_cli.errors import BidmError

_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
# Settings that would make it another network than LDM's; with these values they do not.
_ORDINARY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "norm_num_groups": (32,),
    "norm_eps": (1e-5,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "resnet_time_scale_shift": ("default",),
    "attention_type": ("default",),
    **dict.fromkeys(
        (
            "center_input_sample", "dual_cross_attention", "only_cross_attention", "class_embed_type",
            "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "timestep_post_act",
            "time_cond_proj_dim", "time_embedding_dim", "time_embedding_act_fn", "resnet_skip_time_act",
            "class_embeddings_concat", "cross_attention_norm", "reverse_transformer_layers_per_block",
            "mid_block_only_cross_attention",
        ),
        (False,),
    ),
}  # fmt: skip
_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


def condition_unet_from_config(section: Section) -> Architecture:
    """Architecture of a ``UNet2DConditionModel``.

    Raises:
        BidmError: a setting of the wrong type, or of a network that is not LDM's.
    """
    for name, usual in _ORDINARY.items():
        value = section.get(name, usual[0])
        if value not in usual:
            raise BidmError(f"{section.where}: {name} {str(value)[:60]!r} is not supported")
    widths = section.numbers("block_out_channels", [320, 640, 1280, 1280])
    levels = _cross_levels(section, widths)
    depths = section.numbers("transformer_layers_per_block", 1)
    context = section.numbers("cross_attention_dim", 1280)
    if len(set(depths)) != 1 or len(set(context)) != 1:
        raise BidmError(f"{section.where}: transformers that differ by level (or are none) are not supported")
    arguments: dict[str, Any] = {
        "in_channels": section.integer("in_channels", 4),
        "out_channels": section.integer("out_channels", 4),
        "model_channels": widths[0],
        "num_res_blocks": section.integer("layers_per_block", 2),
        "channel_mult": [
            width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths
        ],
        "attention_resolutions": [2**level for level in levels],
        "use_spatial_transformer": True,
        "transformer_depth": depths[0],
        "context_dim": context[0],
        "use_linear_in_transformer": section.flag("use_linear_projection"),
        "dropout": section.number("dropout", 0.0),
        **_heads(section, widths),
    }
    if "num_class_embeds" in section:
        arguments["num_classes"] = section.integer("num_class_embeds")
    return {"kind": "ldm_unet", "args": arguments}


def _cross_levels(section: Section, widths: list[Any]) -> list[int]:
    downs = section.get("down_block_types", [*[_CROSS_DOWN] * 3, "DownBlock2D"])
    ups = section.get("up_block_types", ["UpBlock2D", *[_CROSS_UP] * 3])
    for name, found, plain, cross in (
        ("down_block_types", downs, "DownBlock2D", _CROSS_DOWN),
        ("up_block_types", ups, "UpBlock2D", _CROSS_UP),
    ):
        known = (
            isinstance(found, list) and len(found) == len(widths) and all(k in (plain, cross) for k in found)
        )
        if not known:
            raise section.wrong(name, f"{len(widths)} of {plain} and {cross}", found)
    levels = [i for i, kind in enumerate(downs) if kind == _CROSS_DOWN]
    if levels != [i for i, kind in enumerate(reversed(ups)) if kind == _CROSS_UP]:
        raise BidmError(f"{section.where}: attention differs between the way down and up; not supported")
    if not widths or min(widths) < 1:
        raise section.wrong("block_out_channels", "widths above 0", widths)
    return levels


def _heads(section: Section, widths: list[Any]) -> dict[str, int]:
    """This class's ``attention_head_dim`` is the number of heads, one for all levels or one a level."""
    name = "num_attention_heads" if "num_attention_heads" in section else "attention_head_dim"
    heads = section.numbers(name, 8)
    if len(heads) not in (1, len(widths)) or not all(isinstance(n, int) and n > 0 for n in heads):
        raise section.wrong(name, "one whole number, or one a level", heads)
    if len(set(heads)) == 1:
        return {"num_heads": heads[0]}
    head_widths = {width / number for width, number in zip(widths, heads, strict=True)}
    if len(head_widths) > 1 or not head_widths.copy().pop().is_integer():
        raise BidmError(f"{section.where}: {name} {heads} gives heads of different widths; not supported")
    return {"num_head_channels": int(head_widths.pop())}


def ldm_names(tensors: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The weights under LDM's names; what has no counterpart keeps its own, for the message."""
    places = _ENDS | dict(_places(architecture["args"]))
    return {_ldm_name(name, places): tensor for name, tensor in tensors.items()}


def _ldm_name(name: str, places: dict[str, str]) -> str:
    pattern = r"(?:\w+_blocks\.\d+|mid_block)\.\w+\.\d+|time_embedding\.linear_\d|[^.]+"
    match = re.match(pattern, name)
    if match is None or match[0] not in places:
        return name
    rest = name[match.end() :].lstrip(".")
    part, _, last = rest.rpartition(".")
    if ".resnets." in match[0]:
        part = _PARTS.get(part, part)
    if match[0].endswith("samplers.0"):
        part = ""
    return ".".join(piece for piece in (places[match[0]], part, last) if piece)


def _places(arguments: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(diffusers' name, LDM's name) of every block and resampler, in order."""
    levels, depth = len(arguments["channel_mult"]), arguments["num_res_blocks"]
    attention = arguments["attention_resolutions"]
    index = 1
    for i in range(levels):
        for j in range(depth):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{index}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{index}.1"
            index += 1
        yield f"down_blocks.{i}.downsamplers.0", f"input_blocks.{index}.0.op"
        index += 1
    index = 0
    for i in range(levels):
        for j in range(depth + 1):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{index}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{index}.1"
            index += 1
        after = 2 if 2 ** (levels - 1 - i) in attention else 1
        yield f"up_blocks.{i}.upsamplers.0", f"output_blocks.{index - 1}.{after}.conv"

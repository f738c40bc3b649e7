"""Architecture of a ``config.json`` of a ``UNet2DConditionModel`` (Stable Diffusion and its like)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bidm_cli.checkpoints.families.diffusers.config import DOWN, UP, block_types, common_arguments
from bidm_cli.checkpoints.first_stages.compvis import Architecture
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.errors import BidmError

_MIDDLE = {"UNetMidBlock2DCrossAttn": "cross", "UNetMidBlock2D": "plain"}
# Settings of networks that bidm does not have, and the values with which they make no difference.
_ORDINARY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "time_embedding_type": ("positional",),
    "attention_type": ("default",),
    "resnet_out_scale_factor": (1,),
    **dict.fromkeys(
        (
            "dual_cross_attention", "addition_embed_type", "encoder_hid_dim", "encoder_hid_dim_type",
            "timestep_post_act", "time_cond_proj_dim", "time_embedding_act_fn", "resnet_skip_time_act",
            "class_embeddings_concat", "cross_attention_norm",
        ),
        (False,),
    ),
}  # fmt: skip


def condition_unet_from_config(section: Section) -> Architecture:
    """Architecture of a ``UNet2DConditionModel``."""
    for name, usual in _ORDINARY.items():
        value = section.get(name, usual[0])
        if value not in usual:
            raise BidmError(f"{section.where}: {name} {str(value)[:60]!r} is not supported")
    widths = section.numbers("block_out_channels", [320, 640, 1280, 1280])
    if not widths or min(widths) < 1:
        raise section.wrong("block_out_channels", "widths above 0", widths)
    cross_down, cross_up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    default = [cross_down] * 3 + ["DownBlock2D"], ["UpBlock2D"] + [cross_up] * 3
    downs = block_types(section, "down_block_types", {*DOWN, cross_down}, default[0], widths)
    ups = block_types(section, "up_block_types", {*UP, cross_up}, default[1], widths)[::-1]
    middle = section.values.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if middle is not None and middle not in _MIDDLE:
        raise BidmError(f"{section.where}: mid_block_type {str(middle)[:60]!r} is not supported")
    down_attention, up_attention = _attention(downs), _attention(ups)
    crosses = [a == "cross" or b == "cross" for a, b in zip(down_attention, up_attention, strict=True)]
    crosses[-1] = crosses[-1] or _MIDDLE.get(middle) == "cross"
    arguments: dict[str, Any] = {
        **common_arguments(section, 4),
        "block_out_channels": widths,
        "layers_per_block": _levels(section, "layers_per_block", 2, len(widths)),
        "down_attention": down_attention,
        "up_attention": up_attention,
        "num_heads": _heads(section, widths, crosses),
        "context_dim": _context(section, crosses),
        **_transformers(section, len(widths)),
        "linear_projection": section.flag("use_linear_projection"),
        "mid_block": _MIDDLE.get(middle),
        "resnet_down_levels": [i for i, kind in enumerate(downs) if kind.startswith("Resnet")],
        "resnet_up_levels": [i for i, kind in enumerate(ups) if kind.startswith("Resnet")],
        "conv_in_kernel": _odd(section, "conv_in_kernel"),
        "conv_out_kernel": _odd(section, "conv_out_kernel"),
    }
    return {"kind": "diffusers_condition_unet", "args": arguments}


def _attention(kinds: list[str]) -> list[str]:
    """Kind of attention of each level."""
    return [
        "cross" if k.startswith("CrossAttn") else "self" if k.startswith("Attn") else "none" for k in kinds
    ]


def _levels(section: Section, name: str, default: int, levels: int) -> list[int]:
    """Whole numbers above 0, one for all levels or one per level."""
    found = section.numbers(name, default)
    if len(found) not in (1, levels) or not all(isinstance(n, int) and n > 0 for n in found):
        raise section.wrong(name, "one whole number above 0, or one per level", section.get(name, default))
    return found * levels if len(found) == 1 else found


def _heads(section: Section, widths: Sequence[int], crosses: Sequence[bool]) -> list[int]:
    """This class's ``attention_head_dim`` is the number of heads."""
    name = "num_attention_heads" if "num_attention_heads" in section else "attention_head_dim"
    heads = _levels(section, name, 8, len(widths))
    for width, number, cross in zip(widths, heads, crosses, strict=True):
        if cross and number > width:
            raise BidmError(f"{section.where}: {number} heads ({name}) over {width} channels make no sense")
    return heads


def _context(section: Section, crosses: Sequence[bool]) -> int | None:
    """The context's width; None where no level attends to one."""
    widths = _levels(section, "cross_attention_dim", 1280, len(crosses))
    used = {width for width, cross in zip(widths, crosses, strict=True) if cross}
    if len(used) > 1:
        raise BidmError(
            f"{section.where}: cross_attention_dim {widths} differs by level; a context has one width"
        )
    return used.pop() if used else None


def _transformers(section: Section, levels: int) -> dict[str, Any]:
    """Depths of the transformers, and where they attend to the context alone."""
    depths = _depths(section, "transformer_layers_per_block", levels)
    found: dict[str, Any] = {"transformer_depth": depths or [1] * levels}
    up = _depths(section, "reverse_transformer_layers_per_block", levels)
    if up is not None:
        found["up_transformer_depth"] = up[::-1]
    elif depths is not None and any(isinstance(depth, list) for depth in depths):
        raise BidmError(
            f"{section.where}: transformer_layers_per_block differs inside a level, which needs a "
            "reverse_transformer_layers_per_block for the way up"
        )
    only = section.get("only_cross_attention", False)
    flags = only if isinstance(only, list) else [only] * levels
    if len(flags) != levels or not all(isinstance(flag, bool) for flag in flags):
        raise section.wrong("only_cross_attention", "true or false, or one of them a level", only)
    return found | ({"only_cross": flags} if any(flags) else {})


def _depths(section: Section, name: str, levels: int) -> list[Any] | None:
    """One number for all levels, or for each a number or a list with one a residual block."""
    found = section.get(name, None)
    if found is None:
        return None
    items = found if isinstance(found, list) else [found] * levels
    if len(items) != levels:
        raise section.wrong(name, f"one number, or {levels}", found)
    rows = [Section({name: item}, section.where).numbers(name) for item in items]
    if not all(isinstance(n, int) and n > 0 for row in rows for n in row):
        raise section.wrong(name, "whole numbers above 0", found)
    return [row if isinstance(item, list) else row[0] for item, row in zip(items, rows, strict=True)]


def _odd(section: Section, name: str) -> int:
    size = section.integer(name, 3)
    if size % 2 == 0 or size < 1:
        raise section.wrong(name, "an odd number", size)
    return size

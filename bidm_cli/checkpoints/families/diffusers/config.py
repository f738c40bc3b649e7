"""Architecture of a U-Net or first stage from a diffusers ``config.json``; absent settings have defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bidm_cli.checkpoints.first_stages.compvis import Architecture
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.errors import BidmError

_DOWN = {"DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"}
_UP = {"UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"}
_ENCODER = {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"}
_DECODER = {"UpDecoderBlock2D", "AttnUpDecoderBlock2D"}
_SILU = ("silu", "swish")
_MIDDLE = {"UNetMidBlock2DCrossAttn": "cross", "UNetMidBlock2D": "plain"}
# Settings of networks that bidm does not have, and the values with which they make no difference.
_ORDINARY: dict[str, tuple[Any, ...]] = {
    "act_fn": _SILU,
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
DEFAULT_KL_SCALE = 0.18215


def unet_from_config(section: Section) -> Architecture:
    """Architecture of a ``UNet2DModel``."""
    widths = section.numbers("block_out_channels", [224, 448, 672, 896])
    default = ["DownBlock2D", *["AttnDownBlock2D"] * 3], [*["AttnUpBlock2D"] * 3, "UpBlock2D"]
    downs = _block_types(section, "down_block_types", _DOWN, default[0], widths)
    ups = _block_types(section, "up_block_types", _UP, default[1], widths)[::-1]
    _choice(section, "act_fn", "silu", _SILU)
    times = _choice(section, "time_embedding_type", "positional", ("positional", "learned"))
    _choice(section, "mid_block_type", "UNetMidBlock2D", ("UNetMidBlock2D",))
    if section.get("attention_legacy_order", False):
        raise BidmError(f"{section.where}: attention_legacy_order is not supported")
    one_head = section.values.get("attention_head_dim", 8) is None
    arguments: dict[str, Any] = {
        **_common_arguments(section, 3),
        "block_out_channels": widths,
        "layers_per_block": section.integer("layers_per_block", 2),
        "attention_levels": _attention_levels(downs),
        "up_attention_levels": _attention_levels(ups),
        "resnet_down_levels": _resnets(section, "downsample_type", downs),
        "resnet_up_levels": _resnets(section, "upsample_type", ups),
        # null means a single head, an absent key the default of 8.
        "attention_head_dim": None if one_head else section.integer("attention_head_dim", 8),
        "mid_block": section.values.get("mid_block_type", "") is not None,
        "mid_attention": section.flag("add_attention", True),
        "mid_attention_norm": not _film(section) or "attn_norm_num_groups" in section,
    }
    if "attn_norm_num_groups" in section:
        arguments["mid_attention_groups"] = section.integer("attn_norm_num_groups")
    if times == "learned":
        arguments["learned_times"] = section.integer("num_train_timesteps")
    return {"kind": "diffusers_unet", "args": arguments}


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
    downs = _block_types(section, "down_block_types", {*_DOWN, cross_down}, default[0], widths)
    ups = _block_types(section, "up_block_types", {*_UP, cross_up}, default[1], widths)[::-1]
    middle = section.values.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if middle is not None and middle not in _MIDDLE:
        raise BidmError(f"{section.where}: mid_block_type {str(middle)[:60]!r} is not supported")
    down_attention, up_attention = _attention_kinds(downs), _attention_kinds(ups)
    crosses = [a == "cross" or b == "cross" for a, b in zip(down_attention, up_attention, strict=True)]
    crosses[-1] = crosses[-1] or _MIDDLE.get(middle) == "cross"
    arguments: dict[str, Any] = {
        **_common_arguments(section, 4),
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


def _common_arguments(section: Section, channels: int) -> dict[str, Any]:
    """Arguments that both U-Nets have; ``channels`` in and out by default."""
    return {
        "in_channels": section.integer("in_channels", channels),
        "out_channels": section.integer("out_channels", channels),
        "downsample_padding": section.integer("downsample_padding", 1),
        "norm_num_groups": section.integer("norm_num_groups", 32),
        "norm_eps": section.number("norm_eps", 1e-5),
        "film": _film(section),
        "mid_scale": section.number("mid_block_scale_factor", 1.0),
        "freq_shift": section.integer("freq_shift", 0),
        "flip_sin_to_cos": section.flag("flip_sin_to_cos", True),
        "center_input": section.flag("center_input_sample"),
        "dropout": section.number("dropout", 0.0),
        **_classes(section),
        **{name: section.integer(name) for name in ("time_embedding_dim",) if name in section},
    }


def _film(section: Section) -> bool:
    """True if the time embedding scales and shifts instead of being added."""
    known = ("default", "scale_shift")
    return _choice(section, "resnet_time_scale_shift", "default", known) == "scale_shift"


def _classes(section: Section) -> dict[str, Any]:
    """Embedding of labels: rows of a table, or as times are (``class_embed_type`` "timestep")."""
    kind = section.get("class_embed_type", None)
    if kind not in (None, "timestep"):
        raise BidmError(f"{section.where}: class_embed_type {str(kind)[:60]!r} is not supported")
    if kind == "timestep":
        return {"class_times": True}
    return {"num_classes": section.integer("num_class_embeds")} if "num_class_embeds" in section else {}


def first_stage_from_config(section: Section) -> tuple[Architecture, float, str]:
    """(architecture, scale factor, where that comes from) of a ``VQModel`` or ``AutoencoderKL``.

    A ``VQModel`` without ``scaling_factor`` is a converted LDM one, whose latents are not scaled: today's
    default of that class, 0.18215, would be wrong (diffusers issue 6725).
    """
    name = section.text("_class_name", "")
    widths = section.numbers("block_out_channels", [64])
    downs = _block_types(section, "down_block_types", _ENCODER, ["DownEncoderBlock2D"], widths)
    ups = _block_types(section, "up_block_types", _DECODER, ["UpDecoderBlock2D"], widths)[::-1]
    _choice(section, "act_fn", "silu", _SILU)
    _choice(section, "norm_type", "group", ("group",))
    latent = section.integer("latent_channels", 4 if name == "AutoencoderKL" else 3)
    arguments: dict[str, Any] = {
        "in_channels": section.integer("in_channels", 3),
        "out_channels": section.integer("out_channels", 3),
        "block_out_channels": widths,
        "layers_per_block": section.integer("layers_per_block", 1),
        "encoder_attention_levels": _attention_levels(downs),
        "decoder_attention_levels": _attention_levels(ups),
        "latent_channels": latent,
        "norm_num_groups": section.integer("norm_num_groups", 32),
        "mid_attention": section.flag("mid_block_add_attention", True),
    }
    if name == "VQModel":
        arguments["embed_dim"] = section.integer("vq_embed_dim", latent)
        arguments["n_embed"] = section.integer("num_vq_embeddings", 256)
        kind, missing = "diffusers_vq", (1.0, "assumed: a VQModel that names none is a converted LDM's")
    elif name == "AutoencoderKL":
        arguments |= _latent_statistics(section, latent)
        arguments["quant_conv"] = section.flag("use_quant_conv", True)
        arguments["post_quant_conv"] = section.flag("use_post_quant_conv", True)
        kind, missing = "diffusers_kl", (DEFAULT_KL_SCALE, "the default of AutoencoderKL")
    else:
        raise BidmError(
            f"{section.where}: a first stage of the class {name or '(none named)'} is not supported; "
            "bidm has VQModel and AutoencoderKL"
        )
    if "scaling_factor" in section:
        return {"kind": kind, "args": arguments}, section.number("scaling_factor"), "from its config.json"
    return {"kind": kind, "args": arguments}, *missing


def _latent_statistics(section: Section, channels: int) -> dict[str, list[float]]:
    """Mean and standard deviation per channel of the latents, besides the scale."""
    names = [name for name in ("latents_mean", "latents_std") if name in section]
    found = {name: [float(number) for number in section.numbers(name)] for name in names}
    if not names and section.number("shift_factor", 0.0):
        found["latents_mean"] = [section.number("shift_factor")] * channels
    for name, values in found.items():
        if len(values) != channels or (name == "latents_std" and min(values) <= 0):
            raise section.wrong(name, f"{channels} numbers, one per channel", values)
    return found


def _block_types(
    section: Section, name: str, known: set[str], default: list[str], widths: list[Any]
) -> list[str]:
    """Block types, one for each width, without the prefix that the oldest configurations give them."""
    found = section.get(name, default)
    if not isinstance(found, (list, tuple)) or len(found) != len(widths):
        raise section.wrong(name, f"a list of {len(widths)} block types, as block_out_channels", found)
    found = [str(kind).removeprefix("UNetRes") for kind in found]
    strange = [str(kind) for kind in found if str(kind) not in known]
    if strange:
        raise BidmError(
            f"{section.where}: {name} has {strange[0][:60]}, which bidm does not know; "
            f"it knows {', '.join(sorted(known))}"
        )
    return list(found)


def _attention_levels(kinds: list[str]) -> list[int]:
    return [i for i, kind in enumerate(kinds) if kind.startswith("Attn")]


def _resnets(section: Section, name: str, kinds: list[str]) -> list[int]:
    """Levels left by a residual block; plain blocks resample by a conv whatever ``downsample_type`` says."""
    resnet = _choice(section, name, "conv", ("conv", "resnet")) == "resnet"
    leaves = ("Resnet", "Attn") if resnet else ("Resnet",)
    return [i for i, kind in enumerate(kinds) if kind.startswith(leaves)]


def _choice(section: Section, name: str, default: str, known: tuple[str, ...]) -> str:
    value = section.get(name, default)
    if value not in known:
        raise BidmError(f"{section.where}: {name} {value!r} is not supported, only {' or '.join(known)}")
    return str(value)


def _attention_kinds(kinds: list[str]) -> list[str]:
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

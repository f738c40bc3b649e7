"""Architecture of a U-Net or first stage from a diffusers ``config.json``; absent settings have defaults."""

from __future__ import annotations

from typing import Any

from bidm_cli.checkpoints.first_stages.compvis import Architecture
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.errors import BidmError

DOWN = {"DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"}
UP = {"UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"}
_ENCODER = {"DownEncoderBlock2D", "AttnDownEncoderBlock2D"}
_DECODER = {"UpDecoderBlock2D", "AttnUpDecoderBlock2D"}
_SILU = ("silu", "swish")
DEFAULT_KL_SCALE = 0.18215


def unet_from_config(section: Section) -> Architecture:
    """Architecture of a ``UNet2DModel``."""
    widths = section.numbers("block_out_channels", [224, 448, 672, 896])
    default = ["DownBlock2D", *["AttnDownBlock2D"] * 3], [*["AttnUpBlock2D"] * 3, "UpBlock2D"]
    downs = block_types(section, "down_block_types", DOWN, default[0], widths)
    ups = block_types(section, "up_block_types", UP, default[1], widths)[::-1]
    _choice(section, "act_fn", "silu", _SILU)
    times = _choice(section, "time_embedding_type", "positional", ("positional", "learned"))
    _choice(section, "mid_block_type", "UNetMidBlock2D", ("UNetMidBlock2D",))
    if section.get("attention_legacy_order", False):
        raise BidmError(f"{section.where}: attention_legacy_order is not supported")
    one_head = section.values.get("attention_head_dim", 8) is None
    arguments: dict[str, Any] = {
        **common_arguments(section, 3),
        "block_out_channels": widths,
        "layers_per_block": section.integer("layers_per_block", 2),
        "attention_levels": _attention(downs),
        "up_attention_levels": _attention(ups),
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


def common_arguments(section: Section, channels: int) -> dict[str, Any]:
    """Arguments that both U-Nets have; ``channels`` in and out by default."""
    width = {"time_embedding_dim": section.integer("time_embedding_dim", 0)}
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
        **(width if "time_embedding_dim" in section else {}),
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
    downs = block_types(section, "down_block_types", _ENCODER, ["DownEncoderBlock2D"], widths)
    ups = block_types(section, "up_block_types", _DECODER, ["UpDecoderBlock2D"], widths)[::-1]
    _choice(section, "act_fn", "silu", _SILU)
    _choice(section, "norm_type", "group", ("group",))
    latent = section.integer("latent_channels", 4 if name == "AutoencoderKL" else 3)
    arguments: dict[str, Any] = {
        "in_channels": section.integer("in_channels", 3),
        "out_channels": section.integer("out_channels", 3),
        "block_out_channels": widths,
        "layers_per_block": section.integer("layers_per_block", 1),
        "encoder_attention_levels": _attention(downs),
        "decoder_attention_levels": _attention(ups),
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


def block_types(
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


def _attention(kinds: list[str]) -> list[int]:
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

"""The architecture of a CompVis first stage, from its configuration or from its weights' names and shapes."""

from __future__ import annotations

import re
from typing import Any

from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.checkpoints.reading.shapes import Shapes, count, inferring
from bidm_cli.errors import BidmError

Architecture = dict[str, Any]

# "vanilla-xformers" computes what "vanilla" does; "none" leaves out the attention of the levels, too.
_ATTENTION = ("vanilla", "vanilla-xformers", "none")


def is_left_over(name: str) -> bool:
    """Keys of a first stage that only its training used: losses, discriminator, its own EMA."""
    return name.startswith(("loss.", "model_ema.", "quantize.used", "colorize"))


def first_stage_from_config(section: Section) -> Architecture | None:
    """Architecture from ``first_stage_config``; None for an identity."""
    if section.text("target", "").endswith("IdentityFirstStage"):
        return None
    parameters = section.section("params")
    shape = parameters.section("ddconfig")
    attention_type = shape.text("attn_type", "vanilla")
    if attention_type not in _ATTENTION or shape.flag("use_linear_attn"):
        kind = attention_type if attention_type not in _ATTENTION else "linear"
        raise BidmError(f"{shape.where}: attention of type {kind!r} is not supported")
    if shape.flag("give_pre_end"):
        raise BidmError(f"{shape.where}: give_pre_end is not supported")
    multiples = shape.numbers("ch_mult", [1, 2, 4, 8])
    resolution = shape.integer("resolution", 256)
    wanted = shape.numbers("attn_resolutions", [])
    arguments = {
        "in_channels": shape.integer("in_channels", 3),
        "out_channels": shape.integer("out_ch", 3),
        "ch": shape.integer("ch"),
        "ch_mult": multiples,
        "num_res_blocks": shape.integer("num_res_blocks"),
        "attention_levels": [
            i for i in range(len(multiples)) if resolution // 2**i in wanted and attention_type != "none"
        ],
        "z_channels": shape.integer("z_channels"),
        "embed_dim": parameters.integer("embed_dim"),
        "mid_attention": attention_type != "none",
        "resamp_with_conv": shape.flag("resamp_with_conv", True),
        "tanh_out": shape.flag("tanh_out", False),
    }
    if "n_embed" in parameters:
        arguments |= {"double_z": False, "n_embed": parameters.integer("n_embed")}
        return {"kind": "vq_first_stage", "args": arguments}
    return {"kind": "kl_first_stage", "args": arguments | {"double_z": shape.flag("double_z", True)}}


def encoder_arguments(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """Arguments that the encoders of first stages and of the DDPM U-Net have in common."""
    ch = shapes[f"{prefix}conv_in.weight"][0]
    levels = range(count(shapes, re.escape(prefix) + r"down\.(\d+)\.block\.0\.conv1\.weight"))
    return {
        "ch": ch,
        "ch_mult": [shapes[f"{prefix}down.{i}.block.0.conv1.weight"][0] // ch for i in levels],
        "num_res_blocks": count(shapes, re.escape(prefix) + r"down\.0\.block\.(\d+)\.conv1\.weight"),
        "attention_levels": [i for i in levels if f"{prefix}down.{i}.attn.0.q.weight" in shapes],
    }


@inferring("first stage")
def infer_first_stage(shapes: Shapes) -> Architecture:
    """Architecture of a VQ or KL first stage from its weights, named without ``first_stage_model.``."""
    encoder = encoder_arguments(shapes, "encoder.")
    z_channels, embed_dim = shapes["post_quant_conv.weight"][:2]
    arguments: dict[str, Any] = {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        **encoder,
        "z_channels": z_channels,
        "embed_dim": embed_dim,
        "double_z": shapes["encoder.conv_out.weight"][0] == 2 * z_channels,
        "mid_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "resamp_with_conv": len(encoder["ch_mult"]) == 1 or "encoder.down.0.downsample.conv.weight" in shapes,
    }
    if "quantize.embedding.weight" in shapes:
        arguments["n_embed"] = shapes["quantize.embedding.weight"][0]
        return {"kind": "vq_first_stage", "args": arguments}
    return {"kind": "kl_first_stage", "args": arguments}


def reduction(architecture: Architecture) -> int:
    """Downsampling factor f of a first stage, diffusers' too: the image's side over that of its latents."""
    arguments = architecture["args"]
    return int(2 ** (len(arguments.get("ch_mult") or arguments["block_out_channels"]) - 1))


def latent_channels(architecture: Architecture) -> int:
    """Channels of a first stage's latents, diffusers' too."""
    arguments = architecture["args"]
    return int(arguments["embed_dim"] if "embed_dim" in arguments else arguments["latent_channels"])


def one_line(architecture: Architecture) -> str:
    """A first stage in words."""
    arguments = architecture["args"]
    if architecture["kind"] == "vq_first_stage":
        return f"VQ-f{reduction(architecture)}, {arguments['n_embed']} codes of {arguments['embed_dim']}"
    return f"KL-f{reduction(architecture)}, {arguments['embed_dim']} channels"

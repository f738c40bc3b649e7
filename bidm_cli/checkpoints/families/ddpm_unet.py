"""The arguments of a DDPM U-Net (:class:`bidm_cli.networks.ddpm_unet.DDPMUNet`), from a configuration's
``model`` section or from names and shapes.
"""

from __future__ import annotations

import re
from typing import Any

from bidm_cli.checkpoints.families.openai.infer import Shapes
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.errors import BidmError


def ddpm_unet_arguments(model: Section, image_size: int) -> dict[str, Any]:
    """Arguments from the original constructor's; attention sits where the size is in ``attn_resolutions``.

    Raises:
        BidmError: settings are missing or of the wrong type.
    """
    multiples = model.numbers("ch_mult")
    resolutions = model.numbers("attn_resolutions")
    in_channels = model.integer("in_channels", 3)
    out_channels = model.get("out_ch", None) or model.get("out_channels", in_channels)
    return {
        "in_channels": in_channels,
        "out_channels": Section({"out_ch": out_channels}, model.where).integer("out_ch"),
        "ch": model.integer("ch"),
        "ch_mult": multiples,
        "num_res_blocks": model.integer("num_res_blocks"),
        "attention_levels": [i for i in range(len(multiples)) if image_size // 2**i in resolutions],
        "resamp_with_conv": model.flag("resamp_with_conv", True),
        "conv_shortcut": model.flag("conv_shortcut", False),
        "dropout": model.number("dropout", 0.0),
    }


def infer_ddpm_unet(shapes: Shapes) -> dict[str, Any]:
    """Arguments from the weights, named without any prefix; this network hides nothing but its dropout.

    Raises:
        BidmError: the weights are not such a network's.
    """
    try:
        ch, in_channels = shapes["conv_in.weight"][:2]
        levels = _count(shapes, r"down\.(\d+)\.block\.0\.conv1\.weight")
        return {
            "in_channels": in_channels,
            "out_channels": shapes["conv_out.weight"][0],
            "ch": ch,
            "ch_mult": [shapes[f"down.{i}.block.0.conv1.weight"][0] // ch for i in range(levels)],
            "num_res_blocks": _count(shapes, r"down\.0\.block\.(\d+)\.conv1\.weight"),
            "attention_levels": [i for i in range(levels) if f"down.{i}.attn.0.q.weight" in shapes],
            "resamp_with_conv": levels == 1 or "down.0.downsample.conv.weight" in shapes,
            "conv_shortcut": any(name.endswith(".conv_shortcut.weight") for name in shapes),
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise BidmError(
            f"cannot tell the U-Net's architecture from its weights: {error} is missing or has an odd shape; "
            "the file is incomplete, or give its configuration with --config"
        ) from error


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match[1] for name in shapes if (match := re.fullmatch(pattern, name))})

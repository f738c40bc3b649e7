"""Back to a float checkpoint in the original key layout, for tools that know nothing of bits.

    config = export_checkpoint(load_packed("model.bidm"), Path("model.ckpt"))

A packed layer becomes a float layer with the weights alpha * sign(W). Thresholds, scale maps, shortcuts,
binary attention and cross-timestep connections have no place in the original layout, so what is exported is
the weights alone: in the original network, without its binary activations, they compute something else than
the packed file does. Use them to inspect or to start training from, not to sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from bidm_cli.checkpoints import export_families
from bidm_cli.checkpoints.export_config import ddim_config, ldm_config, pesser_config
from bidm_cli.checkpoints.export_families import Exported
from bidm_cli.checkpoints.families.diffusers.export import export_folder
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.bits import unpack_bits
from bidm_cli.packed.layers import PackedLayer
from bidm_cli.packed.model import PackedModel

WEIGHTS_ONLY = (
    "exported: weights (alpha * sign) and what was float; thresholds, activation scales, shortcuts, binary "
    "attention and cross-timestep connections have no place in the original layout and are left out"
)
"""What to tell whoever exports."""

WITH_FIRST_STAGE = ("ldm", "diffusers")
"""Families whose layout has a place for the first stage."""


def export_checkpoint(packed: PackedModel, path: str | Path) -> Path:
    """Write a float checkpoint that :func:`bidm_cli.load_checkpoint` reads, and its configuration beside it.

    Returns the configuration's path: the checkpoint's name with .yaml, .yml or .json. A diffusers model is a
    folder with its configurations inside.

    Raises:
        BidmError: a family without an exporter, a setting its configuration cannot say, or no place to write.
    """
    path = Path(path)
    if packed.family == "diffusers":
        return export_folder(packed, float_weights(packed), path)
    if packed.family not in _FAMILIES:
        known = ", ".join((*_FAMILIES, "diffusers"))
        raise BidmError(f"models of the family {packed.family!r} cannot be exported yet, only {known}")
    content, config, suffix = _FAMILIES[packed.family](packed)
    config_path = path.with_suffix(suffix)
    if config_path == path:
        raise BidmError(f"{path} is where the configuration goes; name the checkpoint .ckpt or .pth")
    with write_atomically(path) as temporary:
        torch.save(content, temporary)
    with write_atomically(config_path) as temporary:
        text = json.dumps(config, indent=1) if suffix == ".json" else yaml.safe_dump(config, sort_keys=False)
        temporary.write_text(text, encoding="utf-8")
    return config_path


def float_weights(packed: PackedModel) -> dict[str, Tensor]:
    """The network's weights by their original names, float32; packed layers as alpha * sign(W).

    Raises:
        BidmError: the names do not come out as the original network's.
    """
    layers = {name: layer for name, layer in packed.unet.named_modules() if isinstance(layer, PackedLayer)}
    weights = {
        key: tensor.detach().cpu()
        for key, tensor in packed.unet.state_dict().items()
        if key.rpartition(".")[0] not in layers
        and not key.startswith("connections.")
        and not key.endswith(".score_scale")
    }
    for name, layer in layers.items():
        weights[f"{name}.weight"] = scaled_signs(layer).cpu()
        if layer.bias is not None:
            weights[f"{name}.bias"] = layer.bias.cpu()
    with torch.device("meta"):
        original = build(packed.architecture["unet"]).state_dict()
    if original.keys() != weights.keys():
        strange = sorted(original.keys() ^ weights.keys())[:3]
        raise BidmError(f"cannot export: {', '.join(strange)} do not fit the original network")
    return {key: weights[key] for key in original}


def scaled_signs(layer: PackedLayer) -> Tensor:
    """alpha * sign(W) in the original layer's shape."""
    signs = unpack_bits(layer.weight_bits, layer.geometry)
    if layer.weight_scale is None:
        return signs
    return signs * layer.weight_scale.reshape(-1, *[1] * (signs.dim() - 1))


Content = tuple[Any, dict[str, Any], str]


def _ddpm(packed: PackedModel) -> Content:
    """ermongroup's list with EMA, or pesser's bare state dict, by how the family samples."""
    weights = float_weights(packed)
    if packed.convention.variance != "ddim_noisy":
        return weights, pesser_config(packed), ".json"
    raw = {f"module.{key}": tensor for key, tensor in weights.items()}
    return [raw, {}, 0, 0, weights], ddim_config(packed), ".yml"


def _ldm(packed: PackedModel) -> Content:
    weights = {f"model.diffusion_model.{key}": tensor for key, tensor in float_weights(packed).items()}
    parts: tuple[tuple[str, nn.Module | None], ...] = (
        ("first_stage_model", packed.first_stage),
        ("cond_stage_model", packed.conditioner),
    )
    for prefix, part in parts:
        if part is not None:
            weights |= {f"{prefix}.{key}": tensor.cpu() for key, tensor in part.state_dict().items()}
    weights["betas"] = packed.schedule.betas.float()
    weights["alphas_cumprod"] = packed.schedule.alphas_cumprod.float()
    weights["scale_factor"] = torch.tensor(packed.scale_factor)
    return {"state_dict": weights}, ldm_config(packed), ".yaml"


def _by_arguments(
    write: Callable[[PackedModel, dict[str, Tensor]], Exported],
) -> Callable[[PackedModel], Content]:
    """An exporter for a family whose configuration is JSON of constructor arguments."""

    def exported(packed: PackedModel) -> Content:
        content, config = write(packed, float_weights(packed))
        return content, config, ".json"

    return exported


_FAMILIES: dict[str, Callable[[PackedModel], Content]] = {
    "ddpm": _ddpm,
    "ldm": _ldm,
    "openai": _by_arguments(export_families.openai),
    "w86763777": _by_arguments(export_families.w86763777),
    "dit": _by_arguments(export_families.dit),
    "uvit": _by_arguments(export_families.uvit),
    "lucidrains": _by_arguments(export_families.lucidrains),
    "score-sde": _by_arguments(export_families.score_sde),
}

"""Write the packed files of this folder and what they gave.

This ran once, at commit ddae7db (bidm 0.1.0), as ``python -m tests.packed.written_by_0_1_0.write``. It
stays as the record of how the files came about; it uses modules as they were named then and is not run again.
Later versions have to read the files as they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bidm_cli.packed.container import write_packed
from bidm_cli.packed.pack import pack_model

import bidm_cli
from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.binary.surgery import binarize
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.networks.registry import build

FOLDER = Path(__file__).resolve().parent
DDPM = {
    "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
    "attention_levels": [1],
}  # fmt: skip
SMALL_DDPM = {**DDPM, "ch_mult": [1], "attention_levels": [0]}
LDM = {
    "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2],
    "attention_resolutions": [2], "num_heads": 2, "use_spatial_transformer": True, "context_dim": 16,
}  # fmt: skip
VQ = {
    "n_embed": 64, "embed_dim": 3, "z_channels": 3, "in_channels": 3, "out_channels": 3, "ch": 32,
    "ch_mult": [1, 1], "num_res_blocks": 1, "attention_levels": [], "mid_attention": False,
}  # fmt: skip
DIT = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 8, "hidden_size": 32, "depth": 3,
    "num_heads": 4, "label_rows": 6, "mlp_width": 128, "frequencies": 256,
}  # fmt: skip
LUCIDRAINS = {
    "dim": 16, "dim_mults": [1, 2], "channels": 3, "out_dim": 3, "full_attn": [False, True],
    "attn_heads": [2, 2], "attn_dim_head": [8, 8],
}  # fmt: skip
UVIT = {
    "img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 64, "half_depth": 1, "num_heads": 2,
    "mlp_width": 128, "label_rows": 4, "qkv_bias": True, "mlp_time_embed": True,
}  # fmt: skip
LINEAR, COSINE = NoiseSchedule.linear(1000, 1e-4, 0.02), NoiseSchedule.cosine(400)
MODELS: dict[str, dict[str, Any]] = {
    "ddpm_w1a1": {"family": "ddpm", "kind": "ddpm_unet", "args": DDPM, "recipe": "w1a1"},
    "ddpm_w1a32": {"family": "ddpm", "kind": "ddpm_unet", "args": SMALL_DDPM, "recipe": "w1a32"},
    "ldm_attention": {
        "family": "ldm", "kind": "ldm_unet", "args": LDM, "recipe": "w1a1-attention", "labels": [1, 3],
        "first_stage": {"kind": "vq_first_stage", "args": VQ},
        "conditioner": {"kind": "class_embedder", "args": {"n_classes": 5, "embed_dim": 16}},
        "convention": {"spacing": "ldm", "final_alpha": "first"}, "guidance": 2.0,
        "more": {"num_classes": 5, "null_label": 4, "scale_factor": 0.5},
    },
    "dit": {
        "family": "dit", "kind": "dit", "args": DIT, "recipe": "w1a1", "shape": (4, 8, 8), "labels": [0, 2],
        "convention": {"spacing": "openai_ddim", "variance": "learned_range", "guided_channels": 3},
        "more": {"num_classes": 6, "null_label": 5}, "guidance": 2.0,
    },
    "lucidrains_reference": {
        "family": "lucidrains", "kind": "lucidrains_unet", "args": LUCIDRAINS, "recipe": "reference",
        "convention": {"spacing": "lucidrains", "clip": "rederive", "clip_ancestral": True},
        "schedule": COSINE,
        "more": {"prediction": "v"},
    },
    "ddpm_clip_range": {
        "family": "diffusers", "kind": "ddpm_unet", "args": SMALL_DDPM, "recipe": "xnor",
        "convention": {"spacing": "leading", "clip": "keep_eps", "clip_range": 1.5},
    },
    "uvit_threshold": {
        "family": "uvit", "kind": "uvit", "args": UVIT, "recipe": "w1a1", "labels": [0, 3],
        "convention": {
            "spacing": "trailing", "clip": "keep_eps", "threshold_quantile": 0.9, "threshold_max": 2.0,
        },
        "more": {"num_classes": 4},
    },
}  # fmt: skip


def randomize(network: torch.nn.Module) -> None:
    """Give what starts at zero or one the values that a trained network might have."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if value.abs().max() == 0 or name.endswith(
                ("threshold", "scale_filter", "shortcut_scale", "score_scale")
            ):
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
        connections = getattr(network, "connections", None)
        if connections is not None:
            connections.beta.add_(0.1 * torch.rand(connections.beta.shape, generator=generator))


def student(name: str) -> tuple[DiffusionModel, bidm_cli.Recipe]:
    """A binarized network of random weights."""
    about = MODELS[name]
    torch.manual_seed(0)
    parts: dict[str, Any] = {"unet": {"kind": about["kind"], "args": about["args"]}}
    parts |= {part: about.get(part) for part in ("first_stage", "conditioner")}
    networks = {part: None if made is None else build(made) for part, made in parts.items()}
    recipe = bidm_cli.Recipe.load(about["recipe"])
    schedule = about.get("schedule", LINEAR)
    binarize(networks["unet"], recipe, timesteps=schedule.timesteps)
    randomize(networks["unet"])
    assert any(isinstance(layer, BinaryLayer) for layer in networks["unet"].modules())
    convention = SamplingConvention(**about.get("convention", {}))
    model = DiffusionModel(
        about["family"], sample_shape=about.get("shape", (3, 8, 8)), schedule=schedule, convention=convention,
        architecture=parts, **networks, **about.get("more", {}),
    )  # fmt: skip
    return model, recipe


def outputs(path: Path, backend: str, seed: int, about: dict[str, Any]) -> dict[str, np.ndarray]:
    """Inputs, the network's output, a short sampling, and its pictures."""
    packed = bidm_cli.load_packed(path, backend=backend)
    labels = about.get("labels")
    context, y = packed.condition(None if labels is None else torch.tensor(labels))
    x = torch.randn(2, *packed.sample_shape, generator=torch.Generator().manual_seed(seed))
    t = torch.tensor([20, packed.schedule.timesteps - 50])
    with torch.no_grad():
        eps = packed.denoise(x, t, context, y)
        latents = bidm_cli.sample(
            packed, n=2, steps=4, seed=seed, labels=labels, guidance=about.get("guidance", 1.0)
        )
        found = {"x": x, "t": t, "context": context, "y": y, "eps": eps, "latents": latents}
        if packed.first_stage is not None:
            found["images"] = packed.decode(latents)
    return {key: value.numpy() for key, value in found.items() if value is not None}


def agree(one: np.ndarray, other: np.ndarray, tolerance: float) -> bool:
    """True if no number differs by more than the tolerance, relative to the largest number."""
    return bool(np.abs(one - other).max() <= tolerance * np.abs(one).max())


def main() -> None:
    """Inputs are the first ones with which no sign is so near to its threshold that rounding decides it."""
    torch.set_num_threads(2)
    records = {}
    for name, about in MODELS.items():
        path = FOLDER / f"{name}.bidm"
        model, recipe = student(name)
        provenance = {
            "source": f"{name}.ckpt",
            "sha256": None,
            "steps": 0,
            "seed": 0,
            "versions": {"bidm": "0.1.0"},
        }
        write_packed(path, *pack_model(model, recipe.to_json(), provenance, {"final": None}))
        for seed in range(100):
            recorded = outputs(path, "torch", seed, about)
            fast = outputs(path, "numba", seed, about)
            if agree(recorded["eps"], fast["eps"], 5e-6) and agree(
                recorded["latents"], fast["latents"], 2e-5
            ):
                break
            print(name, seed, "is decided by rounding", flush=True)
        else:
            raise SystemExit(f"{name}: rounding decides signs with every seed")
        np.savez_compressed(path.with_suffix(".npz"), **recorded)
        packed = bidm_cli.load_packed(path)
        table = json.dumps([record.to_json() for record in packed.layers], sort_keys=True)
        records[name] = {
            "seed": seed, "labels": about.get("labels"), "guidance": about.get("guidance", 1.0),
            "family": packed.family, "recipe": packed.recipe, "provenance": packed.provenance,
            "sample_shape": list(packed.sample_shape), "timesteps": packed.schedule.timesteps,
            "connections": packed.connections is not None,
            "layers": hashlib.sha256(table.encode()).hexdigest(),
            "largest": {key: float(np.abs(recorded[key]).max()) for key in ("eps", "latents")},
        }  # fmt: skip
        print(
            name,
            path.stat().st_size,
            records[name]["seed"],
            records[name]["connections"],
            records[name]["largest"],
            flush=True,
        )
    (FOLDER / "recorded.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()

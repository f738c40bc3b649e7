"""Storage and operations of the well-known networks under a recipe: counts, on the meta device, no weights.

    python benchmarks/known_networks.py --recipe w1a1

Prints the tables that stand in benchmarks/results/known_networks.md. tests/networks/test_published.py holds
the numbers of parameters against the original codes'.
"""

from __future__ import annotations

import argparse

import torch
from random_models import model_of, published
from record import add_record_option, record

import bidm_cli
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.first_stage import StageForm
from bidm_cli.recipe import Recipe
from bidm_cli.report.cost.cost import Cost

SIZES = {
    "LSUN-Bedrooms": 64, "LSUN-Churches": 32, "ImageNet f8": 32, "cin256-v2": 64, "text2img256": 64,
    "inpainting": 64, "super-resolution": 64, "semantic synthesis": 128, "txt2img-1p4B": 32,
    "Stable Diffusion 1": 64, "guided 64": 64, "guided 128": 128, "guided 256": 256,
    "guided 256 unconditional": 256, "guided 512": 512, "improved imagenet64": 64, "improved cifar10": 32,
    "improved imagenet64 conditional": 64, "improved lsun": 256, "CIFAR-10": 32, "CelebA 64": 64, "LSUN": 256,
    "w86763777 CIFAR-10": 32, "DiT-XL/2": 32, "DiT-B/2": 32, "DiT-S/8": 32, "U-ViT CIFAR-10": 32,
    "google/ddpm-cifar10-32": 32, "google/ddpm-celebahq-256": 256, "CompVis/ldm-celebahq-256": 64,
}  # fmt: skip
"""Height and width of what each network denoises."""

STAGES = {
    "LSUN-Bedrooms": "VQ-f4", "LSUN-Churches": "KL-f8", "ImageNet f8": "VQ-f8", "cin256-v2": "VQ-f4",
    "text2img256": "VQ-f4", "inpainting": "VQ-f4",
    "super-resolution": "VQ-f4",
    "semantic synthesis": "VQ-f4",
    "txt2img-1p4B": "KL-f8", "Stable Diffusion 1": "KL-f8", "DiT-XL/2": "KL-f8", "DiT-B/2": "KL-f8",
    "DiT-S/8": "KL-f8", "CompVis/ldm-celebahq-256": "VQModel f4",
}  # fmt: skip
"""First stage that belongs to each latent network; DiT's is another file, packed if it is given."""


def main() -> None:
    """Print the savings of each known network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="w1a1")
    add_record_option(parser, "known_networks")
    options = parser.parse_args()
    recipe = Recipe.load(options.recipe)
    print(
        "| network | input | parameters | float32 MiB | packed MiB | storage | whole file, MiB "
        "| operations | with attention |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = {}
    for name, (architecture, _) in {**published.NETWORKS, **published.DIFFUSERS}.items():
        if name not in SIZES:
            continue  # a first stage
        model = model_of(architecture, SIZES[name], "meta")
        shape = "x".join(str(side) for side in model.sample_shape)
        _join_first_stage(model, STAGES.get(name))
        cost = bidm_cli.cost(model, recipe)
        rows[f"{name}, {options.recipe}"] = cost.to_json()
        print(
            f"| {name} | {shape} | {cost.parameters:,} | {cost.float_bytes / 2**20:.1f} | "
            f"{cost.packed_bytes / 2**20:.1f} | {cost.storage_ratio:.1f}x | "
            f"{_whole_file(cost)} | {cost.ops_ratio:.1f}x | "
            f"{cost.ops_ratio_with_attention:.1f}x |",
            flush=True,
        )
    _print_first_stages(recipe)
    if options.record:
        record(options.record, rows)


def _join_first_stage(model: DiffusionModel, name: str | None) -> None:
    """Give ``model`` the first stage of this name, without weights; it says which inputs are conditions."""
    if name is None:
        return
    architecture, _ = {**published.FIRST_STAGES, **published.DIFFUSERS}[name]
    model.architecture["first_stage"] = architecture
    with torch.device("meta"):
        model.first_stage = build(architecture)
    channels = architecture["args"].get("embed_dim") or architecture["args"]["latent_channels"]
    model.sample_shape = (channels, *model.sample_shape[1:])


def _whole_file(cost: Cost) -> str:
    sizes = f"{cost.whole_float_bytes / 2**20:.1f} to {cost.whole_packed_bytes / 2**20:.1f}"
    return f"{sizes}, {cost.whole_ratio:.1f}x" if cost.parts else "the same"


def _print_first_stages(recipe: Recipe) -> None:
    """First stages: all of them in float32 in the original; in a packed file what the recipe says."""
    stored = recipe.first_stage
    columns = f"{stored.keep}, {stored.weights} | both, float16"
    print(f"\n| first stage | parameters | float32 MiB | {columns} |\n|---|---|---|---|---|")
    for name, (architecture, _) in {**published.FIRST_STAGES, **published.DIFFUSERS}.items():
        if name in SIZES:
            continue
        with torch.device("meta"):
            stage = build(architecture)
        count = sum(value.numel() for value in stage.state_dict().values())
        rest = getattr(torch, recipe.store.float)
        packed = StageForm(stored.keep, stored.weights, rest, is_whole=False).bytes(stage) / 2**20
        print(f"| {name} | {count:,} | {count / 2**18:.1f} | {packed:.1f} | {count / 2**19:.1f} |")


if __name__ == "__main__":
    main()

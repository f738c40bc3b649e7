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
from bidm_cli.networks.registry import build
from bidm_cli.recipe import Recipe

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


def main() -> None:
    """Print the savings of each known network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", default="w1a1")
    add_record_option(parser, "known_networks")
    options = parser.parse_args()
    recipe = Recipe.load(options.recipe)
    print(
        "| network | input | parameters | float32 MiB | packed MiB | storage | operations | with attention |"
    )
    print("|---|---|---|---|---|---|---|---|")
    rows = {}
    for name, (architecture, _) in {**published.NETWORKS, **published.DIFFUSERS}.items():
        if name not in SIZES:
            continue  # a first stage
        model = model_of(architecture, SIZES[name], "meta")
        cost = bidm_cli.cost(model, recipe)
        rows[f"{name}, {options.recipe}"] = cost.to_json()
        shape = "x".join(str(side) for side in model.sample_shape)
        print(
            f"| {name} | {shape} | {cost.parameters:,} | {cost.float_bytes / 2**20:.1f} | "
            f"{cost.packed_bytes / 2**20:.1f} | {cost.storage_ratio:.1f}x | {cost.ops_ratio:.1f}x | "
            f"{cost.ops_ratio_with_attention:.1f}x |",
            flush=True,
        )
    _print_first_stages()
    if options.record:
        record(options.record, rows)


def _print_first_stages() -> None:
    """First stages stay float: float32 in the original, float16 in a packed file."""
    print("\n| first stage | parameters | float32 MiB | packed MiB |\n|---|---|---|---|")
    for name, (architecture, _) in {**published.FIRST_STAGES, **published.DIFFUSERS}.items():
        if name in SIZES:
            continue
        with torch.device("meta"):
            count = sum(value.numel() for value in build(architecture).state_dict().values())
        print(f"| {name} | {count:,} | {4 * count / 2**20:.1f} | {2 * count / 2**20:.1f} |")


if __name__ == "__main__":
    main()

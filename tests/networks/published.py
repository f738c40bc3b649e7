"""Published networks: name -> (architecture, number of parameters measured on the original code)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_ST = {"use_spatial_transformer": True}
_LATENT_4 = {"in_channels": 4, "out_channels": 4}
_SIGMA = {"out_channels": 6, "use_scale_shift_norm": True}
_GUIDED = {**_SIGMA, "resblock_updown": True}


def _unet(
    width: int, mult: Sequence[float], blocks: int, attention: list[int], **more: Any
) -> dict[str, Any]:
    arguments = {
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": width,
        "channel_mult": mult,
        "num_res_blocks": blocks,
        "attention_resolutions": attention,
    }
    return {"kind": "ldm_unet", "args": {**arguments, **more}}


def _first_stage(
    kind: str, mult: list[int], attention: list[int], latent: int, **more: Any
) -> dict[str, Any]:
    arguments = {
        "in_channels": 3,
        "out_channels": 3,
        "ch": 128,
        "ch_mult": mult,
        "num_res_blocks": 2,
        "attention_levels": attention,
        "z_channels": latent,
        "embed_dim": latent,
    }
    return {"kind": kind, "args": {**arguments, **more}}


def _ddpm(mult: list[int], attention: list[int]) -> dict[str, Any]:
    arguments = {
        "in_channels": 3,
        "out_channels": 3,
        "ch": 128,
        "ch_mult": mult,
        "num_res_blocks": 2,
        "attention_levels": attention,
    }
    return {"kind": "ddpm_unet", "args": arguments}


_MULT_TEXT = [1, 2, 4, 4]
_MULT_256 = [1, 1, 2, 2, 4, 4]

LDM_UNETS = {
    "LSUN-Bedrooms": (_unet(224, [1, 2, 3, 4], 2, [8, 4, 2], num_head_channels=32), 274_056_163),
    "LSUN-Churches": (
        _unet(192, [1, 2, 2, 4, 4], 2, [1, 2, 4, 8], num_heads=8, use_scale_shift_norm=True,
              resblock_updown=True, **_LATENT_4),
        294_966_916,
    ),
    "ImageNet f8": (
        _unet(256, [1, 2, 4], 2, [4, 2, 1], num_head_channels=32, context_dim=512, **_ST, **_LATENT_4),
        394_984_196,
    ),
    "cin256-v2": (_unet(192, [1, 2, 3, 5], 2, [8, 4, 2], num_heads=1, context_dim=512, **_ST), 400_920_579),
    "text2img256": (
        _unet(192, [1, 2, 3, 5], 2, [8, 4, 2], num_head_channels=32, context_dim=640, **_ST),
        403_623_939,
    ),
    "inpainting": (
        _unet(256, [1, 2, 3, 4], 2, [8, 4, 2], num_heads=8, resblock_updown=True, in_channels=7),
        387_245_827,
    ),
    "super-resolution": (
        _unet(160, [1, 2, 2, 4], 2, [16, 8], num_head_channels=32, in_channels=6), 113_622_563
    ),
    "semantic synthesis": (_unet(128, [1, 4, 8], 2, [32, 16, 8], num_heads=8, in_channels=6), 215_229_315),
    "txt2img-1p4B": (
        _unet(320, _MULT_TEXT, 2, [4, 2, 1], num_heads=8, context_dim=1280, **_ST, **_LATENT_4),
        872_300_484,
    ),
    "Stable Diffusion 1": (
        _unet(320, _MULT_TEXT, 2, [4, 2, 1], num_heads=8, context_dim=768, **_ST, **_LATENT_4),
        859_520_964,
    ),
}  # fmt: skip

OPENAI_UNETS = {
    "guided 64": (
        _unet(192, [1, 2, 3, 4], 3, [2, 4, 8], num_head_channels=64, num_classes=1000,
              use_new_attention_order=True, **_GUIDED),
        295_904_454,
    ),
    "guided 128": (
        _unet(256, [1, 1, 2, 3, 4], 2, [4, 8, 16], num_heads=4, num_classes=1000, **_GUIDED),
        421_529_606,
    ),
    "guided 256": (
        _unet(256, _MULT_256, 2, [8, 16, 32], num_head_channels=64, num_classes=1000, **_GUIDED),
        553_838_086,
    ),
    "guided 256 unconditional": (
        _unet(256, _MULT_256, 2, [8, 16, 32], num_head_channels=64, **_GUIDED), 552_814_086
    ),
    "guided 512": (
        _unet(256, [0.5, 1, 1, 2, 2, 4, 4], 2, [16, 32, 64], num_head_channels=64, num_classes=1000,
              **_GUIDED),
        558_997_638,
    ),
    "improved imagenet64": (_unet(128, [1, 2, 3, 4], 3, [4, 8], num_heads=4, **_SIGMA), 121_063_942),
    "improved cifar10": (_unet(128, [1, 2, 2, 2], 3, [2, 4], num_heads=4, **_SIGMA), 52_546_438),
    "improved imagenet64 conditional": (
        _unet(192, [1, 2, 3, 4], 3, [4, 8], num_heads=4, num_classes=1000, **_SIGMA), 273_049_350
    ),
    "improved lsun": (_unet(128, _MULT_256, 2, [16], num_heads=1, out_channels=6), 113_676_678),
}  # fmt: skip

DDPM_UNETS = {
    "CIFAR-10": (_ddpm([1, 2, 2, 2], [1]), 35_746_307),
    "CelebA 64": (_ddpm([1, 2, 2, 2, 4], [2]), 78_700_803),
    "LSUN": (_ddpm([1, 1, 2, 2, 4, 4], [4]), 113_673_219),
}

FIRST_STAGES = {
    "VQ-f4": (_first_stage("vq_first_stage", [1, 2, 4], [], 3, n_embed=8192), 55_322_782),
    "KL-f8": (_first_stage("kl_first_stage", [1, 2, 4, 4], [], 4), 83_653_863),
    "VQ-f8": (_first_stage("vq_first_stage", [1, 2, 2, 4], [3], 4, n_embed=16384), 67_717_295),
}

_GOOGLE = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def _diffusers(kind: str, widths: list[int], **more: Any) -> dict[str, Any]:
    return {"kind": kind, "args": {"block_out_channels": widths, "layers_per_block": 2, **more}}


DIFFUSERS = {
    "google/ddpm-cifar10-32": (
        _diffusers("diffusers_unet", [128, 256, 256, 256], attention_levels=[1], **_GOOGLE), 35_746_307
    ),
    "google/ddpm-celebahq-256": (
        _diffusers("diffusers_unet", [128, 128, 256, 256, 512, 512], attention_levels=[4], **_GOOGLE),
        113_673_219,
    ),
    "CompVis/ldm-celebahq-256": (
        _diffusers(
            "diffusers_unet", [224, 448, 672, 896], attention_levels=[1, 2, 3], attention_head_dim=32
        ),
        274_056_163,
    ),
    "VQModel f4": (
        _diffusers("diffusers_vq", [128, 256, 512], latent_channels=3, embed_dim=3, n_embed=8192), 55_322_782
    ),
    "AutoencoderKL f8": (_diffusers("diffusers_kl", [128, 256, 512, 512], latent_channels=4), 83_653_863),
}  # fmt: skip

W86_UNETS = {
    "w86763777 CIFAR-10": (
        {
            "kind": "w86_unet",
            "args": {
                "timesteps": 1000,
                "ch": 128,
                "ch_mult": [1, 2, 2, 2],
                "num_res_blocks": 2,
                "attention_levels": [1],
            },
        },
        35_874_307,
    )
}


def _dit(width: int, depth: int, heads: int, patch: int) -> dict[str, Any]:
    arguments = {
        "input_size": 32,
        "patch_size": patch,
        "in_channels": 4,
        "out_channels": 8,
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        "label_rows": 1001,
    }
    return {"kind": "dit", "args": arguments}


DIT = {
    "DiT-XL/2": (_dit(1152, 28, 16, 2), 675_129_632),
    "DiT-B/2": (_dit(768, 12, 12, 2), 130_512_416),
    "DiT-S/8": (_dit(384, 12, 6, 8), 33_148_160),
}

UVIT = {
    "U-ViT CIFAR-10": (
        {
            "kind": "uvit",
            "args": {
                "img_size": 32,
                "patch_size": 2,
                "in_chans": 3,
                "embed_dim": 512,
                "half_depth": 6,
                "num_heads": 8,
                "time_scale": 0.999,
            },
        },
        44_255_328,
    )
}

NETWORKS = {**LDM_UNETS, **OPENAI_UNETS, **DDPM_UNETS, **W86_UNETS, **DIT, **UVIT}
"""Denoising networks in their first projects' own layouts."""
ALL = {**NETWORKS, **FIRST_STAGES, **DIFFUSERS}

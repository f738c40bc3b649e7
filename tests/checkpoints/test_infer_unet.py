from __future__ import annotations

from typing import Any

import pytest
import torch

from bidm_cli.checkpoints.families.openai.infer import infer_unet
from bidm_cli.checkpoints.families.published import assume_heads, attention_widths, known_network
from bidm_cli.checkpoints.reading.state import on_meta, shapes_of
from bidm_cli.errors import BidmError
from bidm_cli.networks.ldm_unet import LDMUNet
from tests.networks.published import LDM_UNETS, OPENAI_UNETS

_HEADS = ("num_heads", "num_head_channels", "use_new_attention_order")
_SMALL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 32,
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 3],
    "attention_resolutions": [2],
}
_TRANSFORMER = {"use_spatial_transformer": True, "context_dim": 7}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one level": {"channel_mult": [1], "attention_resolutions": [1]},
    "no attention but in the middle": {"attention_resolutions": []},
    "attention everywhere": {"attention_resolutions": [1, 2, 4]},
    "no conv_resample": {"conv_resample": False},
    "no conv_resample, uneven": {"conv_resample": False, "num_res_blocks": [1, 3, 2]},
    "resblock_updown": {"resblock_updown": True},
    "resblock_updown, film": {"resblock_updown": True, "use_scale_shift_norm": True},
    "uneven": {"num_res_blocks": [1, 3, 2]},
    "one block": {"num_res_blocks": 1},
    "classes": {"num_classes": 11},
    "vectors": {"adm_in_channels": 6},
    "numbers": {"adm_in_channels": 1, "adm_layers": 1},
    "fractional widths": {"channel_mult": [0.5, 1, 1.5], "model_channels": 64},
    "transformer": {**_TRANSFORMER, "attention_resolutions": [1, 4]},
    "deep transformer": {**_TRANSFORMER, "transformer_depth": 3},
    "linear transformer": {**_TRANSFORMER, "use_linear_in_transformer": True},
    "transformer in the middle only": {**_TRANSFORMER, "attention_resolutions": []},
    "contexts by block": {**_TRANSFORMER, "transformer_depth": 2, "context_dim": [7, 9]},
    "attention in some blocks": {"attention_resolutions": [1, 2], "num_attention_blocks": [1, 2, 0]},
    "no self-attention at one level": {
        **_TRANSFORMER,
        "attention_resolutions": [1, 2],
        "disable_self_attentions": [True, False, False],
    },
    "no self-attention in the middle": {**_TRANSFORMER, "disable_middle_self_attn": True},
}


def _same_network(arguments: dict[str, Any], inferred: dict[str, Any]) -> None:
    """The inferred arguments give the same weights, and nothing but heads is missing."""
    with torch.device("meta"):
        wanted = shapes_of(LDMUNet(**arguments).state_dict())
        found = shapes_of(LDMUNet(**{**inferred, "num_heads": 1}).state_dict())
    assert found == wanted
    stated = {k: v for k, v in arguments.items() if k not in _HEADS}
    # Factors at which there is no level are of no effect.
    reachable = [2**i for i in range(len(arguments["channel_mult"]))]
    stated["attention_resolutions"] = sorted(set(stated["attention_resolutions"]) & set(reachable))
    assert {k: inferred.get(k) for k in stated} == stated


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    arguments = {**_SMALL, **VARIANTS[variant]}
    shapes = shapes_of(on_meta({"kind": "ldm_unet", "args": arguments}).state_dict())
    _same_network(arguments, infer_unet(shapes))


@pytest.mark.parametrize("name", [*LDM_UNETS, *OPENAI_UNETS])
def test_published_networks(name: str) -> None:
    architecture, _ = {**LDM_UNETS, **OPENAI_UNETS}[name]
    _same_network(architecture["args"], infer_unet(shapes_of(on_meta(architecture).state_dict())))


@pytest.mark.parametrize("name", LDM_UNETS)
def test_heads_of_published_networks_are_known(name: str) -> None:
    architecture, _ = LDM_UNETS[name]
    inferred = infer_unet(shapes_of(on_meta(architecture).state_dict()))
    assert known_network(inferred) is not None
    heads, reason = assume_heads(inferred, has_classes=False)
    assert heads.items() <= architecture["args"].items()
    assert "recognised" in reason


@pytest.mark.parametrize(
    ("variant", "has_classes", "heads"),
    [
        ("plain", False, {"num_head_channels": 32}),
        ("resblock_updown, film", False, {"num_heads": 8}),
        ("transformer", True, {"num_heads": 1}),
        ("transformer", False, {"num_heads": 8}),
    ],
)
def test_heads_of_other_networks_are_assumed_aloud(
    variant: str, has_classes: bool, heads: dict[str, int]
) -> None:
    arguments = {**_SMALL, **VARIANTS[variant]}
    inferred = infer_unet(shapes_of(on_meta({"kind": "ldm_unet", "args": arguments}).state_dict()))
    found, reason = assume_heads(inferred, has_classes)
    assert found == heads
    assert "assumed" in reason
    assert all(width % next(iter(found.values())) == 0 for width in attention_widths(inferred))


def test_assumed_heads_divide_the_widths() -> None:
    unet = {**_SMALL, "use_scale_shift_norm": False, "resblock_updown": False}
    unet |= {"model_channels": 36, "channel_mult": [1, 1], "attention_resolutions": [1]}
    assert assume_heads(unet, has_classes=False)[0] == {"num_heads": 1}
    unet["model_channels"] = 40
    assert assume_heads(unet, has_classes=False)[0] == {"num_heads": 8}


@pytest.mark.parametrize(
    "gone", ["time_embed.0", "input_blocks.0", "output_blocks", "output_blocks.2", "middle_block", "out.2"]
)
def test_incomplete_weights(gone: str) -> None:
    shapes = shapes_of(on_meta({"kind": "ldm_unet", "args": _SMALL}).state_dict())
    with pytest.raises(BidmError, match="`config`"):
        infer_unet({name: shape for name, shape in shapes.items() if not name.startswith(f"{gone}.")})


@pytest.mark.parametrize("shape", [(), (0,), (0, 0), (5,)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    shapes = shapes_of(on_meta({"kind": "ldm_unet", "args": _SMALL}).state_dict())
    with pytest.raises(BidmError, match="`config`"):
        infer_unet({**shapes, "time_embed.0.weight": shape})

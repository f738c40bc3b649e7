from __future__ import annotations

from typing import Any

import pytest

from bidm_cli.checkpoints.first_stages.compvis import (
    first_stage_from_config,
    infer_first_stage,
    one_line,
    reduction,
)
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.checkpoints.reading.state import on_meta, shapes_of
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import KL
from tests.networks.published import FIRST_STAGES

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention at a level": {"attention_levels": [0]},
    "no attention": {"mid_attention": False},
    "no convs between levels": {"resamp_with_conv": False},
    "widths": {"ch_mult": [1, 2, 4], "num_res_blocks": 2},
    "one level": {"ch_mult": [2]},
    "other latent width": {"z_channels": 8, "embed_dim": 3},
    "other images": {"in_channels": 1, "out_channels": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["kl_first_stage", "vq_first_stage"])
def test_inferred_as_built(variant: str, kind: str) -> None:
    arguments = {**KL, **VARIANTS[variant], **({"n_embed": 9} if kind == "vq_first_stage" else {})}
    found = infer_first_stage(shapes_of(on_meta({"kind": kind, "args": arguments}).state_dict()))
    assert found["kind"] == kind
    assert arguments.items() <= found["args"].items()
    assert found["args"]["double_z"] == (kind == "kl_first_stage")


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_published(name: str) -> None:
    architecture, _ = FIRST_STAGES[name]
    found = infer_first_stage(shapes_of(on_meta(architecture).state_dict()))
    assert architecture["args"].items() <= found["args"].items()
    assert one_line(found).startswith(name)
    assert reduction(found) == int(name[-1])


def test_incomplete() -> None:
    shapes = shapes_of(on_meta({"kind": "kl_first_stage", "args": KL}).state_dict())
    del shapes["post_quant_conv.weight"]
    with pytest.raises(BidmError, match="post_quant_conv"):
        infer_first_stage(shapes)


def _config(target: str, **ddconfig: Any) -> Section:
    shape = {"z_channels": 4, "resolution": 256, "ch": 128, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 2}
    params = {"embed_dim": 4, "n_embed": 16384, "ddconfig": {**shape, "attn_resolutions": [32], **ddconfig}}
    return Section({"target": target, "params": params}, "c.yaml")


def test_attention_resolutions_become_levels() -> None:
    found = first_stage_from_config(_config("ldm.models.autoencoder.VQModelInterface"))
    assert found is not None
    assert found["kind"] == "vq_first_stage"
    assert found["args"] == {**found["args"], **FIRST_STAGES["VQ-f8"][0]["args"]}


@pytest.mark.parametrize(
    ("kind", "levels", "middle"),
    [("vanilla", [3], True), ("vanilla-xformers", [3], True), ("none", [], False)],
)
def test_attention_types(kind: str, levels: list[int], middle: bool) -> None:
    found = first_stage_from_config(_config("x", attn_type=kind))
    assert found is not None
    assert (found["args"]["attention_levels"], found["args"]["mid_attention"]) == (levels, middle)


def test_identity_and_unsupported() -> None:
    with pytest.raises(BidmError, match="linear"):
        first_stage_from_config(_config("x", use_linear_attn=True))
    assert first_stage_from_config(_config("ldm.models.autoencoder.IdentityFirstStage")) is None
    with pytest.raises(BidmError, match="linear"):
        first_stage_from_config(_config("x", attn_type="linear"))
    with pytest.raises(BidmError, match="ch must be"):
        first_stage_from_config(_config("x", ch="wide"))

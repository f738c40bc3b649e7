from __future__ import annotations

from typing import Any

import pytest
import torch

from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build
from tests.networks.published import ALL


def test_builds_in_eval_mode() -> None:
    network = build({"kind": "class_embedder", "args": {"n_classes": 3, "embed_dim": 4}})
    assert not network.training


def test_unknown_kind() -> None:
    with pytest.raises(BidmError, match="vae9000"):
        build({"kind": "vae9000", "args": {}})


@pytest.mark.parametrize(
    "change",
    [
        {"num_res_blocks": 10**9},
        {"num_res_blocks": 0},
        {"model_channels": 1 << 40},
        {"model_channels": -32},
        {"model_channels": float("nan")},
        {"model_channels": "wide"},
        {"model_channels": 33},
        {"channel_mult": [1] * 1000},
        {"channel_mult": []},
        {"transformer_depth": 10**6},
        {"no_such_argument": 1},
    ],
)
def test_arguments_out_of_range_are_refused_at_once(change: dict[str, Any]) -> None:
    architecture, _ = ALL["improved cifar10"]
    with pytest.raises(BidmError, match="cannot build network 'ldm_unet'"), torch.device("meta"):
        build({"kind": "ldm_unet", "args": {**architecture["args"], **change}})


def test_missing_arguments() -> None:
    with pytest.raises(BidmError, match="cannot build"):
        build({"kind": "ldm_unet", "args": {}})

"""Packed files of networks that see rescaled timesteps, and of those written before there were any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.recipe import Recipe


@pytest.mark.parametrize("time_scale", [0.25, 1.0, None])
def test_the_packed_network_sees_the_same_times(
    student: Callable[..., DiffusionModel], tmp_path: Path, time_scale: float | None
) -> None:
    model = student()
    model.time_scale = time_scale or 1.0
    metadata, tensors = pack_model(model, Recipe.load("bidm").to_json())
    if time_scale is None:
        del metadata["time_scale"]
    write_packed(tmp_path / "m.bidm", metadata, tensors)
    opened = load_packed(tmp_path / "m.bidm", backend="torch")
    assert opened.time_scale == model.time_scale
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([4, 900])
    with torch.no_grad():
        seen = opened.unet(x, t * (time_scale or 1.0))
        assert torch.equal(opened.denoise(x, t), seen)
        assert (time_scale == 0.25) != torch.equal(seen, opened.unet(x, t))

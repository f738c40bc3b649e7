"""Packed diffusers models as the network of diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bidm_cli.binary.surgery import binarize
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.errors import BidmError
from bidm_cli.packed.diffusers import DiffusersUNetAdapter
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.model import PackedModel
from bidm_cli.recipe import Recipe
from bidm_cli.sampling.sample import sample
from tests.checkpoints.test_diffusers_reference import REFERENCE, component, write
from tests.packed.conftest import randomize

NETWORKS = {entry["name"]: entry["config"] for entry in REFERENCE["networks"]}
UNET = next(entry for entry in REFERENCE["sampling"] if entry["name"] == "clip range")["unet"]
CARRIED, WITHOUT = "bidm", "xnor"
"""Recipes with cross-timestep connections, and without."""
DDIM = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "num_train_timesteps": 1000,
        "clip_sample": True, "set_alpha_to_one": True, "steps_offset": 0,
        "timestep_spacing": "leading"}  # fmt: skip


def original(folder: Path, config: dict[str, Any] | None = None) -> Path:
    component(folder / "original" / "unet", config or {"_class_name": "UNet2DModel", **UNET})
    write(folder / "original" / "scheduler", DDIM, "scheduler_config.json")
    return folder / "original"


def packed(folder: Path, recipe: str = CARRIED, config: dict[str, Any] | None = None) -> PackedModel:
    model = load_checkpoint(original(folder, config))
    resolved = Recipe.load(recipe)
    binarize(model.unet, resolved, model.schedule.timesteps)
    randomize(model.unet)
    write_packed(folder / "m.bidm", *pack_model(model, resolved.to_json()))
    return load_packed(folder / "m.bidm", backend="torch")


@pytest.mark.parametrize("connections", ["carried", "off"])
def test_a_pipeline_draws_what_bidm_draws(tmp_path: Path, connections: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = packed(tmp_path, CARRIED if connections == "carried" else WITHOUT)
    pipeline = diffusers.DDIMPipeline(
        unet=model.as_diffusers(connections), scheduler=diffusers.DDIMScheduler.from_config(DDIM)
    )
    pipeline.set_progress_bar_config(disable=True)
    shape = (2, *model.sample_shape)
    for seed in (0, 1):  # the second begins anew, without features of the first
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        drawn = pipeline(
            2, torch.Generator().manual_seed(seed), num_inference_steps=5, output_type="np"
        ).images
        expected = sample(model, x_t=noise, steps=5, sampler="ddim")
        np.testing.assert_allclose(drawn * 2 - 1, expected.permute(0, 2, 3, 1).clamp(-1, 1), atol=2e-4)


def test_connections_off_are_first_steps_over_and_over(tmp_path: Path) -> None:
    model = packed(tmp_path)
    x, times = torch.randn(1, *model.sample_shape), (700, 500)
    off, carried = model.as_diffusers("off"), model.as_diffusers()
    first, second = (model.denoise(x, torch.tensor([t])) for t in times)
    assert torch.equal(off(x, 700).sample, first) and torch.equal(off(x, 500).sample, second)
    assert torch.equal(carried(x, torch.tensor(700)).sample, first)
    assert not torch.equal(carried(x, 500).sample, second)
    assert torch.equal(carried(x, 700, return_dict=False)[0], first), "a larger timestep is a new sampling"
    carried.reset()
    assert torch.equal(carried(x, 500).sample, second)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_original_inside_equals_diffusers_own_network(tmp_path: Path, name: str) -> None:
    """The adapter on float weights against the network class that the config names."""
    diffusers = pytest.importorskip("diffusers")
    folder = original(tmp_path, NETWORKS[name])
    own = getattr(diffusers, NETWORKS[name]["_class_name"]).from_pretrained(folder / "unet")
    model = load_checkpoint(folder)
    ours = DiffusersUNetAdapter(model)
    x = torch.randn(2, own.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = None if model.num_classes is None else torch.tensor([1, 0])
    width = model.context_width
    context = None if width is None else torch.randn(2, 5, width)
    with_context = "Condition" in NETWORKS[name]["_class_name"]
    named = {"class_labels": labels} | ({"encoder_hidden_states": context} if with_context else {})
    with torch.no_grad():
        expected = own(x, 17, **named).sample
        torch.testing.assert_close(ours(x, 17, **named).sample, expected, rtol=1e-3, atol=1e-4)
        third = (context, labels) if with_context else (labels,)
        (found,) = ours(x, torch.tensor([17, 17]), *third, return_dict=False)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (ours.config.in_channels, ours.config.out_channels) == (own.config.in_channels, expected.shape[1])


def test_a_text_pipelines_questions_are_answered(tmp_path: Path) -> None:
    model = packed(tmp_path, WITHOUT, NETWORKS["stable diffusion 1"])
    unet = model.as_diffusers()
    assert unet.config.sample_size and unet.config["in_channels"] == model.sample_shape[0]
    assert unet.config.time_cond_proj_dim is None and unet.dtype == torch.float32
    assert unet.to(torch.float32) is unet and unet.to("cpu") is unet
    with pytest.raises(BidmError, match="float32"):
        unet.to(torch.float16)
    x, context = torch.randn(1, *model.sample_shape), torch.randn(1, 5, 12)
    with pytest.raises(BidmError, match="down_block_additional_residuals"):
        unet(x, 3, encoder_hidden_states=context, down_block_additional_residuals=(x,))
    with pytest.raises(BidmError, match="`connections` is 'on'"):
        model.as_diffusers("on")  # type: ignore[arg-type]


def test_other_families_are_refused(tmp_path: Path) -> None:
    model = packed(tmp_path)
    model.family = "ldm"
    with pytest.raises(BidmError, match="is ldm"):
        model.as_diffusers()

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bidm_cli.binary.surgery import binarize
from bidm_cli.checkpoints.export import export_checkpoint
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.unpack import float_weights
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.model import PackedModel
from bidm_cli.recipe import Recipe
from tests.packed.conftest import small_student

CHECKPOINTS = Path(__file__).parents[3] / "shared" / "checkpoints"


def packed(model: DiffusionModel, folder: Path) -> PackedModel:
    recipe = Recipe.load("w1a1").override("first_stage", keep="both")
    write_packed(folder / "m.bidm", *pack_model(model, recipe.to_json()))
    return load_packed(folder / "m.bidm", backend="torch")


def test_packed_layers_become_scaled_signs(tmp_path: Path) -> None:
    model = small_student()
    weights = float_weights(packed(model, tmp_path))
    latent = model.unet.get_submodule("mid.block_1.conv1").weight.detach()
    found = weights["mid.block_1.conv1.weight"]
    alpha = latent.abs().mean((1, 2, 3), keepdim=True).half().float()
    assert torch.equal(found, torch.where(latent >= 0, alpha, -alpha))
    stem = model.unet.get_submodule("conv_in").weight.detach()
    assert torch.equal(weights["conv_in.weight"], stem.half().float())


@pytest.mark.parametrize("variance", ["ddim_noisy", "small", "large"])
def test_a_ddpm_comes_back_through_load_checkpoint(variance: str, tmp_path: Path) -> None:
    model = small_student()
    model.convention = SamplingConvention(variance=variance, clip_ancestral=True)
    model.schedule = NoiseSchedule.linear(500, 2e-4, 0.03)
    opened = packed(model, tmp_path)
    export_checkpoint(opened, tmp_path / "out" / "float.pth")
    back = load_checkpoint(tmp_path / "out" / "float.pth")
    _same(back, opened)


@pytest.mark.parametrize("name", ["ldm_unconditional_vq4", "ldm_class_conditional"])
def test_a_latent_model_comes_back_through_load_checkpoint(name: str, tmp_path: Path) -> None:
    if not CHECKPOINTS.is_dir():
        pytest.skip("needs ../shared/checkpoints")
    model = load_checkpoint(CHECKPOINTS / name / "model.ckpt")
    binarize(model.unet, Recipe.load("w1a1"), timesteps=1000)
    opened = packed(model, tmp_path)
    config = export_checkpoint(opened, tmp_path / "float.ckpt")
    assert config == tmp_path / "float.yaml"
    back = load_checkpoint(tmp_path / "float.ckpt")
    _same(back, opened)
    z = torch.randn(1, *opened.sample_shape)
    assert torch.equal(back.decode(z), opened.decode(z))


def _same(back: DiffusionModel, opened: PackedModel) -> None:
    found_about, about = back.metadata(), opened.metadata()
    found_arguments = found_about.pop("architecture")["unet"]["args"]
    arguments = about.pop("architecture")["unet"]["args"]
    assert found_about == about
    # An original configuration spells out more defaults than ours need.
    assert found_arguments | arguments == found_arguments
    expected = float_weights(opened)
    found = back.unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_a_configuration_cannot_say_is_one_clear_error(tmp_path: Path) -> None:
    model = small_student()
    model.schedule = NoiseSchedule.cosine(100)
    with pytest.raises(BidmError, match="cosine"):
        export_checkpoint(packed(model, tmp_path), tmp_path / "a.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["m.bidm"]
    model.family = "edm"
    with pytest.raises(BidmError, match="'edm'"):
        export_checkpoint(packed(model, tmp_path), tmp_path / "a.pth")


def test_the_command_says_what_is_left_out(tmp_path: Path) -> None:
    from bidm_cli.cli.export import command

    packed(small_student(), tmp_path)
    result = CliRunner().invoke(command, [str(tmp_path / "m.bidm"), "-o", str(tmp_path / "f.pth")])
    assert result.exit_code == 0, result.output
    assert ("shortcuts" in result.output and "f.yml" in result.output) or "f.json" in result.output
    assert (tmp_path / "f.pth").is_file()

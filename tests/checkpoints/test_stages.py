"""First stages in files of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file

from bidm_cli.binary.surgery import binarize
from bidm_cli.checkpoints.evidence import assumed, caveats
from bidm_cli.checkpoints.first_stages.file import join_first_stage, load_first_stage
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.recipe import Recipe
from tests.checkpoints.conftest import KL, LDM_CONFIG, LDM_UNET, ldm_state, weights
from tests.checkpoints.test_wrappers import DIT


def _compvis(folder: Path, name: str = "vae.ckpt", **more: Any) -> Path:
    """A Lightning file of CompVis' autoencoder, with the leftovers of its training."""
    kind = "vq_first_stage" if "n_embed" in more else "kl_first_stage"
    state = weights(kind, {**KL, **more}, seed=3) | {"loss.logvar": torch.zeros(())}
    torch.save({"state_dict": state, "epoch": 3}, folder / name)
    return folder / name


def _diffusers(folder: Path, **more: Any) -> Path:
    from bidm_cli.checkpoints.families.diffusers.config import first_stage_from_config
    from bidm_cli.checkpoints.reading.config import Section

    config = {"_class_name": "AutoencoderKL", "block_out_channels": [32, 32], "latent_channels": 4, **more}
    config |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    architecture, _, _ = first_stage_from_config(Section(config, "test"))
    state = weights(architecture["kind"], architecture["args"], seed=4)
    save_file(state, str(folder / "diffusion_pytorch_model.safetensors"))
    return folder


def _dit(folder: Path) -> Path:
    torch.save(weights("dit", DIT), folder / "dit.pt")
    return folder / "dit.pt"


@pytest.mark.parametrize("more", [{}, {"n_embed": 16}])
def test_a_compvis_file_is_named_and_joined(tmp_path: Path, more: dict[str, Any]) -> None:
    path = _compvis(tmp_path, **more)
    with pytest.raises(BidmError, match=r"\(autoencoder\) alone.*`first_stage`"):
        load_checkpoint(path)
    stage = load_first_stage(path)
    assert (stage.channels, stage.reduction, stage.scale) == (4, 2, None)
    assert ("VQ-f2" if more else "KL-f2") in stage.to_text()
    checkpoint = load_checkpoint(_dit(tmp_path), first_stage=path)
    assert checkpoint.scale_factor == 0.18215
    z = torch.randn(1, *checkpoint.sample_shape)
    with torch.no_grad():
        assert torch.equal(checkpoint.decode(z), stage.network.decode(z / 0.18215))  # type: ignore[operator]
    assert checkpoint.decode(z).shape == (1, 3, 16, 16)
    said = "\n".join(checkpoint.evidence)
    assert "first stage: joined" in said and "first stage: none" not in said and "scale_factor" in said


@pytest.mark.parametrize("inside", ["", "diffusion_pytorch_model.safetensors"])
def test_a_diffusers_one_brings_its_scale(tmp_path: Path, inside: str) -> None:
    folder = _diffusers(tmp_path / "vae", scaling_factor=0.5)
    with pytest.raises(BidmError, match=r"first stage \(autoencoder\) alone"):
        load_checkpoint(folder / inside)
    checkpoint = load_checkpoint(_dit(tmp_path), first_stage=folder / inside)
    assert checkpoint.scale_factor == 0.5
    assert checkpoint.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 8, 8)
    other = load_checkpoint(_dit(tmp_path), first_stage=folder, settings={"scale_factor": 2})
    assert other.scale_factor == 2.0


def test_a_bare_unet_with_a_first_stage_is_ldms(tmp_path: Path) -> None:
    torch.save(weights("ldm_unet", LDM_UNET), tmp_path / "unet.pt")
    assert load_checkpoint(tmp_path / "unet.pt").family == "openai"
    checkpoint = load_checkpoint(tmp_path / "unet.pt", first_stage=_compvis(tmp_path))
    assert checkpoint.family == "ldm" and checkpoint.convention.clip == "none"


def test_out_of_a_whole_checkpoint(tmp_path: Path) -> None:
    torch.save({"state_dict": ldm_state()}, tmp_path / "whole.ckpt")
    stage = load_first_stage(tmp_path / "whole.ckpt")
    original = load_checkpoint(tmp_path / "whole.ckpt")
    stage.evidence.append(assumed("as all (assumed)"))
    joined = join_first_stage(load_checkpoint(_dit(tmp_path)), stage)
    assert "as all (assumed)" in caveats(joined.evidence)
    z = torch.randn(1, 4, 4, 4)
    assert torch.allclose(joined.decode(z * 0.18215), original.decode(z), atol=1e-5)


def test_its_own_configuration_counts(tmp_path: Path) -> None:
    first = LDM_CONFIG["model"]["params"]["first_stage_config"]
    path = _compvis(tmp_path)
    shape = {**first["params"]["ddconfig"], "tanh_out": True}
    values = {"model": {**first, "params": {**first["params"], "ddconfig": shape}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    stage = load_first_stage(path)
    assert stage.architecture["args"]["tanh_out"] is True
    assert "config.yaml" in "".join(stage.evidence)


def test_what_does_not_belong_is_refused(tmp_path: Path) -> None:
    dit = _dit(tmp_path)
    with pytest.raises(BidmError, match="3 channels, the model gives 4"):
        load_checkpoint(dit, first_stage=_compvis(tmp_path, embed_dim=3))
    with pytest.raises(BidmError, match="no first stage"):
        load_checkpoint(dit, first_stage=dit)
    with pytest.raises(BidmError, match="no such file"):
        load_checkpoint(dit, first_stage=tmp_path / "missing.ckpt")
    with pytest.raises(BidmError, match="has no first stage"):
        load_checkpoint(dit, first_stage=tmp_path)
    torch.save({"state_dict": ldm_state(first_stage=None)}, tmp_path / "bare.ckpt")
    with pytest.raises(BidmError, match="without a first stage"):
        load_first_stage(tmp_path / "bare.ckpt")


def test_a_weights_file_without_its_configuration(tmp_path: Path) -> None:
    folder = _diffusers(tmp_path / "vae")
    alone = tmp_path / "alone.safetensors"
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", alone)
    with pytest.raises(BidmError, match=r"first stage \(autoencoder\) alone"):
        load_checkpoint(alone)
    with pytest.raises(BidmError, match=r"put its config\.json beside it"):
        load_first_stage(alone)


def test_it_goes_into_the_packed_file(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(_dit(tmp_path), first_stage=_compvis(tmp_path))
    binarize(checkpoint.unet, Recipe.load("w1a1"), timesteps=1000)
    write_packed(tmp_path / "m.bidm", *pack_model(checkpoint, Recipe.load("w1a1").to_json()))
    packed = load_packed(tmp_path / "m.bidm", backend="torch")
    z = torch.randn(1, 4, 8, 8)
    assert packed.scale_factor == 0.18215
    assert torch.allclose(packed.decode(z), checkpoint.decode(z), atol=0.02)


def test_inspect_names_it(tmp_path: Path, original: Callable[[str], Path]) -> None:
    from bidm_cli.cli.inspect import command

    path = tmp_path / "vqvae"
    shutil.copytree(original("diffusers_ldm_vq") / "vqvae", path)
    result = CliRunner().invoke(command, [str(path), "--json", str(tmp_path / "x.json")])
    assert result.exit_code == 0, result.output
    assert "first stage (autoencoder) alone, VQ-f4" in result.output
    assert json.loads((tmp_path / "x.json").read_text())["scale_factor"] == 1.0


def test_sample_decodes_with_it(tmp_path: Path) -> None:
    from bidm_cli.cli.sample import command

    arguments = [
        str(_dit(tmp_path)),
        "-n",
        "1",
        "--steps",
        "2",
        "--label",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    arguments += ["--first-stage", str(_compvis(tmp_path)), "--device", "cpu"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "grid.png").is_file()

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bidm_cli.checkpoints.families.openai.config import schedule_of
from bidm_cli.checkpoints.families.openai.infer import infer_unet
from bidm_cli.checkpoints.families.published import assume
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.checkpoints.reading.state import on_meta, shapes_of
from bidm_cli.checkpoints.reading.unpickle import read_file
from bidm_cli.errors import BidmError
from bidm_cli.sampling.sample import sample
from tests.checkpoints.conftest import assert_close, ldm_config, weights
from tests.networks.published import OPENAI_UNETS

UNET: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 6,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "num_heads": 4,
    "use_scale_shift_norm": True,
}
DIFFUSION = {"steps": 400, "noise_schedule": "cosine", "learn_sigma": True, "rescale_timesteps": True}


def _state(**more: Any) -> dict[str, torch.Tensor]:
    return weights("ldm_unet", {**UNET, **more})


def _save(tmp_path: Path, state: Any, name: str = "model000010.pt") -> Path:
    torch.save(state, tmp_path / name)
    return tmp_path / name


def _json(tmp_path: Path, values: dict[str, Any]) -> Path:
    (tmp_path / "given.json").write_text(json.dumps(values))
    return tmp_path / "given.json"


def _notes(checkpoint: Any) -> str:
    return "\n".join(checkpoint.evidence)


def test_original_agrees_with_the_original_code(original: Callable[[str], Path]) -> None:
    folder = original("guided_diffusion")
    ref = {name: torch.from_numpy(value) for name, value in np.load(folder / "ref.npz").items()}
    checkpoint = load_checkpoint(folder / "ema_0.9999_000010.pt")
    assert (checkpoint.family, checkpoint.ema, checkpoint.sample_shape) == ("openai", True, (3, 16, 16))
    assert (checkpoint.num_classes, checkpoint.null_label, checkpoint.conditioner) == (10, None, None)
    with torch.no_grad():
        out = checkpoint.denoise(ref["x"], ref["t"], None, ref["y"])
    assert_close(out, ref["out"].numpy())
    drawn = sample(checkpoint, steps=5, x_t=ref["xT"], labels=ref["y"])
    assert_close(drawn, ref["ddim5_out"].numpy())
    noises = list(ref["ancestral5_noises"])
    drawn = sample(checkpoint, steps=5, sampler="ddpm", x_t=ref["xT"], labels=ref["y"], noises=noises)
    assert_close(drawn, ref["ancestral5_out"].numpy())


def test_safetensors_with_a_configuration_given(original: Callable[[str], Path], tmp_path: Path) -> None:
    folder = original("guided_diffusion")
    save_file(read_file(folder / "ema_0.9999_000010.pt"), str(tmp_path / "m.safetensors"))
    ref = dict(np.load(folder / "ref.npz"))
    checkpoint = load_checkpoint(tmp_path / "m.safetensors", config=folder / "hparams.json")
    with torch.no_grad():
        inputs = [torch.from_numpy(ref[name]) for name in ("x", "t", "y")]
        assert_close(checkpoint.denoise(inputs[0], inputs[1], None, inputs[2]), ref["out"])
    assert not checkpoint.ema


@pytest.mark.parametrize("name", OPENAI_UNETS)
def test_published_networks_are_recognised(name: str) -> None:
    architecture, _ = OPENAI_UNETS[name]
    arguments = infer_unet(shapes_of(on_meta(architecture).state_dict()))
    assumed = assume(arguments)
    assert "recognised by its shapes" in assumed.reason
    heads = {key: architecture["args"][key] for key in assumed.heads}
    assert assumed.heads == heads
    assert assumed.new_order == architecture["args"].get("use_new_attention_order", False)
    size = 32 if "cifar" in name else 64 if "64" in name else 128 if "128" in name else 256
    assert assumed.image_size == (512 if "512" in name else size)
    cosine = name == "guided 64" or (name.startswith("improved") and "lsun" not in name)
    assert assumed.schedule == ("cosine" if cosine else "linear")
    assert assumed.timesteps == (4000 if cosine and name != "guided 64" else 1000)
    assert assumed.rescale == (name in ("improved imagenet64", "improved cifar10"))


def test_assumptions_are_said_aloud(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(_save(tmp_path, _state()))
    assert checkpoint.sample_shape == (3, 16, 16)
    assert checkpoint.architecture["unet"]["args"]["num_heads"] == 4
    assert sum("override with `config`" in note for note in checkpoint.evidence) == 5
    assert checkpoint.convention.variance == "learned_range"
    updown = load_checkpoint(_save(tmp_path, _state(resblock_updown=True, channel_mult=[2, 4])))
    assert updown.architecture["unet"]["args"]["num_head_channels"] == 64


@pytest.mark.parametrize("library", ["guided", "improved", None])
def test_constructor_arguments(tmp_path: Path, library: str | None) -> None:
    values = {"library": library, "unet": {**UNET, "image_size": 16}, "diffusion": DIFFUSION}
    checkpoint = load_checkpoint(_save(tmp_path, _state()), config=_json(tmp_path, values))
    assert checkpoint.sample_shape == (3, 16, 16)
    assert checkpoint.schedule.description["kind"] == "cosine"
    assert checkpoint.schedule.timesteps == 400
    assert checkpoint.time_scale == 2.5
    assert not any("assumed" in note for note in checkpoint.evidence)
    assert load_architecture(tmp_path / "given.json").time_scale == 2.5


def test_the_network_sees_rescaled_timesteps(tmp_path: Path) -> None:
    config = _json(tmp_path, {"unet": UNET, "diffusion": DIFFUSION})
    checkpoint = load_checkpoint(_save(tmp_path, _state()), config=config)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([4, 399])
    with torch.no_grad():
        assert torch.equal(checkpoint.denoise(x, t), checkpoint.unet(x, torch.tensor([10.0, 997.5])))
    assert checkpoint.metadata()["time_scale"] == 2.5


def test_flags_of_the_scripts(tmp_path: Path) -> None:
    flags = {
        "image_size": 32,
        "num_channels": 32,
        "num_res_blocks": 1,
        "num_heads": 2,
        "attention_resolutions": "16,8",
        "learn_sigma": "true" == "true",
        "class_cond": False,
        "diffusion_steps": 4000,
        "noise_schedule": "linear",
        "use_scale_shift_norm": True,
        "batch_size": 16,
    }
    checkpoint = load_architecture(_json(tmp_path, flags))
    arguments = checkpoint.architecture["unet"]["args"]
    assert arguments["channel_mult"] == [1, 2, 2, 2]
    assert arguments["attention_resolutions"] == [2, 4]
    assert (arguments["num_heads"], arguments["out_channels"]) == (2, 6)
    assert checkpoint.time_scale == 0.25
    assert checkpoint.schedule.description["end"] == pytest.approx(0.005)
    other = load_architecture(_json(tmp_path, {**flags, "channel_mult": "1,2", "rescale_timesteps": False}))
    assert other.architecture["unet"]["args"]["channel_mult"] == [1, 2]
    assert other.time_scale == 1.0


def test_flags_left_out_are_the_scripts_defaults(tmp_path: Path) -> None:
    arguments = load_architecture(_json(tmp_path, {"image_size": 64, "num_channels": 64})).architecture[
        "unet"
    ]
    wanted = {"num_res_blocks": 2, "use_scale_shift_norm": True, "num_heads": 4, "out_channels": 3}
    assert wanted.items() <= arguments["args"].items()


def test_upsamplers(tmp_path: Path) -> None:
    flags = {"large_size": 512, "small_size": 128, "num_channels": 192, "num_head_channels": 64}
    flags |= {
        "attention_resolutions": "32,16",
        "class_cond": True,
        "learn_sigma": True,
        "resblock_updown": True,
    }
    checkpoint = load_architecture(_json(tmp_path, flags))
    arguments = checkpoint.architecture["unet"]["args"]
    assert (arguments["channel_mult"], arguments["attention_resolutions"]) == ([1, 1, 2, 2, 4, 4], [16, 32])
    assert (checkpoint.sample_shape, checkpoint.concat_channels) == ((3, 512, 512), 3)
    found = assume(infer_unet(shapes_of(on_meta(checkpoint.architecture["unet"]).state_dict())))
    assert (found.heads, found.image_size) == ({"num_head_channels": 64}, 512)
    flags |= {"large_size": 256, "attention_resolutions": "32,16,8"}
    network = on_meta(load_architecture(_json(tmp_path, flags)).architecture["unet"])
    found = assume(infer_unet(shapes_of(network.state_dict())))
    assert (found.heads, found.image_size) == ({"num_heads": 4}, 256)


def test_arguments_of_the_network_alone(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(
        _save(tmp_path, _state()), config=_json(tmp_path, {**UNET, "image_size": 24})
    )
    assert (checkpoint.family, checkpoint.sample_shape) == ("openai", (3, 24, 24))


@pytest.mark.parametrize("timesteps", [1000, 4000, 50])
def test_linear_schedule(timesteps: int) -> None:
    betas = np.linspace(0.1 / timesteps, 20 / timesteps, timesteps)
    np.testing.assert_allclose(schedule_of("linear", timesteps).betas.numpy(), betas, rtol=1e-9)


@pytest.mark.parametrize(
    ("more", "shape", "variance"),
    [
        ({"out_channels": 3}, (3, 16, 16), "large"),
        ({"in_channels": 6}, (3, 16, 16), "learned_range"),
        ({"in_channels": 1, "out_channels": 1}, (1, 16, 16), "large"),
        ({"in_channels": 1, "out_channels": 2}, (1, 16, 16), "learned_range"),
    ],
)
def test_channels(tmp_path: Path, more: dict[str, int], shape: tuple[int, ...], variance: str) -> None:
    checkpoint = load_checkpoint(_save(tmp_path, _state(**more)))
    assert checkpoint.sample_shape == shape
    assert checkpoint.convention.variance == variance
    assert ("concatenation" in _notes(checkpoint)) == (more.get("in_channels") == 6)


def test_files_of_a_training_run(tmp_path: Path) -> None:
    raw = _save(tmp_path, _state())
    averaged = _save(tmp_path, _state(), "ema_0.9999_000010.pt")
    assert not load_checkpoint(raw).ema
    assert "ema_0.9999_000010.pt" in _notes(load_checkpoint(raw))
    assert load_checkpoint(averaged).ema
    assert "modelNNNNNN.pt" in _notes(load_checkpoint(averaged, ema=False))
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    with pytest.raises(BidmError, match=r"opt000010\.pt.*optimizer"):
        load_checkpoint(_save(tmp_path, optimizer, "opt000010.pt"))


def test_a_configuration_of_ldm_beside_it(tmp_path: Path) -> None:
    path = _save(tmp_path, weights("ldm_unet", {**UNET, "in_channels": 4, "out_channels": 4}))
    given = ldm_config(
        tmp_path, lambda p: p["unet_config"]["params"].update(UNET, in_channels=4, out_channels=4)
    )
    shutil.move(given, tmp_path / "config.yaml")
    assert load_checkpoint(path).family == "ldm"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unet": {**UNET, "num_heads": 5}}, "5 heads"),
        ({"unet": {**UNET, "channel_mult": []}}, "channel_mult is empty"),
        ({"unet": {**UNET, "num_res_blocks": 10**9}}, "num_res_blocks"),
        ({"unet": {**UNET, "model_channels": "wide"}}, "model_channels must be a number"),
        ({"unet": {**UNET, "strange": 3}}, "strange"),
        ({"unet": {**UNET, "out_channels": 5}}, "5 out|do not fit"),
        ({"diffusion": {"steps": 0, "learn_sigma": True}}, "steps must be"),
        ({"diffusion": {"noise_schedule": "odd", "learn_sigma": True}}, "linear or cosine"),
        ({"image_size": 0}, "image_size must be"),
    ],
)
def test_hostile_configurations(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    values = {"library": "guided", "unet": UNET, "diffusion": DIFFUSION} | change
    path = _save(tmp_path, _state())
    with pytest.raises(BidmError, match=words) as caught:
        load_checkpoint(path, config=_json(tmp_path, values))
    assert "\n" not in str(caught.value)
    with pytest.raises(BidmError):
        load_architecture(tmp_path / "given.json")

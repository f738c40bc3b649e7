"""What a user says of a checkpoint: its family, and settings by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.checkpoints.overrides import parse_settings
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import DDPM_UNET, LDM_UNET, ldm_config, ldm_state, weights
from tests.checkpoints.test_wrappers import DIT


def _file(folder: Path, kind: str, arguments: dict[str, Any]) -> Path:
    torch.save(weights(kind, arguments), folder / "x.pt")
    return folder / "x.pt"


def test_assignments() -> None:
    found = parse_settings(
        ["num_heads=8", "prediction=v", "learn_sigma=True", "image_size=[8, 16]", "a=", "b=null"]
    )
    assert found == {
        "num_heads": 8, "prediction": "v", "learn_sigma": True, "image_size": [8, 16], "a": "", "b": None,
    }  # fmt: skip
    for wrong in ("num_heads", "=3"):
        with pytest.raises(BidmError, match="NAME=VALUE"):
            parse_settings([wrong])


def test_heads_and_their_order(tmp_path: Path) -> None:
    path = _file(tmp_path, "ldm_unet", LDM_UNET)
    plain = load_checkpoint(path)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    outputs = [plain.denoise(x, t)]
    settings: dict[str, Any]
    for settings in ({"num_head_channels": 8}, {"num_heads": 8}, {"use_new_attention_order": True}):
        changed = load_checkpoint(path, settings=settings)
        arguments = changed.architecture["unet"]["args"]
        assert all(arguments[name] == value for name, value in settings.items())
        assert "set by hand" in changed.evidence[-1] and str(next(iter(settings))) in changed.evidence[-1]
        outputs.append(changed.denoise(x, t))
    # 64 channels at the attention: 8 heads of 8 either way; the order matters with more than one head.
    assert torch.equal(outputs[1], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[3])


def test_settings_leave_half_precision_in_the_file(tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in weights("ldm_unet", LDM_UNET).items()}
    torch.save(state, tmp_path / "half.pt")
    changed = load_checkpoint(tmp_path / "half.pt", settings={"num_heads": 8})
    assert {tensor.dtype for tensor in changed.unet.parameters()} == {torch.float16}
    torch.save({name: tensor.float() for name, tensor in state.items()}, tmp_path / "plain.pt")
    plain = load_checkpoint(tmp_path / "plain.pt", settings={"num_heads": 8})
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    assert torch.equal(changed.denoise(x, t), plain.denoise(x, t))


def test_the_models_own_settings(tmp_path: Path) -> None:
    path = _file(tmp_path, "ldm_unet", {**LDM_UNET, "num_classes": 5})
    checkpoint = load_checkpoint(
        path,
        settings={
            "image_size": [8, 16], "prediction": "v_prediction", "beta_schedule": "cosine", "timesteps": 400,
            "rescale_timesteps": True, "null_label": 4, "scale_factor": 0.3, "clip": "none",
            "spacing": "trailing", "steps_offset": 1, "clip_ancestral": False, "learn_sigma": True,
        },
    )  # fmt: skip
    assert checkpoint.sample_shape == (2, 8, 16)
    assert (checkpoint.prediction, checkpoint.null_label, checkpoint.scale_factor) == ("v", 4, 0.3)
    assert checkpoint.schedule.description["kind"] == "cosine" and checkpoint.schedule.timesteps == 400
    assert checkpoint.time_scale == 2.5
    convention = checkpoint.convention
    assert (convention.clip, convention.spacing, convention.steps_offset) == ("none", "trailing", 1)
    assert convention.variance == "learned_range" and not convention.clip_ancestral
    back = load_checkpoint(path, settings={"learn_sigma": False, "null_label": None})
    assert back.sample_shape[0] == 4 and back.null_label is None and back.convention.variance == "large"


def test_part_of_a_schedule(tmp_path: Path) -> None:
    path = _file(tmp_path, "ddpm_unet", DDPM_UNET)
    schedule = load_checkpoint(path, settings={"beta_end": 0.03}).schedule
    assert schedule.description == {"kind": "linear", "timesteps": 1000, "start": 1e-4, "end": 0.03}
    with pytest.raises(BidmError, match=r"runs from 0\.0001 to 2"):
        load_checkpoint(path, settings={"beta_end": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_haeds": 8}, "did you mean num_heads"),
        ({"colour": 1}, "It knows image_size, prediction"),
        ({"num_heads": 7}, "num_heads|heads"),
        ({"model_channels": 64}, "do not fit"),
        ({"prediction": "noise"}, "epsilon, x0 or v"),
        ({"clip": "hard"}, "keep_eps"),
        ({"image_size": 0}, "image_size"),
        ({"scale_factor": "x"}, "scale_factor"),
        ({"null_label": 3}, "null_label"),
        ({"beta_schedule": "quadratic"}, "cosine"),
        ({"steps_offset": "a"}, "steps_offset"),
    ],
)
def test_nonsense_is_one_clear_error(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BidmError, match=message) as raised:
        load_checkpoint(_file(tmp_path, "ldm_unet", LDM_UNET), settings=settings)
    assert "\n" not in str(raised.value)


def test_what_a_transformer_cannot_do_without(tmp_path: Path) -> None:
    path = _file(tmp_path, "dit", {**DIT, "hidden_size": 48, "num_heads": 4, "mlp_width": 96})
    with pytest.raises(BidmError, match="`settings` num_heads"):
        load_checkpoint(path)
    checkpoint = load_checkpoint(path, settings={"num_heads": 4})
    assert checkpoint.architecture["unet"]["args"]["num_heads"] == 4


def test_a_bare_configuration(tmp_path: Path) -> None:
    checkpoint = load_architecture(ldm_config(tmp_path), settings={"num_heads": 4, "image_size": 32})
    assert checkpoint.sample_shape == (4, 32, 32) and not checkpoint.has_weights
    assert checkpoint.architecture["unet"]["args"]["num_head_channels"] == -1


def test_a_family_by_force(tmp_path: Path) -> None:
    path = _file(tmp_path, "ldm_unet", LDM_UNET)
    forced = load_checkpoint(path, family="ldm")
    assert forced.family == "ldm" and "`family`" in forced.evidence[0]
    torch.save({"state_dict": ldm_state()}, path)
    with pytest.raises(BidmError, match="family 'nothing'; bidm knows ldm"):
        load_checkpoint(path, family="nothing")
    with pytest.raises(BidmError, match=r"architecture|do not fit"):
        load_checkpoint(path, family="w86763777")
    with pytest.raises(BidmError, match="only diffusers"):
        load_checkpoint(tmp_path, family="ldm")


def test_an_unknown_file_names_the_way_out(tmp_path: Path) -> None:
    torch.save({"net": {"input_blocks.0.0.weight": torch.zeros(2)}, "step": 3}, tmp_path / "x.pt")
    with pytest.raises(BidmError, match=r"top-level keys net, step.*nearest is openai.*`family` NAME"):
        load_checkpoint(tmp_path / "x.pt")


def test_the_commands_take_them(tmp_path: Path) -> None:
    from bidm_cli.cli.inspect import command

    path = _file(tmp_path, "ldm_unet", LDM_UNET)
    options = ["--family", "ldm", "--set", "num_heads=2", "--set", "image_size=16"]
    result = CliRunner().invoke(command, [str(path), *options])
    assert result.exit_code == 0, result.output
    assert "family ldm" in result.output and "num_heads = 2" in result.output and "16" in result.output


@pytest.mark.parametrize("kind", ["ldm_unet", "ddpm_unet", "dit"])
def test_every_assumption_says_how_to_override_it(tmp_path: Path, kind: str) -> None:
    arguments = {"ldm_unet": LDM_UNET, "ddpm_unet": DDPM_UNET, "dit": DIT}[kind]
    checkpoint = load_checkpoint(_file(tmp_path, kind, arguments))
    assumed = [note for note in checkpoint.evidence if "assumed" in note]
    assert assumed
    assert all("`settings`" in note for note in assumed), assumed

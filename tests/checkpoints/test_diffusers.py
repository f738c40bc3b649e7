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
from torch import Tensor

from bidm_cli.checkpoints.evidence import caveats
from bidm_cli.checkpoints.families.diffusers.config import first_stage_from_config, unet_from_config
from bidm_cli.checkpoints.families.diffusers.scheduler import read_scheduler
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.errors import BidmError
from bidm_cli.sampling.sample import sample
from bidm_cli.sampling.timesteps import sampling_steps
from tests.checkpoints.conftest import assert_close, evaluate, weights

UNET: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
KL: dict[str, Any] = {"_class_name": "AutoencoderKL", "block_out_channels": [32], "latent_channels": 3}
SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "clip_sample": False}


def _unet_state(seed: int = 0, **more: Any) -> dict[str, Tensor]:
    architecture = unet_from_config(Section({**UNET, **more}, "test"))
    return weights(architecture["kind"], architecture["args"], seed)


def _write(folder: Path, name: str, values: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))


def _folder(tmp_path: Path, first_stage: bool = False, **more: Any) -> Path:
    """A nested folder with the weights in unet/."""
    root = tmp_path / "model"
    _write(root, "model_index.json", {"_class_name": "DDPMPipeline"})
    _write(root / "unet", "config.json", {**UNET, **more})
    _write(root / "scheduler", "scheduler_config.json", SCHEDULER)
    save_file(_unet_state(**more), str(root / "unet" / "diffusion_pytorch_model.safetensors"))
    if first_stage:
        _write(root / "vae", "config.json", KL)
        architecture, _, _ = first_stage_from_config(Section(KL, "test"))
        state = weights(architecture["kind"], architecture["args"])
        save_file(state, str(root / "vae" / "diffusion_pytorch_model.safetensors"))
    return root


def _is(checkpoint: Any, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(checkpoint.unet.get_parameter(name), value) for name, value in state.items())


def _shards(folder: Path, state: dict[str, Tensor], variant: str = "") -> None:
    names = [f"diffusion_pytorch_model-0000{i}-of-00002{variant}.safetensors" for i in (1, 2)]
    half = len(state) // 2
    parts = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
    for name, part in zip(names, parts, strict=True):
        save_file(part, str(folder / name))
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index = f"diffusion_pytorch_model.safetensors.index{variant}.json"
    _write(folder, index, {"metadata": {}, "weight_map": weight_map})


@pytest.mark.parametrize("inside", ["", "unet", "unet/diffusion_pytorch_model.safetensors"])
def test_original_agrees_with_the_original_code(original: Callable[[str], Path], inside: str) -> None:
    folder = original("diffusers_ldm_vq")
    ref = dict(np.load(folder / "ref.npz"))
    checkpoint = load_checkpoint(folder / inside)
    assert (checkpoint.family, checkpoint.sample_shape) == ("diffusers", (3, 8, 8))
    assert checkpoint.scale_factor == 1.0
    assert_close(evaluate(checkpoint, ref), ref["out"])
    assert_close(sample(checkpoint, steps=10, x_t=torch.from_numpy(ref["xT"])), ref["ddim10_out"])
    assert_close(checkpoint.decode(torch.from_numpy(ref["z"])), ref["decoded_z"])
    assert_close(checkpoint.encode(torch.from_numpy(ref["img"])), ref["encoded_img"])


def test_original_as_a_flat_folder_and_under_older_names(
    original: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = original("diffusers_ldm_vq")
    ref = dict(np.load(folder / "ref.npz"))
    flat = tmp_path / "flat"
    shutil.copytree(folder / "unet", flat, copy_function=shutil.copy)
    shutil.copy(folder / "scheduler" / "scheduler_config.json", flat)
    state = load_checkpoint(folder).unet.state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    (flat / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, flat / "diffusion_pytorch_model.bin")
    checkpoint = load_checkpoint(flat)
    assert checkpoint.first_stage is None
    assert_close(evaluate(checkpoint, ref), ref["out"])


@pytest.mark.parametrize("kind", ["bin", "shards", "fp16", "fp16 shards"])
def test_files_of_weights(tmp_path: Path, kind: str) -> None:
    root = _folder(tmp_path)
    plain = root / "unet" / "diffusion_pytorch_model.safetensors"
    state = _unet_state(5)
    if kind.startswith("fp16"):
        state = {name: value.half() for name, value in state.items()}
    plain.unlink()
    if kind == "bin":
        torch.save(state, plain.with_suffix(".bin"))
    elif kind == "fp16":
        save_file(state, str(plain.with_name("diffusion_pytorch_model.fp16.safetensors")))
    else:
        _shards(root / "unet", state, ".fp16" if kind.startswith("fp16") else "")
    checkpoint = load_checkpoint(root)
    assert _is(checkpoint, {name: value.float() for name, value in state.items()})
    for part in [*(root / "unet").glob("*-of-*"), *(root / "unet").glob("*.index*.json")]:
        assert _is(load_checkpoint(part), {name: value.float() for name, value in state.items()})
    save_file(_unet_state(6), str(plain))
    assert _is(load_checkpoint(root), _unet_state(6)), "full precision in one file comes first"


def test_averaged_weights(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    shutil.copytree(root / "unet", root / "unet_ema")
    save_file(_unet_state(7), str(root / "unet_ema" / "diffusion_pytorch_model.safetensors"))
    averaged, trained = load_checkpoint(root), load_checkpoint(root, ema=False)
    assert (averaged.ema, trained.ema) == (True, False)
    assert _is(averaged, _unet_state(7))
    assert _is(trained, _unet_state(0))


def test_first_stage_and_its_scale(tmp_path: Path) -> None:
    root = _folder(tmp_path, first_stage=True)
    assert load_checkpoint(root).scale_factor == 0.18215
    _write(root / "vae", "config.json", {**KL, "scaling_factor": 0.5})
    checkpoint = load_checkpoint(root)
    images = torch.rand(1, 3, 16, 16)
    assert checkpoint.first_stage is not None
    assert_close(checkpoint.encode(images), (checkpoint.first_stage.encode(images) * 0.5).detach().numpy())
    for value in (0, "x", [1], 1e999):
        _write(root / "vae", "config.json", {**KL, "scaling_factor": value})
        with pytest.raises(BidmError, match="scaling_factor"):
            load_checkpoint(root)


def test_what_a_vq_model_does_not_say() -> None:
    values = {"_class_name": "VQModel", "block_out_channels": [32], "latent_channels": 3}
    _, scale, reason = first_stage_from_config(Section(values, "test"))
    assert scale == 1.0
    assert "assumed" in reason
    _, scale, _ = first_stage_from_config(Section({**values, "scaling_factor": 0.18215}, "test"))
    assert scale == 0.18215


def test_defaults_of_absent_settings() -> None:
    arguments = unet_from_config(Section({"_class_name": "UNet2DModel"}, "test"))["args"]
    assert arguments["block_out_channels"] == [224, 448, 672, 896]
    assert arguments["attention_levels"] == [1, 2, 3] == arguments["up_attention_levels"]
    assert arguments["attention_head_dim"] == 8
    assert (
        unet_from_config(Section({"attention_head_dim": None}, "test"))["args"]["attention_head_dim"] is None
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"_class_name": "DDPMScheduler"}, ("leading", "one", "keep_eps", True, "small", 0)),
        ({"variance_type": "fixed_large"}, ("leading", "one", "keep_eps", True, "large", 0)),
        (
            {"_class_name": "PNDMScheduler", "steps_offset": 1},
            ("leading", "first", "none", False, "small", 1),
        ),
        (
            {"timestep_spacing": "trailing", "clip_sample": False},
            ("trailing", "one", "none", False, "small", 0),
        ),
        (
            {"set_alpha_to_one": False, "timestep_spacing": "linspace"},
            ("linspace", "first", "keep_eps", True, "small", 0),
        ),
    ],
)
def test_conventions(settings: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = read_scheduler(Section(settings, "test")).convention
    assert expected == (
        found.spacing,
        found.final_alpha,
        found.clip,
        found.clip_ancestral,
        found.variance,
        found.steps_offset,
    )


def test_schedules() -> None:
    kinds = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    for theirs, ours in kinds.items():
        found = read_scheduler(Section({"beta_schedule": theirs, "num_train_timesteps": 50}, "test")).schedule
        assert (found.description["kind"], found.timesteps) == (ours, 50)
    betas = [0.1, 0.2, 0.3]
    found = read_scheduler(Section({"trained_betas": betas}, "test")).schedule
    np.testing.assert_allclose(found.betas.numpy(), betas)
    found = read_scheduler(Section({"rescale_betas_zero_snr": True}, "test")).schedule
    assert found.alphas_cumprod[-1] <= 1e-12
    assert float(found.alphas_cumprod[0]) == pytest.approx(0.9999)
    for settings in (
        {"beta_schedule": "x"},
        {"trained_betas": [2, 3]},
        {"prediction_type": "x"},
        {"beta_end": 3},
    ):
        with pytest.raises(BidmError):
            read_scheduler(Section(settings, "test"))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_ancestral_steps_end_where_the_next_begin(spacing: str) -> None:
    settings = read_scheduler(Section({"timestep_spacing": spacing}, "test"))
    steps = sampling_steps(settings.schedule, settings.convention, 7, chained=True)
    assert [step.alpha_bar_next for step in steps[:-1]] == [step.alpha_bar for step in steps[1:]]
    assert steps[-1].alpha_bar_next == 1.0
    strides = sampling_steps(settings.schedule, settings.convention, 7)
    expected = float(settings.schedule.alphas_cumprod[strides[0].t - 1000 // 7])
    assert strides[0].alpha_bar_next == expected


def test_predictions_and_learned_variance(tmp_path: Path) -> None:
    root = _folder(tmp_path, out_channels=6)
    _write(root / "scheduler", "scheduler_config.json", {**SCHEDULER, "prediction_type": "v_prediction"})
    checkpoint = load_checkpoint(root)
    assert (checkpoint.prediction, checkpoint.convention.variance) == ("v", "learned_range")
    assert checkpoint.sample_shape == (3, 16, 16)


def test_classes(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(_folder(tmp_path, num_class_embeds=5))
    assert checkpoint.num_classes == 5
    assert sample(checkpoint, n=1, steps=2, labels=[4]).shape == (1, 3, 16, 16)


def test_bare_config(tmp_path: Path) -> None:
    root = _folder(tmp_path, first_stage=True)
    checkpoint = load_architecture(root / "unet" / "config.json")
    assert not checkpoint.has_weights
    assert checkpoint.architecture["first_stage"]["kind"] == "diffusers_kl"
    (tmp_path / "alone").mkdir()
    shutil.copy(root / "unet" / "config.json", tmp_path / "alone" / "config.json")
    alone = load_architecture(tmp_path / "alone" / "config.json")
    assert alone.first_stage is None
    assert any("assumed" in note for note in alone.evidence)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "Transformer2DModel"}, "Transformer2DModel"),
        ({"down_block_types": ["DownBlock2D"]}, "list of 2"),
        ({"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "KDownBlock2D"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"time_embedding_type": "fourier"}, "fourier"),
        ({"class_embed_type": "identity"}, "class_embed_type"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps"),
        ({"down_block_types": ["DownBlock2D", "AttnSkipDownBlock2D"]}, "AttnSkipDownBlock2D"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
        ({"norm_num_groups": 7}, "7|divisible"),
        ({"layers_per_block": 10**8}, "layers_per_block"),
        ({"block_out_channels": [32, 96]}, "another shape"),
        ({"sample_size": -1}, "sample_size"),
        ({"downsample_padding": 5}, "downsample_padding"),
    ],
)
def test_hostile_configurations(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    root = _folder(tmp_path)
    _write(root / "unet", "config.json", {**UNET, **change})
    with pytest.raises(BidmError, match=words) as caught:
        load_checkpoint(root)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_hostile_indexes(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = "diffusion_pytorch_model.safetensors.index.json"
    for content, words in (
        ({"weight_map": {"a": "../../other.safetensors"}}, "refused"),
        ({"weight_map": {"a": "/etc/passwd"}}, "refused"),
        ({"weight_map": {"a": "gone.safetensors"}}, "missing"),
        ({"weight_map": 3}, "no index"),
        ({}, "no index"),
    ):
        _write(root / "unet", index, content)
        with pytest.raises(BidmError, match=words):
            load_checkpoint(root)


def test_incomplete_folders(tmp_path: Path) -> None:
    root = _folder(tmp_path, first_stage=True)
    (root / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BidmError, match=r"vae has no weights"):
        load_checkpoint(root)
    with pytest.raises(BidmError, match=r"first stage .* alone"):
        load_checkpoint(_moved(root / "vae", tmp_path / "vae_alone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BidmError, match="is a folder"):
        load_checkpoint(tmp_path / "empty")
    (root / "unet" / "config.json").write_text("{")
    with pytest.raises(BidmError, match="not valid"):
        load_checkpoint(root)


def _moved(source: Path, target: Path) -> Path:
    shutil.move(source, target)
    return target


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "ScoreSdeVeScheduler", "EDMEulerScheduler"]
)
def test_models_of_continuous_time_are_refused(name: str) -> None:
    with pytest.raises(BidmError, match=name):
        read_scheduler(Section({"_class_name": name}, "test"))


def test_a_renamed_file(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    plain = root / "unet" / "diffusion_pytorch_model.safetensors"
    renamed = plain.rename(plain.with_name("model.safetensors"))
    assert _is(load_checkpoint(root), _unet_state()) and _is(load_checkpoint(renamed), _unet_state())
    away = shutil.copy(renamed, tmp_path / "away.safetensors")
    with pytest.raises(BidmError, match=r"config\.json"):
        load_checkpoint(away)
    assert _is(load_checkpoint(away, config=root / "unet" / "config.json"), _unet_state())
    shutil.copy(renamed, plain.with_name("other.safetensors"))
    with pytest.raises(BidmError, match="no weights"):
        load_checkpoint(root)


def test_a_file_without_its_config_says_so(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "unet" / "config.json").unlink()
    with pytest.raises(BidmError, match=r"safetensors has no config\.json beside it.*`config`"):
        load_checkpoint(root / "unet" / "diffusion_pytorch_model.safetensors")


def test_parts_without_an_index(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    _shards(root / "unet", _unet_state())
    next((root / "unet").glob("*.index.json")).unlink()
    with pytest.raises(BidmError, match=r"2 parts .*00001-of-00002.* index"):
        load_checkpoint(root)


def test_a_model_of_another_network_is_named(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "unet").rename(root / "transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    _write(root, "model_index.json", index)
    with pytest.raises(BidmError, match="is a model of FluxTransformer2DModel; bidm loads UNet2DModel"):
        load_checkpoint(root)
    _write(root, "model_index.json", {"_class_name": "X", "transformer": [None, None], "unet": 3})
    with pytest.raises(BidmError, match=r"has no unet/config\.json"):
        load_checkpoint(root)


@pytest.mark.parametrize(
    "name",
    [
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_schedulers_of_other_samplers_give_schedule_and_spacing(name: str) -> None:
    values = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    more = {"timestep_spacing": "trailing", "steps_offset": 1, "prediction_type": "v_prediction"}
    found = read_scheduler(Section({"_class_name": name, **values, **more}, "test"))
    assert found.schedule.description["kind"] == "scaled_linear"
    convention = found.convention
    assert (convention.spacing, convention.steps_offset, convention.clip) == ("trailing", 1, "none")
    assert found.prediction == "v"
    assert any(name in note for note in found.notes)


def test_a_schedulers_own_betas() -> None:
    """Latent consistency models begin where Stable Diffusion does, whether their file says so or not."""
    found = read_scheduler(Section({"_class_name": "LCMScheduler"}, "test")).schedule.description
    assert (found["kind"], found["start"], found["end"]) == ("scaled_linear", 0.00085, 0.012)


V_COSINE = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}  # fmt: skip


@pytest.mark.parametrize("first_stage", [False, True])
@pytest.mark.parametrize(
    "inside", ["", "unet", "unet_ema", "unet/diffusion_pytorch_model.safetensors", "unet_ema/config.json"]
)
def test_an_intermediate_checkpoint_of_a_pipeline(tmp_path: Path, inside: str, first_stage: bool) -> None:
    """``out/checkpoint-10`` beside the scheduler and first stage of ``out``."""
    out = _folder(tmp_path, first_stage=first_stage)
    _write(out / "scheduler", "scheduler_config.json", V_COSINE)
    for name, seed in (("unet", 1), ("unet_ema", 2)):
        folder = out / "checkpoint-10" / name
        shutil.copytree(out / "unet", folder)
        save_file(_unet_state(seed), str(folder / "diffusion_pytorch_model.safetensors"))
    path = out / "checkpoint-10" / inside
    model = load_architecture(path) if path.suffix == ".json" else load_checkpoint(path)
    assert (model.prediction, model.schedule.description["kind"]) == ("v", "cosine")
    assert (model.first_stage is not None) == first_stage
    assert not [note for note in caveats(model.evidence) if "scheduler" in note]
    if model.has_weights:
        assert _is(model, _unet_state(1 if inside.startswith("unet/") or inside == "unet" else 2))


def test_a_relative_folder_inside_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _folder(tmp_path)
    _write(out / "scheduler", "scheduler_config.json", V_COSINE)
    shutil.copytree(out / "unet", out / "checkpoint-10" / "unet")
    for folder, name in (
        (out, "checkpoint-10"),
        (out / "checkpoint-10", "unet"),
        (out / "checkpoint-10", "."),
    ):
        monkeypatch.chdir(folder)
        assert load_checkpoint(name).prediction == "v"


def test_a_neighbours_first_stage_is_not_taken(tmp_path: Path) -> None:
    """Without a model_index.json, folders side by side are no pipeline."""
    out = _folder(tmp_path, first_stage=True)
    (out / "model_index.json").unlink()
    (out / "mine").mkdir()
    shutil.move(out / "unet", out / "mine")
    assert load_checkpoint(out / "mine").first_stage is None


def test_assumptions_of_a_folder_without_a_scheduler(tmp_path: Path) -> None:
    root = _folder(tmp_path, sample_size=None)
    shutil.rmtree(root / "scheduler")
    notes = [note for note in caveats(load_checkpoint(root).evidence) if note.kind == "assumed"]
    assert [note.split()[0] for note in notes] == ["schedule:", "the", "size"]
    assert all("override with" in note for note in notes)


@pytest.mark.parametrize(
    ("settings", "expected", "assumed"),
    [
        ({}, "epsilon", True),
        ({"predict_epsilon": False}, "x0", False),
        ({"predict_epsilon": True}, "epsilon", False),
        ({"prediction_type": "sample"}, "x0", False),
        ({"prediction_type": "v_prediction", "predict_epsilon": True}, "v", False),
    ],
)
def test_predictions_by_either_name(settings: dict[str, Any], expected: str, assumed: bool) -> None:
    found = read_scheduler(Section({"beta_schedule": "linear", **settings}, "test"))
    assert found.prediction == expected
    assert any("prediction_type" in note for note in caveats(found.notes)) == assumed


def test_zero_terminal_snr_and_noise_do_not_go_together(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    for change in ({"beta_end": 0.02}, {"trained_betas": [0.1, 0.2, 0.3]}):
        zero = {**SCHEDULER, **change, "rescale_betas_zero_snr": True}
        _write(root / "scheduler", "scheduler_config.json", {**zero, "prediction_type": "epsilon"})
        with pytest.raises(BidmError, match=r"zero terminal SNR.*prediction=v"):
            load_checkpoint(root)
        assert load_checkpoint(root, settings={"prediction": "v"}).prediction == "v"
        assert load_checkpoint(root, settings={"prediction": "epsilon"}).prediction == "epsilon"
        _write(root / "scheduler", "scheduler_config.json", {**zero, "prediction_type": "v_prediction"})
        assert load_checkpoint(root).prediction == "v"

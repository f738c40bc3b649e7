from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import bidm_cli
from bidm_cli.checkpoints.families.lucidrains.load import objective_of
from bidm_cli.checkpoints.families.lucidrains.unet import Era, as_later, era_of
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.checkpoints.reading.unpickle import read_file
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.sampling.timesteps import sampling_steps
from tests.checkpoints.conftest import assert_close, evaluate, weights
from tests.networks.test_lucidrains_unet import ARGUMENTS


def _buffers(weight: str = "v", schedule: NoiseSchedule | None = None) -> dict[str, Tensor]:
    alphas = (schedule or NoiseSchedule.sigmoid(50)).alphas_cumprod
    ratio = alphas / (1 - alphas)
    curves = {"v": alphas, "x0": ratio, "epsilon": torch.ones_like(alphas), "none": ratio.sqrt()}
    return {"alphas_cumprod": alphas.float(), "loss_weight": curves[weight].float()}


def _diffusion(seed: int = 0, weight: str = "v", **change: Any) -> dict[str, Tensor]:
    unet = weights("lucidrains_unet", {**ARGUMENTS, **change}, seed)
    return {**_buffers(weight), **{f"model.{name}": tensor for name, tensor in unet.items()}}


def _trainer(version: str | None = "2.3.4", **change: Any) -> dict[str, Any]:
    raw, averaged = _diffusion(0, **change), _diffusion(1, **change)
    ema = {f"ema_model.{name}": tensor for name, tensor in averaged.items()}
    ema |= {f"online_model.{name}": tensor for name, tensor in raw.items()}
    contents: dict[str, Any] = {
        "step": 7,
        "model": raw,
        "opt": {"state": {}, "param_groups": []},
        "scaler": None,
    }
    contents["ema"] = {"initted": torch.tensor(True), "step": torch.tensor(7), **ema}
    return contents if version is None else {**contents, "version": version}


def _save(tmp_path: Path, contents: Any) -> Path:
    torch.save(contents, tmp_path / "model-1.pt")
    return tmp_path / "model-1.pt"


def _config(tmp_path: Path, values: dict[str, Any]) -> Path:
    (tmp_path / "given.json").write_text(json.dumps(values))
    return tmp_path / "given.json"


def _is(checkpoint: Any, diffusion: dict[str, Tensor]) -> bool:
    state = checkpoint.unet.state_dict()
    return all(torch.equal(diffusion[f"model.{name}"], tensor) for name, tensor in state.items())


def test_original(original: Callable[[str], Path]) -> None:
    folder = original("lucidrains_v2")
    ref = dict(np.load(folder / "ref.npz"))
    averaged, trained = (load_checkpoint(folder / "model-1.pt", ema=ema) for ema in (True, False))
    assert (averaged.family, averaged.ema, trained.ema) == ("lucidrains", True, False)
    assert_close(evaluate(averaged, ref), ref["out_ema"])
    assert_close(evaluate(trained, ref), ref["out_raw"])
    assert averaged.sample_shape == (3, 16, 16) and averaged.prediction == "v"
    assert averaged.schedule.description["kind"] == "sigmoid"
    drawn = bidm_cli.sample(averaged, steps=10, x_t=torch.from_numpy(ref["ddim_xT"]))
    assert_close((drawn + 1) / 2, ref["ddim_out_01"])


def test_original_as_bare_state_dicts(original: Callable[[str], Path], tmp_path: Path) -> None:
    folder = original("lucidrains_v2")
    ref = dict(np.load(folder / "ref.npz"))
    model = read_file(folder / "model-1.pt")["model"]
    unet = {name[6:]: tensor.clone() for name, tensor in model.items() if name.startswith("model.")}
    save_file({k: v.clone() for k, v in model.items()}, str(tmp_path / "diffusion.safetensors"))
    save_file(unet, str(tmp_path / "unet.safetensors"))
    for name, schedule in (("diffusion", "from the file's buffers"), ("unet", "assumed")):
        checkpoint = load_checkpoint(tmp_path / f"{name}.safetensors")
        assert_close(evaluate(checkpoint, ref), ref["out_raw"])
        assert checkpoint.sample_shape == (3, 128, 128)
        assert any("schedule" in note and schedule in note for note in checkpoint.evidence)
        assert any("128x128 (assumed" in note for note in checkpoint.evidence)


def test_weights_of_a_trainer(tmp_path: Path) -> None:
    contents = _trainer()
    path = _save(tmp_path, contents)
    assert _is(load_checkpoint(path, ema=False), contents["model"])
    assert _is(load_checkpoint(path), _diffusion(1)) and load_checkpoint(path).ema
    del contents["ema"]
    only = load_checkpoint(_save(tmp_path, contents))
    assert _is(only, contents["model"]) and not only.ema


def test_averages_alone(tmp_path: Path) -> None:
    ema = {f"ema_model.{name}": tensor for name, tensor in _diffusion(1).items()}
    path = _save(tmp_path, {"ema": ema})
    assert load_checkpoint(path).ema
    with pytest.raises(BidmError, match="alone"):
        load_checkpoint(path, ema=False)


@pytest.mark.parametrize("weight", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("limit", [None, 5.0])
@pytest.mark.parametrize(
    "schedule",
    [NoiseSchedule.cosine(1000), NoiseSchedule.linear(1000, 1e-4, 0.02), NoiseSchedule.sigmoid(300)],
)
def test_objective_by_the_loss_weights(weight: str, limit: float | None, schedule: NoiseSchedule) -> None:
    alphas = schedule.alphas_cumprod
    ratio = alphas / (1 - alphas)
    limited = ratio if limit is None else ratio.clamp(max=limit)
    curve = {"epsilon": limited / ratio, "x0": limited, "v": limited / (ratio + 1)}[weight]
    assert objective_of({"alphas_cumprod": alphas.float(), "loss_weight": curve.float()}) == weight


def test_objective_unknown(tmp_path: Path) -> None:
    assert objective_of(_buffers("none")) is None
    assert objective_of({}) is None
    checkpoint = load_checkpoint(_save(tmp_path, _trainer(weight="none")))
    assert checkpoint.prediction == "v" and any("predicts v (assumed" in note for note in checkpoint.evidence)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dim_mults": [2], "full_attn": [True], "attn_heads": [3], "attn_dim_head": [5]},
        {"init_dim": 12},
        {"mem_kv": 2, "full_attn": [True, False], "attn_heads": [1, 4]},
        {"norm": "group"},
        {"channels": 1, "out_dim": 1},
        {"out_dim": 6},
        {"self_condition": True},
    ],
)
def test_inferred_as_built(tmp_path: Path, change: dict[str, Any]) -> None:
    found = load_checkpoint(_save(tmp_path, _trainer(**change))).architecture["unet"]["args"]
    assert {**ARGUMENTS, **change}.items() <= found.items()


def test_learned_variance_and_self_conditioning(tmp_path: Path) -> None:
    assert load_checkpoint(_save(tmp_path, _trainer(out_dim=6))).convention.variance == "learned_range"
    checkpoint = load_checkpoint(
        _save(tmp_path, _trainer(self_condition=True)), config=_config(tmp_path, {"image_size": 8, "dim": 8})
    )
    seen: list[Tensor | None] = []
    forward = checkpoint.unet.forward

    def spy(*arguments: Any, x_self: Tensor | None = None) -> Tensor:
        seen.append(x_self)
        return forward(*arguments, x_self=x_self)

    checkpoint.unet.forward = spy
    bidm_cli.sample(checkpoint, n=1, steps=3)
    assert seen[0] is None
    assert all(given is not None and given.abs().max() <= 1 for given in seen[1:])


def _wrapped(unet: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names before 1.8: attentions inside Residual(PreNorm(...))."""
    attention = r"((?:downs|ups)\.\d+\.2|mid_attn)\."
    names = {name: re.sub(attention + r"(?=to_)", r"\1.fn.fn.", name) for name in unet}
    return {re.sub(attention + r"norm\.g", r"\1.fn.norm.g", names[name]): t for name, t in unet.items()}


@pytest.mark.parametrize(
    ("version", "norm", "average", "standardize"),
    [
        ("0.30.2", "layer", True, "add"),
        ("1.6.4", "layer", True, "add"),
        ("1.7.0", "rms", True, "add"),
        ("1.7.1", "rms", True, "clamp"),
        ("1.7.3", "rms", True, None),
        ("1.7.10", "rms", False, None),
    ],
)
def test_eras_of_the_same_names(
    tmp_path: Path, version: str, norm: str, average: bool, standardize: str | None
) -> None:
    change = {"norm": "group", "mem_kv": 0, "attn_heads": [4, 4], "attn_dim_head": [32, 32]}
    later = weights("lucidrains_unet", {**ARGUMENTS, **change})
    model = {**_buffers(), **{f"model.{name}": tensor for name, tensor in _wrapped(later).items()}}
    checkpoint = load_checkpoint(_save(tmp_path, {"model": model, "version": version}))
    arguments = checkpoint.architecture["unet"]["args"]
    assert (arguments["attention_norm"], arguments["average"]) == (norm, average)
    name = "downs.0.0.block1.proj.weight"
    found, plain = checkpoint.unet.state_dict()[name], later[name]
    assert torch.equal(found, plain) == (standardize is None)
    if standardize:
        assert found.mean(dim=(1, 2, 3)).abs().max() < 1e-6
        torch.testing.assert_close(found.flatten(1).std(1, correction=0), torch.ones(8), rtol=1e-2, atol=0)


def test_standardization_differs_for_small_weights() -> None:
    weight = {"downs.0.0.block1.proj.weight": 1e-3 * torch.randn(2, 8, 3, 3)}
    added, limited = (
        as_later(weight, Era("", True, standardize=kind))["downs.0.0.block1.proj.weight"].std()
        for kind in ("add", "clamp")
    )
    assert added < limited < 0.5


@pytest.mark.parametrize(
    ("names", "version", "word"),
    [
        (["downs.0.0.ds_conv.weight"], None, "ConvNeXt"),
        (["downs.0.2.fn.fn.to_qkv.weight"], None, "does not say its version"),
        (["downs.0.2.fn.fn.to_qkv.weight"], "0.29.1", "0.29.1"),
        (["downs.0.2.fn.fn.to_qkv.weight"], "a\nb", "does not say"),
        (["time_mlp.0.weights"], None, "continuous time"),
        (["downs.0.2.norm.g"], "9.9", "no.*known|neither"),
        ([], None, "neither"),
    ],
)
def test_eras_that_are_refused(names: list[str], version: str | None, word: str) -> None:
    with pytest.raises(BidmError, match=word) as caught:
        era_of(names, version)
    assert "\n" not in str(caught.value)


def test_names_before_2022_07_are_refused(tmp_path: Path) -> None:
    model = {name.replace("model.", "denoise_fn."): tensor for name, tensor in _diffusion().items()}
    with pytest.raises(BidmError, match="before 2022-07"):
        load_checkpoint(_save(tmp_path, {"model": model}))


def test_version_from_the_configuration(tmp_path: Path) -> None:
    unet = _wrapped(
        weights("lucidrains_unet", {**ARGUMENTS, "norm": "group", "mem_kv": 0, "attn_dim_head": [8, 8]})
    )
    path = _save(tmp_path, {"model": {f"model.{name}": tensor for name, tensor in unet.items()}})
    config = _config(tmp_path, {"version": "1.7.2", "unet": {"dim": 8, "attn_dim_head": 8}})
    checkpoint = load_checkpoint(path, config=config)
    assert checkpoint.architecture["unet"]["args"]["attn_heads"] == [2, 2]


def test_ddim_before_1_5_keeps_the_noise(tmp_path: Path) -> None:
    contents = _trainer(norm="group")
    contents["model"]["p2_loss_weight"] = contents["model"].pop("loss_weight")
    checkpoint = load_checkpoint(_save(tmp_path, contents))
    assert (checkpoint.prediction, checkpoint.convention.clip) == ("epsilon", "keep_eps")
    # It took the noise from the clipped x0 where the network predicts anything else.
    for word in ("v", "v_prediction", "x0"):
        told = load_checkpoint(_save(tmp_path, contents), settings={"prediction": word})
        assert (told.prediction, told.convention.clip) == (word[:1] if word[0] == "v" else word, "rederive")


def test_heads_of_1_8_are_as_wide_as_the_configuration_says(tmp_path: Path) -> None:
    arguments = {**ARGUMENTS, "mem_kv": 0, "norm": "group", "attn_heads": [2, 4], "attn_dim_head": [16, 8]}
    path = _save(
        tmp_path, {"model": {f"model.{k}": v for k, v in weights("lucidrains_unet", arguments).items()}}
    )
    assert any("32 channels each (assumed" in note for note in load_checkpoint(path).evidence)
    found = load_checkpoint(path, config=_config(tmp_path, {"unet": {"dim": 8, "attn_dim_head": [16, 8]}}))
    assert found.architecture["unet"]["args"]["attn_heads"] == [2, 4]
    assert not any("channels each (assumed" in note for note in found.evidence)
    with pytest.raises(BidmError, match=r"attention downs\.0\.2 of 32 channels has no heads of 24"):
        load_checkpoint(path, config=_config(tmp_path, {"unet": {"dim": 8, "attn_dim_head": 24}}))


def test_configuration_decides(tmp_path: Path) -> None:
    config = _config(
        tmp_path,
        {"unet": {"dim": 8}, "diffusion": {"image_size": [16, 24], "objective": "pred_x0", "timesteps": 50}},
    )
    checkpoint = load_checkpoint(_save(tmp_path, _trainer()), config=config)
    assert checkpoint.sample_shape == (3, 16, 24)
    assert checkpoint.prediction == "x0"
    assert any("the loss weights say v" in note for note in checkpoint.evidence)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"dim": 16, "dim_mults": [1, 2]}, "dim is 16, but the weights have 8"),
        ({"dim": 8, "dim_mults": [1, 4]}, "dim_mults"),
        ({"dim": 8, "image_size": 7}, "multiples of 2"),
        ({"dim": 8, "image_size": [1, 2, 3]}, "image_size must be"),
        ({"dim": 8, "objective": "pred_fish"}, "objective must be"),
        ({"dim": 8, "beta_schedule": "magic"}, "beta_schedule must be"),
        ({"dim": 8, "timesteps": 10**9}, "timesteps must be"),
        ({"dim": 8, "timesteps": 50, "schedule_fn_kwargs": {"tau": 0}}, "schedule_fn_kwargs"),
    ],
)
def test_bad_settings(tmp_path: Path, values: dict[str, Any], word: str) -> None:
    path = _save(tmp_path, _trainer())
    with pytest.raises(BidmError, match=word) as caught:
        load_checkpoint(path, config=_config(tmp_path, values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda model: model.pop("model.mid_attn.to_out.weight"),
        lambda model: model.pop("model.downs.1.3.weight"),
        lambda model: model.update({"model.downs.0.2.mem_kv": torch.zeros(3)}),
        lambda model: model.update({"model.time_mlp.1.weight": torch.zeros(3, 3)}),
        lambda model: model.update({"model.init_conv.weight": torch.zeros(())}),
        lambda model: model.update(alphas_cumprod=torch.ones(50, 2)),
        lambda model: model.update(alphas_cumprod=torch.linspace(0, 1, 50)),
        lambda model: model.update({"model.final_conv.weight": torch.zeros(5, 8, 1, 1)}),
        lambda model: model.update({"model.extra.weight": torch.zeros(1)}),
    ],
)
def test_damaged_files(tmp_path: Path, break_it: Any) -> None:
    model = _diffusion()
    break_it(model)
    with pytest.raises(BidmError) as caught:
        load_checkpoint(_save(tmp_path, {"model": model}))
    assert "model-1.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_bare_configuration(original: Callable[[str], Path]) -> None:
    folder = original("lucidrains_v2")
    bare, full = load_architecture(folder / "hparams.json"), load_checkpoint(folder / "model-1.pt")
    assert bare.metadata() == full.metadata()
    assert not bare.has_weights and all(parameter.is_meta for parameter in bare.unet.parameters())


def test_sigmoid_schedule_survives_its_description() -> None:
    schedule = NoiseSchedule.sigmoid(100, -2, 4, 0.8)
    again = NoiseSchedule.from_description(schedule.description)
    assert torch.equal(schedule.alphas_cumprod, again.alphas_cumprod)
    assert 0.99 < schedule.alphas_cumprod[0] < 1 and schedule.alphas_cumprod[-1] < 1e-3


@pytest.mark.parametrize(("timesteps", "steps"), [(1000, 250), (1000, 30), (500, 10), (50, 50), (1000, 1)])
def test_spacing(timesteps: int, steps: int) -> None:
    schedule = NoiseSchedule.cosine(timesteps)
    found = sampling_steps(schedule, SamplingConvention(spacing="lucidrains"), steps)
    assert len(found) == steps
    assert (found[0].t, found[-1].alpha_bar_next) == (timesteps - 1, 1.0)
    assert [s.t for s in found][::-1] == [int(-1 + timesteps * (i + 1) / steps + 1e-9) for i in range(steps)]

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bidm_cli.checkpoints.families.score_sde import infer_score_unet
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.checkpoints.reading.state import on_meta, shapes_of
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import weights
from tests.networks.test_score_unet import ARGUMENTS, VARIANTS

SMALL: dict[str, Any] = {
    "in_channels": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_levels": [1],
    "kind": "biggan",
    "skip_rescale": True,
}
CONFIG: dict[str, Any] = {
    "model": {
        "name": "ncsnpp", "nf": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8],
        "resblock_type": "biggan", "skip_rescale": True, "fir": False, "embedding_type": "positional",
        "progressive": "none", "progressive_input": "none", "beta_min": 0.1, "beta_max": 10.0,
    },
    "data": {"image_size": 16, "num_channels": 3, "centered": True},
    "training": {"sde": "vpsde", "continuous": True},
}  # fmt: skip


def original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the original's names: NIN layers' as (in, out) matrices."""
    found = {}
    for name, tensor in state.items():
        if ".NIN_" in name:
            name = name.replace(".weight", ".W").replace(".bias", ".b")
            tensor = tensor[:, :, 0, 0].T.clone() if name.endswith(".W") else tensor
        found[name] = tensor
    return found


def write(path: Path, **more: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint as the project writes it; (trained, averaged) weights under this package's names."""
    trained = weights("score_unet", {**SMALL, **more})
    averaged = {name: tensor + 0.01 for name, tensor in trained.items()}
    model = {f"module.{name}": tensor for name, tensor in original(trained).items()}
    model = {"module.sigmas": torch.linspace(50, 0.01, 1000), **model}
    ema = {"decay": 0.9999, "num_updates": 3, "shadow_params": list(original(averaged).values())}
    optimizer = {"state": {}, "param_groups": []}
    torch.save({"optimizer": optimizer, "model": model, "ema": ema, "step": 3}, path)
    return trained, averaged


def _json(tmp_path: Path, **changes: dict[str, Any]) -> Path:
    values = {name: {**section, **changes.get(name, {})} for name, section in CONFIG.items()}
    (tmp_path / "given.json").write_text(json.dumps(values))
    return tmp_path / "given.json"


@pytest.mark.parametrize("averaged", [True, False])
def test_averages_are_a_list_in_the_networks_order(tmp_path: Path, averaged: bool) -> None:
    wanted = write(tmp_path / "checkpoint_3.pth")[averaged]
    checkpoint = load_checkpoint(tmp_path / "checkpoint_3.pth", ema=averaged)
    assert (checkpoint.family, checkpoint.ema) == ("score-sde", averaged)
    found = checkpoint.unet.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    text = "\n".join(checkpoint.evidence)
    assert "VP" in text and "skip_rescale" in text and ("shadow_params" in text) == averaged


@pytest.mark.parametrize("variant", VARIANTS)
def test_inferred_as_built(variant: str) -> None:
    arguments = {**ARGUMENTS, **VARIANTS[variant]}
    shapes = shapes_of(on_meta({"kind": "score_unet", "args": arguments}).state_dict())
    found = infer_score_unet(shapes)
    assert shapes_of(on_meta({"kind": "score_unet", "args": found}).state_dict()) == shapes
    untold = {"skip_rescale", "norm_groups"}
    assert {k: v for k, v in arguments.items() if k not in untold}.items() <= found.items()


def test_conventions(tmp_path: Path) -> None:
    write(tmp_path / "m.pth")
    checkpoint = load_checkpoint(tmp_path / "m.pth")
    assert (checkpoint.sample_shape, checkpoint.time_scale, checkpoint.prediction) == (
        (3, 32, 32),
        1.0,
        "epsilon",
    )
    betas = torch.linspace(0.1 / 1000, 20 / 1000, 1000, dtype=torch.float64)
    torch.testing.assert_close(checkpoint.schedule.betas, betas, rtol=1e-9, atol=1e-12)
    assert (checkpoint.convention.variance, checkpoint.convention.clip) == ("large", "none")


def test_configuration(tmp_path: Path) -> None:
    write(tmp_path / "m.pth")
    checkpoint = load_checkpoint(tmp_path / "m.pth", config=_json(tmp_path, model={"num_scales": 500}))
    assert checkpoint.sample_shape == (3, 16, 16)
    assert checkpoint.schedule.description["end"] == pytest.approx(10 / 500)
    assert checkpoint.time_scale == pytest.approx(999 / 499)
    bare = load_architecture(_json(tmp_path, model={"fir": True, "progressive_input": "residual"}))
    arguments = bare.architecture["unet"]["args"]
    assert {"fir": True, "input_pyramid": True, "attention_levels": [1]}.items() <= arguments.items()
    plain = load_architecture(_json(tmp_path, model={"name": "ddpm"})).architecture["unet"]["args"]
    assert (plain["kind"], plain["norm_groups"], plain["skip_rescale"]) == ("ddpm", 32, False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"sde": "vesde"}}, "'vesde' is not supported"),
        ({"training": {"sde": "subvpsde"}}, "'subvpsde' is not supported"),
        ({"model": {"embedding_type": "fourier"}}, "embedding_type fourier is not supported"),
        ({"model": {"progressive": "output_skip"}}, "progressive output_skip"),
        ({"model": {"progressive_input": "input_skip"}}, "progressive_input input_skip"),
        ({"model": {"fir": True, "resblock_type": "ddpm"}}, "fir with resblock_type ddpm"),
        ({"model": {"num_scales": 1}}, "in 1 steps"),
    ],
)
def test_what_bidm_does_not_have_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BidmError, match=words) as caught:
        load_architecture(_json(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def _save(tmp_path: Path, change: Any) -> Path:
    write(tmp_path / "m.pth")
    contents = torch.load(tmp_path / "m.pth", weights_only=True)
    change(contents)
    torch.save(contents, tmp_path / "m.pth")
    return tmp_path / "m.pth"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["ema"]["shadow_params"].pop(), "averaged .* load the file with `ema=False`"),
        (lambda c: c["ema"]["shadow_params"].reverse(), "in the place of all_modules.0.weight"),
        (lambda c: c["ema"]["shadow_params"].append("x"), "something else than tensors"),
        (lambda c: c["model"].pop("module.all_modules.4.Conv_0.weight"), "Conv_0.weight"),
        (lambda c: c["model"].update({"module.all_modules.7.NIN_0.W": torch.ones(3)}), "odd shape"),
        (lambda c: c["model"].update({"module.all_modules.2.weight": torch.ones(3)}), "architecture"),
    ],
)
def test_damaged_files(tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(BidmError, match=words) as caught:
        load_checkpoint(_save(tmp_path, change))
    assert "m.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_noise_levels_in_fourier_features_are_refused(tmp_path: Path) -> None:
    """The networks of VE models start with the features' frequencies, everything else one number later."""
    state = original(weights("score_unet", SMALL))
    later = {}
    for name, tensor in state.items():
        head, number, rest = name.split(".", 2)
        later[f"module.{head}.{int(number) + 1}.{rest}"] = tensor
    torch.save({"model": {"module.all_modules.0.W": torch.ones(32), **later}, "step": 1}, tmp_path / "m.pth")
    with pytest.raises(BidmError, match="variance-exploding"):
        load_checkpoint(tmp_path / "m.pth")

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bidm_cli.checkpoints.detect import detect
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import DDPM_UNET, LDM_UNET, ldm_state, weights

PATH = Path("some/file.pt")


def _ddpm() -> dict[str, torch.Tensor]:
    return weights("ddpm_unet", DDPM_UNET)


@pytest.mark.parametrize(
    ("wrap", "places"),
    [
        (lambda state: state, [""]),
        (lambda state: {"state_dict": state, "epoch": 3}, ["state_dict"]),
        (lambda state: {"model": state, "ema": state}, ["model", "ema"]),
        (lambda state: [state, {"state": {}}, 1, 2, state], ["[0]", "[4]"]),
        (lambda state: {f"module.{k}": v for k, v in state.items()}, [""]),
    ],
)
def test_wrappers(wrap: Any, places: list[str]) -> None:
    for state, family in ((_ddpm(), "ddpm"), (ldm_state(), "ldm"), (weights("ldm_unet", LDM_UNET), "openai")):
        found = detect(wrap(state), PATH)
        assert found.family == family
        assert [weights.where for weights in found.weights] == places
        assert family in found.evidence[0]


def test_pixel_models_of_ldm_are_ldm() -> None:
    state = {f"model.diffusion_model.{k}": v for k, v in _ddpm().items()}
    assert detect(state, PATH).family == "ldm"


@pytest.mark.parametrize(
    ("folder", "file", "family"),
    [
        ("guided_diffusion", "ema_0.9999_000010.pt", "openai"),
        ("dit", "DiT-tiny-plain.pt", "dit"),
        ("lucidrains_v2", "model-1.pt", "lucidrains"),
        ("diffusers_ldm_vq", "unet/diffusion_pytorch_model.safetensors", "diffusers"),
        ("diffusers_ldm_vq", "vqvae/diffusion_pytorch_model.safetensors", "diffusers"),
        ("ldm_unconditional_vq4", "model.ckpt", "ldm"),
        ("ddpm_ermongroup", "ckpt.pth", "ddpm"),
    ],
)
def test_originals(original: Any, folder: str, file: str, family: str) -> None:
    from bidm_cli.checkpoints.reading.unpickle import read_file

    assert detect(read_file(original(folder) / file), PATH).family == family


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"foo.weight": torch.ones(1), "bar.bias": torch.ones(1)}, ["foo.weight", "resembles none"]),
        (
            {"epoch": 1, "net": {"temb.dense.0.weight": torch.ones(1)}},
            ["epoch, net", "nearest is ddpm", "temb.dense.0"],
        ),
        ({"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}, ["optimizer"]),
        ({"epoch": 1, "lr": 0.1}, ["no tensors", "epoch, lr"]),
        ([1, 2], ["no tensors", "a list of 2"]),
        (torch.ones(3), ["no tensors", "a Tensor"]),
        (None, ["no tensors"]),
        ({"evil\nname\x1b": torch.ones(1)}, ["evil?name?"]),
        ({f"k{i}": torch.ones(1) for i in range(100)}, ["100 in all"]),
    ],
)
def test_unknown_files_are_described(contents: Any, words: list[str]) -> None:
    with pytest.raises(BidmError) as caught:
        detect(contents, PATH)
    message = str(caught.value)
    assert str(PATH) in message
    assert "\n" not in message
    for word in words:
        assert word in message

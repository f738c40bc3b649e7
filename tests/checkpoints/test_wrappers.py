"""The same network inside whatever trainers and exporters wrap around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bidm_cli.checkpoints.open import load_checkpoint
from tests.checkpoints.conftest import DDPM_UNET, LDM_UNET, ldm_state, weights

DIT = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "hidden_size": 64, "depth": 2,
    "num_heads": 1, "label_rows": 4, "mlp_width": 128, "frequencies": 256,
}  # fmt: skip
LUCIDRAINS = {
    "dim": 16, "init_dim": 16, "dim_mults": [1, 2], "channels": 3, "out_dim": 3, "self_condition": False,
    "full_attn": [False, True], "attn_heads": [2, 2], "attn_dim_head": [8, 8], "mem_kv": 2, "norm": "rms",
    "attention_norm": "rms", "average": False, "strided": False,
}  # fmt: skip
NETWORKS = {
    "ddpm": ("ddpm_unet", DDPM_UNET),
    "openai": ("ldm_unet", LDM_UNET),
    "dit": ("dit", DIT),
    "lucidrains": ("lucidrains_unet", LUCIDRAINS),
}


def _state(family: str, seed: int = 0) -> dict[str, Tensor]:
    if family == "ldm":
        unet = "model.diffusion_model."
        return {name: t + seed if name.startswith(unet) else t for name, t in ldm_state().items()}
    kind, arguments = NETWORKS[family]
    return weights(kind, arguments, seed)


def _first(family: str, state: dict[str, Tensor]) -> Tensor:
    """A weight that tells which state dict was loaded."""
    names = {"ldm": "model.diffusion_model.out.2.bias", "openai": "out.2.bias", "ddpm": "conv_out.bias"}
    names |= {"dit": "final_layer.linear.bias", "lucidrains": "final_conv.bias"}
    return state[names[family]]


def _loaded(path: Path, family: str, ema: bool = True) -> Tensor:
    checkpoint = load_checkpoint(path, ema=ema)
    assert checkpoint.family == family
    name = {"ldm": "out.2.bias"}.get(family)
    return (
        _first(family, checkpoint.unet.state_dict()) if name is None else checkpoint.unet.get_parameter(name)
    )


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("family", ["ldm", *NETWORKS])
@pytest.mark.parametrize("prefix", ["module.", "net.", "unet.", "model.", "module._orig_mod.", "a.b."])
def test_a_prefix(tmp_path: Path, family: str, prefix: str) -> None:
    state = _state(family)
    torch.save({"epoch": 1, "state_dict": _below(prefix, state)}, tmp_path / "x.pt")
    assert torch.equal(_loaded(tmp_path / "x.pt", family), _first(family, state))


@pytest.mark.parametrize("family", ["ldm", *NETWORKS])
def test_one_flat_file_of_weights_and_averages(tmp_path: Path, family: str) -> None:
    trained, averaged = _state(family), _state(family, 1)
    flat = _below("net.", trained) | _below("net_ema.", averaged) | {"steps": torch.tensor(3)}
    save_file({name: tensor.clone() for name, tensor in flat.items()}, str(tmp_path / "x.safetensors"))
    assert torch.equal(_loaded(tmp_path / "x.safetensors", family), _first(family, averaged))
    assert torch.equal(_loaded(tmp_path / "x.safetensors", family, ema=False), _first(family, trained))


@pytest.mark.parametrize("family", ["ldm", *NETWORKS])
@pytest.mark.parametrize("place", ["ema", "ema_state_dict", "ema.shadow", "model_ema.module", "averaged"])
def test_averages_beside_the_weights(tmp_path: Path, family: str, place: str) -> None:
    trained, averaged = _state(family), _state(family, 1)
    outer, _, inner = place.partition(".")
    content: dict[str, Any] = {"model": trained, outer: {inner: averaged} if inner else averaged, "step": 5}
    torch.save(content, tmp_path / "x.pt")
    assert torch.equal(_loaded(tmp_path / "x.pt", family), _first(family, averaged))
    assert torch.equal(_loaded(tmp_path / "x.pt", family, ema=False), _first(family, trained))


def test_a_running_average_of_torch(tmp_path: Path) -> None:
    """torch.optim.swa_utils.AveragedModel counts beside the weights."""
    state = _state("openai")
    torch.save({"n_averaged": torch.tensor(3), **_below("module.", state)}, tmp_path / "x.pt")
    assert torch.equal(_loaded(tmp_path / "x.pt", "openai"), _first("openai", state))

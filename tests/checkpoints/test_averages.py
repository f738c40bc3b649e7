"""Averaged (EMA) weights, in the ways in which trainers and libraries keep them, in every family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.choice import choose_weights
from bidm_cli.checkpoints.detect import detect
from bidm_cli.checkpoints.evidence import caveats
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.checkpoints.reading.wrappers import unwrap
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import DDPM_UNET, LDM_UNET, ldm_state, weights
from tests.checkpoints.test_export_families import UVIT
from tests.checkpoints.test_score_sde import SMALL
from tests.checkpoints.test_score_sde import original as original_names
from tests.checkpoints.test_w86 import UNET as W86
from tests.checkpoints.test_wrappers import DIT, LUCIDRAINS

State = dict[str, Tensor]
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddpm": ("ddpm_unet", DDPM_UNET, {}),
    "openai": ("ldm_unet", LDM_UNET, {}),
    "dit": ("dit", DIT, {}),
    "uvit": ("uvit", UVIT, {"num_heads": 2}),
    "lucidrains": ("lucidrains_unet", LUCIDRAINS, {"image_size": 16}),
    "w86763777": ("w86_unet", W86, {}),
    "score-sde": ("score_unet", SMALL, {}),
}


def _trained(family: str) -> State:
    if family == "ldm":
        return ldm_state()
    kind, arguments, _ = NETWORKS[family]
    state = weights(kind, arguments)
    return original_names(state) if family == "score-sde" else state


def _plus(state: State, amount: float = 1.0) -> State:
    schedule = ("betas", "alphas_cumprod")
    return {name: tensor if name in schedule else tensor + amount for name, tensor in state.items()}


def _below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _network(family: str, state: State) -> State:
    """The network's part of a state dict, by its own names."""
    prefix = "model.diffusion_model." if family == "ldm" else ""
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _parameters(family: str, state: State) -> list[Tensor]:
    """As ``network.parameters()`` gives them to a library of averages: the trainable ones, in their order."""
    return [tensor for name, tensor in _network(family, state).items() if not _is_frozen(family, name)]


def _is_frozen(family: str, name: str) -> bool:
    return (family, name) in {("dit", "pos_embed"), ("w86763777", "time_embedding.timembedding.0.weight")}


def _offset(found: State, family: str, state: State) -> float:
    """How far all trainable weights of the network are above those in ``state``, if they are so alike."""
    offsets = [
        (found[name] - tensor).flatten()
        for name, tensor in _network(family, state).items()
        if not _is_frozen(family, name)
    ]
    offset = torch.cat(offsets)
    assert torch.allclose(offset, offset[0].expand_as(offset), atol=1e-4)
    return float(offset[0])


def _chosen(contents: Any, family: str, ema: bool) -> tuple[State, bool, list[str]]:
    """(the network's weights, whether they are averaged, the evidence) without building the network."""
    detected = detect(contents, Path("x.pt"))
    assert detected.family == family
    notes = list(detected.evidence)
    choice = choose_weights(detected.weights, ema, notes)
    return _network(family, choice.weights.tensors), choice.averaged, notes


def _check(contents: Any, family: str, state: State, amount: float = 1.0) -> list[str]:
    """The average by default, the weights as trained without, and words that agree; -> the evidence."""
    averaged, trained = (_chosen(contents, family, ema) for ema in (True, False))
    assert _offset(averaged[0], family, state) == pytest.approx(amount, abs=1e-4)
    assert _offset(trained[0], family, state) == pytest.approx(0, abs=1e-4)
    assert (averaged[1], trained[1]) == (True, False)
    said = [next(note for note in found[2] if note.startswith("weights")) for found in (averaged, trained)]
    assert said[0].startswith("weights: EMA (") and said[1].startswith("weights: as trained (")
    return averaged[2]


def _settings(family: str) -> dict[str, Any]:
    return NETWORKS[family][2] if family in NETWORKS else {}


FAMILIES = ["ldm", *NETWORKS]
PLACES: dict[str, Callable[[State, State], dict[str, Any]]] = {
    "average first": lambda raw, mean: {"ema": mean, "model": raw},
    "timm": lambda raw, mean: {"state_dict": raw, "state_dict_ema": mean},
    "diffusers' loops": lambda raw, mean: {"model_state_dict": raw, "model_ema_state_dict": mean},
    "BasicSR": lambda raw, mean: {"params": raw, "params_ema": mean},
    "camel case": lambda raw, mean: {"net": raw, "netEMA": mean},
    "Lightning's callback": lambda raw, mean: {
        "state_dict": raw, "callbacks": {"EMACallback": {"ema_state_dict": mean}},
    },
    "Lightning's SWA": lambda raw, mean: {
        "state_dict": raw, "callbacks": {"StochasticWeightAveraging": {"average_model_state": mean}},
    },
    "Lightning's swap": lambda raw, mean: {
        "state_dict": mean, "current_model_state": raw, "averaging_state": {"n_averaged": torch.tensor(3)},
    },
    "torch's AveragedModel": lambda raw, mean: {
        "model": raw, "best": {"n_averaged": torch.tensor(3), **_below("module.", mean)},
    },
    "AveragedModel inside": lambda raw, mean: {
        "state_dict": _below("net.", raw)
        | {"copy.n_averaged": torch.tensor(3)} | _below("copy.module.", mean),
    },
    "ema-pytorch": lambda raw, mean: {
        "ema": {"initted": torch.tensor(True), "step": torch.tensor(9)}
        | _below("online_model.", raw) | _below("ema_model.", mean),
    },
    "ema-pytorch beside": lambda raw, mean: {
        "ema": _below("online_model.", _plus(raw, 7)) | _below("ema_model.", mean), "model": raw,
    },
    "compiled and parallel": lambda raw, mean: {
        "model": _below("module._orig_mod.", raw), "ema": _below("_forward_module.module.", mean),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", PLACES)
def test_averages_by_name(family: str, place: str) -> None:
    raw = _trained(family)
    _check(PLACES[place](raw, _plus(raw)), family, raw)


LISTS: dict[str, Callable[[list[Tensor]], dict[str, Any]]] = {
    "torch_ema": lambda mean: {
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": mean, "collected_params": None},
    },
    "torch_ema, swapped": lambda mean: {
        "ema": {"shadow_params": mean, "collected_params": [t + 5 for t in mean]},
    },
    "diffusers' EMAModel": lambda mean: {"ema_state": {"optimization_step": 3, "shadow_params": mean}},
    "NeMo": lambda mean: {"optimizer_states": [{"opt": {}, "ema": tuple(mean), "decay": 0.999}]},
    "Lightning's callback": lambda mean: {"callbacks": {"EMA": {"ema_weights": mean}}},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("place", LISTS)
def test_averages_without_names(family: str, place: str) -> None:
    raw = _trained(family)
    mean = [tensor + 1 for tensor in _parameters(family, raw)]
    _check({"model": _below("module.", raw), **LISTS[place](mean)}, family, raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_averages_that_fit_nothing_are_said(family: str) -> None:
    raw = _trained(family)
    mean = [tensor + 1 for tensor in _parameters(family, raw)][:-1]
    found, averaged, notes = _chosen({"model": raw, "ema": {"shadow_params": mean}}, family, True)
    assert not averaged and _offset(found, family, raw) == 0
    assert any(note.kind == "left out" and "ema.shadow_params" in note for note in caveats(notes))


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_with_their_averages(tmp_path: Path, family: str) -> None:
    raw = _trained(family)
    mean = [tensor + 1 for tensor in _parameters(family, raw)]
    torch.save({"model": _below("_orig_mod.", raw), "ema": {"shadow_params": mean}}, tmp_path / "x.pt")
    averaged = load_checkpoint(tmp_path / "x.pt", settings=_settings(family))
    assert averaged.ema and _offset(_named(averaged, family), family, raw) == pytest.approx(1, abs=1e-4)


def _named(checkpoint: Checkpoint, family: str) -> State:
    """A network's weights by the original's names."""
    state = checkpoint.unet.state_dict()
    return original_names(state) if family == "score-sde" else state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compiled", [False, True])
def test_names_without_dots(family: str, compiled: bool) -> None:
    """CompVis' LitEma, in any Lightning module, whose network may be compiled."""
    raw = _trained(family)
    inner = "diffusion_model." if family == "ldm" else ""
    infix = f"{inner}_orig_mod." if compiled else inner
    state = _below(f"model.{infix}", _network(family, raw))
    state |= {
        f"model_ema.{(infix + name).replace('.', '')}": tensor + 1
        for name, tensor in _network(family, raw).items()
    }
    state |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}
    for ema in (True, False):
        found, averaged, _ = _chosen({"state_dict": state}, family, ema)
        assert averaged == ema
        if family == "lucidrains":
            found = {name.removeprefix("model."): tensor for name, tensor in found.items()}
        assert _offset(found, family, raw) == pytest.approx(float(ema), abs=1e-4)


@pytest.mark.parametrize("where", ["in the file", "in the state dict"])
def test_the_average_of_the_network_inside_a_larger_one(tmp_path: Path, where: str) -> None:
    raw = _trained("ldm")
    mean = _plus(_network("ldm", raw))
    contents: dict[str, Any] = {"state_dict": raw, "ema": mean}
    if where == "in the state dict":
        online = _below("ema.online_model.", _network("ldm", raw))
        contents = {"state_dict": raw | online | _below("ema.ema_model.", mean)}
    _check(contents, "ldm", raw)
    torch.save(contents, tmp_path / "x.ckpt")
    checkpoint = load_checkpoint(tmp_path / "x.ckpt")
    assert (
        checkpoint.ema
        and checkpoint.first_stage is not None
        and "from the file" in "\n".join(checkpoint.evidence)
    )


def test_all_of_a_larger_model_averaged_in_a_list() -> None:
    raw = _trained("ldm")
    parameters = [tensor + 1 for name, tensor in raw.items() if "." in name]
    _check({"state_dict": raw, "ema": {"shadow_params": parameters}}, "ldm", raw)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda raw: {
            "model": raw,
            "ema": {"0.99": _plus(raw, 3), "0.9999": _plus(raw), "0.999": _plus(raw, 2)},
        },
        lambda raw: {"model": raw, "ema": {0.9999: _plus(raw), 0.999: _plus(raw, 2)}},
        lambda raw: {"model": raw, "ema_0.9999": _plus(raw), "ema_0.999": _plus(raw, 2)},
        lambda raw: {"model": raw, "ema_params": [list(_plus(raw, 2).values()), list(_plus(raw).values())]},
    ],
)
def test_of_several_averages_the_slowest(wrap: Any) -> None:
    raw = _trained("openai")
    notes = _check(wrap(raw), "openai", raw)
    assert any("other averages" in note for note in caveats(notes))


@pytest.mark.parametrize("family", ["ldm", "dit"])
def test_weights_without_an_average_are_completed(tmp_path: Path, family: str) -> None:
    raw = _trained(family)
    names = list(_network(family, raw))
    prefix = "model.diffusion_model." if family == "ldm" else ""
    mean = _plus({prefix + name: raw[prefix + name] for name in names[:-1]})
    torch.save({"model": raw, "ema": mean}, tmp_path / "x.pt")
    checkpoint = load_checkpoint(tmp_path / "x.pt")
    found = checkpoint.unet.state_dict()
    assert checkpoint.ema and torch.equal(found[names[-1]], raw[prefix + names[-1]])
    assert torch.equal(found[names[0]], raw[prefix + names[0]] + 1)
    assert "1 have no average" in "\n".join(checkpoint.evidence)


def test_another_copy_that_no_word_calls_an_average_is_said() -> None:
    raw = _trained("openai")
    found, averaged, notes = _chosen({"model": raw, "target": _plus(raw)}, "openai", True)
    assert _offset(found, "openai", raw) == 0 and not averaged
    assert any("target" in note for note in caveats(notes))


@pytest.mark.parametrize(
    ("name", "average"),
    [
        ("model000010.pt", "ema_0.9999_000010.pt"),
        ("x.safetensors", "x_ema.safetensors"),
        ("step=5.ckpt", "step=5-EMA.ckpt"),
        ("unet/model.pt", "unet_ema/model.pt"),
    ],
)
def test_averages_in_a_file_beside_are_mentioned(tmp_path: Path, name: str, average: str) -> None:
    raw = _trained("openai")
    for file, state in ((name, raw), (average, _plus(raw))):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        if file.endswith("safetensors"):
            save_file({k: t.clone() for k, t in state.items()}, str(tmp_path / file))
        else:
            torch.save(state, tmp_path / file)
    trained, averaged = load_checkpoint(tmp_path / name), load_checkpoint(tmp_path / average)
    assert (trained.ema, averaged.ema) == (False, True)
    assert any(Path(average).name in note for note in caveats(trained.evidence))
    asked = load_checkpoint(tmp_path / name, ema=False)
    assert not any("averaged" in note for note in caveats(asked.evidence))


def test_averages_of_another_step_are_not(tmp_path: Path) -> None:
    raw = _trained("openai")
    for file in ("model000010.pt", "ema_0.9999_000020.pt", "other000010_ema.pt"):
        torch.save(raw, tmp_path / file)
    notes = caveats(load_checkpoint(tmp_path / "model000010.pt").evidence)
    assert not any("ema" in note for note in notes)


@pytest.mark.parametrize("name", ["emaonly.ckpt", "x-EMA.pt", "nnet_ema.pth", "ema/model.pt"])
def test_names_of_files_with_averages(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    torch.save(_trained("ddpm"), tmp_path / name)
    assert load_checkpoint(tmp_path / name).ema
    other = tmp_path / "x.non_ema.pt"
    torch.save(_trained("ddpm"), other)
    assert not load_checkpoint(other).ema


def test_a_list_alone_is_named(tmp_path: Path) -> None:
    torch.save({"decay": 0.9, "shadow_params": _parameters("ddpm", _trained("ddpm"))}, tmp_path / "x.pt")
    with pytest.raises(BidmError, match=r"averaged .* without names"):
        load_checkpoint(tmp_path / "x.pt")


WRAPPERS = ["_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("family", ["ldm", "lucidrains"])
def test_what_lies_beside_a_wrapped_network_survives(tmp_path: Path, family: str, wrapper: str) -> None:
    if family == "ldm":
        plain = ldm_state(ema=True) | {"scale_factor": torch.tensor(0.25)}
        inner = "model.diffusion_model."
    else:
        plain = _below("model.", _trained(family))
        alphas = torch.linspace(0.99, 0.01, 50)
        plain |= {"alphas_cumprod": alphas, "betas": 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])}
        plain |= {"loss_weight": torch.ones(50)}
        inner = "model."
    state = {
        n.replace(inner, f"{inner}{wrapper}.", 1) if n.startswith(inner) else n: t for n, t in plain.items()
    }
    settings = {"image_size": 16}
    found = []
    for name, tensors in (("plain", plain), ("wrapped", state)):
        torch.save({"state_dict": tensors}, tmp_path / f"{name}.ckpt")
        found.append(load_checkpoint(tmp_path / f"{name}.ckpt", settings=settings))
    assert found[0].metadata() == found[1].metadata() and found[0].ema == found[1].ema
    assert found[0].schedule.timesteps == (1000 if family == "ldm" else 50)
    pairs = zip(found[0].unet.parameters(), found[1].unet.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert found[0].evidence == found[1].evidence


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("family", ["ddpm", "openai", "dit", "uvit", "w86763777", "score-sde"])
def test_wrappers_around_layers(family: str, wrapper: str) -> None:
    """Checkpointed or sharded one by one."""
    raw = _trained(family)
    blocks = {
        "dit": "blocks.0.",
        "uvit": "in_blocks.0.",
        "ddpm": "mid.block_1.",
        "w86763777": "downblocks.0.",
    }
    block = blocks.get(family, "middle_block.0." if family == "openai" else "all_modules.4.")
    assert any(name.startswith(block) for name in raw)
    wrapped = {
        n.replace(block, f"{block}{wrapper}.") if n.startswith(block) else n: t for n, t in raw.items()
    }
    _check({"model": wrapped, "ema": _plus(wrapped)}, family, raw)


def test_a_child_called_module_stays() -> None:
    tensor = torch.ones(1)
    names = ["a.module.weight", "a.other.weight", "b.module.bias", "module.c"]
    assert list(unwrap(dict.fromkeys(names, tensor)).tensors) == [*names[:2], "b.bias", "module.c"]
    both = ["net.weight", "net._orig_mod.weight"]
    assert list(unwrap(dict.fromkeys(both, tensor)).tensors) == both


def test_torchs_own_average() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)
            self.mean = torch.optim.swa_utils.AveragedModel(self.net)

    found = unwrap(Net().state_dict())
    assert set(found.tensors) == {"net.weight", "net.bias", "mean.weight", "mean.bias"}
    assert found.averages == {"mean."}


def test_what_lies_beside_a_prefix_and_is_not_used_is_said(tmp_path: Path) -> None:
    state = _below("unet.", _trained("ddpm")) | {"encoder.weight": torch.ones(1), "scale": torch.ones(1)}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    notes = caveats(load_checkpoint(tmp_path / "x.ckpt").evidence)
    assert any(note.kind == "left out" and "encoder" in note and "scale" not in note for note in notes)


DIFFUSERS = {
    "_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 3, "out_channels": 3,
    "block_out_channels": [32, 32], "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip


def _diffusers(folder: Path) -> State:
    from bidm_cli.checkpoints.families.diffusers.config import unet_from_config
    from bidm_cli.checkpoints.reading.config import Section

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(DIFFUSERS))
    architecture = unet_from_config(Section(DIFFUSERS, "test"))
    return weights(architecture["kind"], architecture["args"])


@pytest.mark.parametrize("place", [*PLACES, *LISTS])
def test_diffusers_networks(tmp_path: Path, place: str) -> None:
    raw = _diffusers(tmp_path)
    if place in PLACES:
        contents = PLACES[place](raw, _plus(raw))
    else:
        contents = {"model": raw, **LISTS[place]([tensor + 1 for tensor in raw.values()])}
    _check(contents, "diffusers", raw)


@pytest.mark.parametrize("name", ["", "diffusion_pytorch_model.bin"])
@pytest.mark.parametrize("place", ["average first", "ema-pytorch", "torch_ema"])
def test_diffusers_folders_with_averages_in_a_file(tmp_path: Path, place: str, name: str) -> None:
    raw = _diffusers(tmp_path)
    mean = _plus(raw)
    contents = (
        PLACES[place](raw, mean) if place in PLACES else {"model": raw, **LISTS[place](list(mean.values()))}
    )
    torch.save(contents, tmp_path / "diffusion_pytorch_model.bin")
    for ema in (True, False):
        checkpoint = load_checkpoint(tmp_path / name, ema=ema)
        assert checkpoint.ema == ema
        assert _offset(checkpoint.unet.state_dict(), "diffusers", raw) == pytest.approx(float(ema), abs=1e-4)


def test_diffusers_folders_of_averages(tmp_path: Path) -> None:
    raw = _diffusers(tmp_path / "unet")
    save_file(raw, str(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"))
    _diffusers(tmp_path / "unet_ema")
    save_file(_plus(raw), str(tmp_path / "unet_ema" / "diffusion_pytorch_model.safetensors"))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    averaged, trained = load_checkpoint(tmp_path), load_checkpoint(tmp_path, ema=False)
    assert (averaged.ema, trained.ema) == (True, False)
    alone = load_checkpoint(tmp_path / "unet")
    assert not alone.ema or _offset(alone.unet.state_dict(), "diffusers", raw) == 1
    file = load_checkpoint(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert not file.ema and any("unet_ema" in note for note in caveats(file.evidence))


def test_diffusers_own_words_on_averages(tmp_path: Path) -> None:
    raw = _diffusers(tmp_path)
    save_file(raw, str(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert not load_checkpoint(tmp_path).ema
    save_file(_plus(raw), str(tmp_path / "diffusion_pytorch_model.non_ema.safetensors"))
    assert load_checkpoint(tmp_path).ema and not load_checkpoint(tmp_path, ema=False).ema
    (tmp_path / "diffusion_pytorch_model.non_ema.safetensors").unlink()
    values = {**DIFFUSERS, "decay": 0.99, "optimization_step": 3, "update_after_step": 0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_checkpoint(tmp_path).ema

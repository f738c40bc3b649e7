"""A family and its network, added from outside through the registries."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidm_cli
from bidm_cli.checkpoints import detect, family
from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.family import (
    Detected,
    Found,
    OneNetworkFamily,
    Signature,
    choose_weights,
    register_family,
)
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.checkpoints.reading.config import Config
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.networks import registry
from bidm_cli.networks.layers import Block, DenoisingNetwork, NetworkInputs, with_role
from bidm_cli.networks.registry import register_network
from tests.conftest import Called


class ToyNetwork(DenoisingNetwork):
    """Two convolutions; time goes unused."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs = NetworkInputs(4)
        self.stem = with_role(nn.Conv2d(4, width, 3, padding=1), "stem")
        self.toy_head = with_role(nn.Conv2d(width, 3, 3, padding=1), "head")

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        return self.toy_head(self.stem(x))

    def blocks(self) -> list[Block]:
        return [Block("stem", "encoder")]


@dataclass(frozen=True)
class ToySettings:
    unet: dict[str, Any] | None = None


class Toy(OneNetworkFamily[ToySettings]):
    signature = Signature("toy", "a toy", (("stem.weight", "toy_head.weight"),))
    network_kind = "toy_network"

    def config_kind(self, values: Mapping[str, Any]) -> str | None:
        return "arguments" if "toy_width" in values else None

    def read_settings(self, config: Config) -> ToySettings:
        return ToySettings({"width": config.root.integer("toy_width")})

    def load(self, detected: Detected, config: Config | None, ema: bool, source: Path) -> Checkpoint:
        notes = list(detected.evidence)
        choice = choose_weights(detected.weights, ema, notes)
        arguments = {"width": len(choice.weights.tensors["stem.bias"])}
        tensors = choice.weights.tensors
        found = self.built(arguments, tensors, notes, source=source, ema=choice.averaged)
        return self.assemble(ToySettings(), found)

    def assemble(self, settings: ToySettings, found: Found) -> Checkpoint:
        schedule = NoiseSchedule.linear(10, 1e-4, 0.02)
        convention = SamplingConvention()
        return self.checkpoint(found, sample_shape=(3, 8, 8), schedule=schedule, convention=convention)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    detect.families()
    monkeypatch.setitem(registry._KINDS, "toy_network", ToyNetwork)
    register_family(Toy)
    yield
    del family.REGISTERED["toy"]


def _file(folder: Path) -> Path:
    torch.manual_seed(0)
    path = folder / "toy.pt"
    plain = ToyNetwork(5).state_dict()
    torch.save({"model": plain, "ema": {name: value + 1 for name, value in plain.items()}}, path)
    return path


@pytest.mark.usefixtures("toy")
def test_detected_loaded_and_inspected(tmp_path: Path, bidm: Callable[..., Called]) -> None:
    path = _file(tmp_path)
    averaged, trained = load_checkpoint(path), load_checkpoint(path, ema=False)
    assert (averaged.family, averaged.ema, trained.ema) == ("toy", True, False)
    assert torch.equal(averaged.unet.get_parameter("stem.bias"), trained.unet.get_parameter("stem.bias") + 1)
    assert averaged.concat_channels == 1 and any("a toy" in note for note in averaged.evidence)
    inspected = bidm("inspect", path)
    assert inspected.code == 0 and "family toy" in inspected.out


@pytest.mark.usefixtures("toy")
def test_a_bare_configuration(tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text(json.dumps({"toy_width": 7}))
    opened = bidm_cli.open(tmp_path / "toy.json")
    assert opened.family == "toy" and opened.device.type == "meta"
    assert load_architecture(tmp_path / "toy.json").architecture["unet"]["args"] == {"width": 7}


@pytest.mark.usefixtures("toy")
def test_a_family_without_an_exporter_says_so(tmp_path: Path) -> None:
    model = load_checkpoint(_file(tmp_path))
    with pytest.raises(BidmError, match="'toy' cannot be exported yet"):
        detect.family_named("toy").export(model, {}, tmp_path / "out.pt")


@pytest.mark.usefixtures("toy")
def test_names_belong_to_one_class() -> None:
    class Other(Toy):
        pass

    with pytest.raises(ValueError, match="registered already"):
        register_family(Other)
    with pytest.raises(ValueError, match="registered already"):
        register_network("ddpm_unet", ToyNetwork)


def test_without_it_the_file_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(BidmError, match="not a checkpoint that bidm knows"):
        load_checkpoint(_file(tmp_path))


def test_networks_come_from_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(name="toy_network", value="toys:ToyNetwork", load=lambda: ToyNetwork)
    monkeypatch.setattr(registry, "entry_points", lambda group, name: [point] * (name == "toy_network"))
    assert isinstance(registry.build({"kind": "toy_network", "args": {"width": 3}}), ToyNetwork)
    del registry._KINDS["toy_network"]
    with pytest.raises(BidmError, match="unknown network kind"):
        registry.build({"kind": "another", "args": {}})


def test_families_come_from_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise ImportError("no module named toys")

    point = SimpleNamespace(name="toy", value="toys", load=load)
    detect._import_families.cache_clear()
    monkeypatch.setattr(detect, "entry_points", lambda group: [point])
    with pytest.raises(BidmError, match="family 'toy' of toys cannot be imported: no module named toys"):
        detect.families()
    point.load = lambda: register_family(Toy)
    assert detect.families()[-1].name == "toy"
    del family.REGISTERED["toy"]


def test_a_setting_of_the_spacing_follows_it_unless_set_too(tmp_path: Path, toy: None) -> None:
    path = _file(tmp_path)
    both = load_checkpoint(path, settings={"stride_end": False, "spacing": "leading"}).convention
    assert (both.float32_coefficients, both.stride_end, both.noise_at_end) == (True, False, True)
    assert both.to_json("toy") == {
        **SamplingConvention(spacing="leading").to_json("toy"),
        "stride_end": False,
    }

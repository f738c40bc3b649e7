from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.cli.models import open_model
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build

UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "ch": 32,
    "ch_mult": [1],
    "num_res_blocks": 1,
    "attention_levels": [],
}
CONFIG = {"resolution": 8, "ch": 32, "out_ch": 3, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(build({"kind": "ddpm_unet", "args": UNET}).state_dict(), tmp_path / "m.pt")
    return tmp_path / "m.pt"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "c.json").write_text(json.dumps(CONFIG))
    return folder / "c.json"


def test_a_checkpoint(checkpoint: Path, config: Path) -> None:
    model = open_model(checkpoint, config=config)
    assert isinstance(model, Checkpoint)
    assert model.has_weights
    assert model.sample_shape == (3, 8, 8)
    assert model.source == checkpoint


def test_a_bare_configuration(config: Path) -> None:
    model = open_model(config, device="cpu")
    assert isinstance(model, Checkpoint)
    assert not model.has_weights
    assert model.device.type == "meta"
    with pytest.raises(BidmError, match="leave out `config`"):
        open_model(config, config=config)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BidmError, match="no such file"):
        open_model(tmp_path / "none.bidm")


@pytest.mark.parametrize("name", ["m.bidm", "m.safetensors"])
def test_packed_files_go_to_their_own_reader(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bidm_cli.packed.format.read

    packed = Mock()
    load = Mock(return_value=packed)
    monkeypatch.setattr(bidm_cli.packed.format.read, "load_packed", load)
    save_file({"unet.a": torch.ones(1)}, str(tmp_path / name), metadata={"bidm": "{}"})
    assert open_model(tmp_path / name, backend="torch") is packed
    load.assert_called_once_with(tmp_path / name, device="cpu", backend="torch")
    packed.warm_up.assert_called_once()

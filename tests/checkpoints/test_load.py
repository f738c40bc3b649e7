"""What all families have in common: refusals, and files damaged at random."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bidm_cli
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import DDPM_UNET, ldm_state, weights


def test_public_name() -> None:
    assert bidm_cli.load_checkpoint is load_checkpoint


def test_packed_files_are_told_apart(tmp_path: Path) -> None:
    save_file({"unet.a": torch.ones(1)}, str(tmp_path / "m.bidm"), metadata={"bidm": "{}"})
    with pytest.raises(BidmError, match="load_packed"):
        load_checkpoint(tmp_path / "m.bidm")


def test_missing_files(tmp_path: Path) -> None:
    for call in (load_checkpoint, load_architecture):
        with pytest.raises(BidmError, match="no such file"):
            call(tmp_path / "none.ckpt")
    torch.save(weights("ddpm_unet", DDPM_UNET), tmp_path / "m.pt")
    with pytest.raises(BidmError, match=r"no such file.*none\.yml"):
        load_checkpoint(tmp_path / "m.pt", config=tmp_path / "none.yml")


def test_configurations_of_nothing_known(tmp_path: Path) -> None:
    for values, word in (
        ({"a": 1}, "top-level keys a"),
        ({"_class_name": "X"}, "diffusers"),
    ):
        (tmp_path / "c.json").write_text(json.dumps(values))
        with pytest.raises(BidmError, match=word):
            load_architecture(tmp_path / "c.json")


def _damaged(data: bytes, rng: random.Random, hot: int) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        position = rng.choice((rng.randrange(hot), len(damaged) - 1 - rng.randrange(hot)))
        position = max(0, min(position, len(damaged) - 1))
        kind = rng.randrange(5)
        if kind <= 1:
            damaged[position] = rng.randrange(256)
        elif kind == 2:
            del damaged[position : position + rng.randrange(1, 16)]
        elif kind == 3:
            damaged[position:position] = rng.randbytes(rng.randrange(1, 9))
        else:
            damaged = damaged[: position + 1]
    return bytes(damaged)


@pytest.mark.parametrize("container", ["zip", "plain", "safetensors"])
def test_damaged_files_give_one_clear_line(tmp_path: Path, container: str) -> None:
    state = {name: tensor.half() for name, tensor in ldm_state(first_stage=None).items()}
    whole, path = tmp_path / "whole", tmp_path / "damaged.ckpt"
    if container == "safetensors":
        save_file(state, str(whole))
    else:
        torch.save({"state_dict": state}, whole, _use_new_zipfile_serialization=container == "zip")
    data = whole.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        path.write_bytes(_damaged(data, rng, 8000))
        try:
            load_checkpoint(path)
        except BidmError as error:
            refused += 1
            assert "\n" not in str(error)
            assert str(path) in str(error)
            assert len(str(error)) < 1500
    assert refused > 50

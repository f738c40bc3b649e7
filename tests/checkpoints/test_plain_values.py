"""Configurations as people's programs and editors write them."""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bidm_cli.checkpoints.detect import read_config, sibling_config
from bidm_cli.checkpoints.evidence import caveats
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.checkpoints.reading.config import read_section
from bidm_cli.errors import BidmError
from tests.checkpoints.conftest import DDIM_CONFIG, DDPM_UNET, weights

TEXT = yaml.safe_dump(DDIM_CONFIG)


class Easy(dict):
    """easydict, yacs, attrdict: a dict with state of its own."""

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        for name, value in (values or {}).items():
            self[name] = Easy(value) if isinstance(value, dict) else value
        self.__dict__["__immutable__"] = False


class Held:
    """ml_collections' ConfigDict, omegaconf's containers: everything in one attribute."""

    def __init__(self, attribute: str, values: Any) -> None:
        inner = {n: Held(attribute, v) if isinstance(v, dict) else v for n, v in values.items()}
        self.__dict__.update({"_locked": True, attribute: inner})


def _namespace(values: dict[str, Any]) -> argparse.Namespace:
    return argparse.Namespace(**{n: _namespace(v) if isinstance(v, dict) else v for n, v in values.items()})


@pytest.mark.parametrize(
    "wrap",
    [
        _namespace,
        Easy,
        lambda values: Held("_fields", values),
        lambda values: Held("_content", values),
        collections.OrderedDict,
        lambda values: {**values, "size": (1, 2), "device": torch.device("cpu"), "path": Path("a")},
    ],
    ids=["namespace", "easydict", "ConfigDict", "omegaconf", "OrderedDict", "others"],
)
def test_tags_mean_what_they_stand_on(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    (tmp_path / "config.yml").write_text(yaml.dump(wrap(DDIM_CONFIG)))
    found = read_config(tmp_path / "config.yml")
    assert found.layout == "ddpm"
    for name, values in DDIM_CONFIG.items():
        assert found.root.values[name] == values


def test_nothing_is_constructed(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"a: !!python/object/apply:os.system ['touch {tmp_path / 'x'}']\n"
        "b: !!python/object/new:os.Thing {state: {c: 1}, listitems: [1, 2]}\n"
        "c: !!python/name:os.system ''\nd: !!python/tuple [1, 2]\ne: !Mine 3\nf: !!python/int '4'\n"
        "g: !!python/object/apply:enum.Kind [5]\nh: !!python/str 6\n"
    )
    values = read_section(path).values
    assert values == {
        "a": f"touch {tmp_path / 'x'}", "b": [1, 2], "c": "os.system", "d": [1, 2], "e": 3, "f": 4, "g": 5,
        "h": "6",
    }  # fmt: skip
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        ("# r\u00e9solution\n" + TEXT).encode("latin-1"),
        TEXT.replace("  ", "\t").encode(),
        TEXT.replace(": ", ":\t").encode(),
        b"---\n" + TEXT.encode() + b"...\n",
        ("%YAML 1.1\n---\n" + TEXT).encode(),
    ],
    ids=[
        "bom",
        "utf16",
        "le",
        "be",
        "utf32",
        "crlf",
        "cr",
        "latin1",
        "tabs",
        "inner tabs",
        "marks",
        "version",
    ],
)
def test_encodings_and_blanks(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.yml").write_bytes(data)
    assert read_section(tmp_path / "config.yml").values == DDIM_CONFIG


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: "// made by hand\n/* for\n a test */\n" + text,
        lambda text: text.replace("{", "{ # open\n", 1),
        lambda text: text[:-1] + ",\n}",
        lambda text: text[:-1] + ', "loss": NaN, "best": Infinity}',
        lambda text: json.dumps(json.loads(text), indent="\t")[:-2] + ",\n}",
        lambda text: text[:-1] + ', "url": "https://x/*y*/"}',
    ],
    ids=["plain", "slashes", "hash", "comma", "nan", "tabs", "not comments"],
)
def test_json_as_people_write_it(tmp_path: Path, change: Callable[[str], str]) -> None:
    (tmp_path / "c.json").write_text(change(json.dumps(DDIM_CONFIG)), encoding="utf-8-sig")
    values = read_section(tmp_path / "c.json").values
    assert {name: values[name] for name in DDIM_CONFIG} == DDIM_CONFIG
    assert values.get("url", "https://x/*y*/") == "https://x/*y*/"


def test_wandb_and_references(tmp_path: Path) -> None:
    run = {name: {"desc": None, "value": value} for name, value in DDIM_CONFIG.items()}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**run, "wandb_version": 1, "_wandb": {"value": {}}}))
    assert read_section(tmp_path / "a.yaml").values == DDIM_CONFIG
    referring = {
        **DDIM_CONFIG,
        "size": 16,
        "data": {"image_size": "${size}", "channels": "${data.rgb}", "rgb": 3},
    }
    referring |= {"nowhere": "${none.such}", "self": "${self}"}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(referring))
    values = read_section(tmp_path / "b.yaml").values
    assert values["data"] == {"image_size": 16, "channels": 3, "rgb": 3}
    assert values["nowhere"] == "${none.such}"


FLAGS = """# written by absl
--T=1000
--ch=32
--ch_mult=1
--ch_mult=2
--attn=1
--num_res_blocks=1
--dropout=0.1
--img_size=16
--beta_1=0.0002
--beta_T=0.02
--mean_type=xstart
--var_type=fixedsmall
--logdir=./logs/DDPM
--noeval
--train
"""
W86 = {
    "timesteps": 1000, "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
    "attention_levels": [1],
}  # fmt: skip


def test_flag_files(tmp_path: Path) -> None:
    (tmp_path / "flagfile.txt").write_text(FLAGS)
    values = read_section(tmp_path / "flagfile.txt").values
    assert (values["ch_mult"], values["attn"], values["eval"], values["train"]) == ([1, 2], 1, False, True)
    assert values["logdir"] == "./logs/DDPM"
    torch.save({"net_model": weights("w86_unet", W86)}, tmp_path / "ckpt.pt")
    for config in (None, tmp_path / "flagfile.txt"):
        model = load_checkpoint(tmp_path / "ckpt.pt", config=config)
        assert (model.sample_shape, model.prediction) == ((3, 16, 16), "x0")
        assert model.convention.variance == "small"
        assert model.schedule.description["start"] == 0.0002
    (tmp_path / "flagfile.txt").write_text(FLAGS + "no flag at all\n")
    with pytest.raises(BidmError, match="no flag at all"):
        read_section(tmp_path / "flagfile.txt")


@pytest.mark.parametrize(
    "place",
    [
        "model.yml",
        "args.yaml",
        ".hydra/config.yaml",
        "../.hydra/config.yaml",
        "../hparams.yaml",
        "../config.yml",
    ],
)
def test_places(tmp_path: Path, place: str) -> None:
    checkpoint = tmp_path / "checkpoints" / "model.ckpt"
    path = (checkpoint.parent / place).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TEXT)
    found = sibling_config(checkpoint, "ddpm", [])
    assert found is not None
    assert found.path.resolve() == path


@pytest.mark.parametrize("content", [b"data: {", b"\xff\xfe\x00", b"", b"[1]", b"\x00\x01\x02"])
@pytest.mark.parametrize("name", ["config.yml", "config.json", "ckpt.yaml"])
def test_what_cannot_be_read_is_said(tmp_path: Path, content: bytes, name: str) -> None:
    torch.save(weights("ddpm_unet", DDPM_UNET), tmp_path / "ckpt.pth")
    (tmp_path / name).write_bytes(content)
    model = load_checkpoint(tmp_path / "ckpt.pth")
    (note,) = [note for note in caveats(model.evidence) if note.kind == "unreadable"]
    assert name in note
    assert "\n" not in note
    with pytest.raises(BidmError, match=name):
        load_checkpoint(tmp_path / "ckpt.pth", config=tmp_path / name)


def test_what_belongs_to_something_else_is_said(tmp_path: Path) -> None:
    torch.save(weights("ddpm_unet", DDPM_UNET), tmp_path / "ckpt.pth")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / "hparams.yaml").write_text("lr: 0.1")
    notes = [n for n in caveats(load_checkpoint(tmp_path / "ckpt.pth").evidence) if n.kind == "left out"]
    assert [Path(note.split()[0]).name for note in notes] == ["config.json", "hparams.yaml"]
    assert "diffusers" in notes[0]


def test_comments_without_end_take_no_time(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{" + "/*" * 60_000)
    with pytest.raises(BidmError):
        read_section(tmp_path / "c.json")

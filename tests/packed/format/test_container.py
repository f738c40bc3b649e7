from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import read_packed, write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.sampling.sample import sample

RECIPE = {"name": "w1a1", "store": {"float": "float16"}}


@pytest.fixture
def contents(student: Callable[..., DiffusionModel]) -> tuple[dict, dict]:
    return pack_model(student(), RECIPE, {"source": "a.ckpt"}, {"loss": [0.5]})


@pytest.fixture
def packed_file(contents: tuple[dict, dict], tmp_path: Path) -> Path:
    write_packed(tmp_path / "a.bidm", *contents)
    return tmp_path / "a.bidm"


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def fails_in_one_line(path: Path) -> str:
    with pytest.raises(BidmError) as caught:
        read_packed(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_round_trip(contents: tuple[dict, dict], packed_file: Path) -> None:
    metadata, tensors = read_packed(packed_file)
    for key, value in contents[0].items():
        assert metadata[key] == json.loads(json.dumps(value))
    assert metadata["format_version"] == 1
    assert tensors.keys() == contents[1].keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in contents[1].items())


def test_any_safetensors_reader_opens_it(packed_file: Path) -> None:
    assert "unet.down.0.block.0.conv1.weight_bits" in safetensors.torch.load_file(packed_file)


def test_same_input_same_bytes(contents: tuple[dict, dict], packed_file: Path, tmp_path: Path) -> None:
    metadata, tensors = contents
    shuffled = dict(reversed(metadata.items())), dict(reversed(tensors.items()))
    write_packed(tmp_path / "b.bidm", *shuffled)
    assert (tmp_path / "b.bidm").read_bytes() == packed_file.read_bytes()


def test_cut_off_anywhere_is_one_clear_error(packed_file: Path) -> None:
    content = packed_file.read_bytes()
    header = header_size(content)
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) - 1):
        packed_file.write_bytes(content[:length])
        assert "cut off" in fails_in_one_line(packed_file)


def test_trailing_bytes_are_refused(packed_file: Path) -> None:
    packed_file.write_bytes(packed_file.read_bytes() + b"\0")
    fails_in_one_line(packed_file)


def test_flipped_header_bytes_are_one_clear_error(packed_file: Path) -> None:
    content = packed_file.read_bytes()
    header = header_size(content)
    # Every byte of the beginning and a spread over the rest: each file takes a few milliseconds.
    for position in [*range(64), *range(64, header, header // 150), *range(header - 16, header)]:
        for bit in (0x01, 0x20):
            damaged = bytearray(content)
            damaged[position] ^= bit
            packed_file.write_bytes(damaged)
            if _same_text(content[8:header], bytes(damaged[8:header])) and position >= 8:
                continue
            fails_in_one_line(packed_file)


def _same_text(a: bytes, b: bytes) -> bool:
    """Whether two headers are the same JSON: safetensors pads it with blanks."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_flipped_data_bytes_are_one_clear_error(packed_file: Path) -> None:
    content = packed_file.read_bytes()
    for position in (header_size(content), (header_size(content) + len(content)) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        packed_file.write_bytes(damaged)
        assert "checksum" in fails_in_one_line(packed_file)


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Change metadata and tensors behind the writer's back."""
    with safetensors.safe_open(path, "pt") as handle:
        metadata = json.loads(handle.metadata()["bidm"])
    tensors = safetensors.torch.load_file(path)
    change(metadata, tensors)
    safetensors.torch.save_file(tensors, path, metadata={"bidm": json.dumps(metadata)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m, t: m.update(format_version=99), "version 99"),
        (lambda m, t: m.pop("layers"), "no layer table"),
        (lambda m, t: m["layers"].append(m["layers"][0]), "twice"),
        (lambda m, t: m["layers"][3]["geometry"].update(stride=[0, 1]), "layer table"),
        (lambda m, t: m["layers"][3].update(kind="float"), "layer table"),
        (lambda m, t: t.pop("unet.mid.attn_1.q.weight_bits"), "missing"),
        (lambda m, t: t.pop("unet.norm_out.weight"), "checksum"),
        (lambda m, t: t.update({"unet.more.weight_bits": torch.zeros(1, 1)}), "belongs to no layer"),
        (lambda m, t: t.update({"more": torch.zeros(1)}), "does not belong"),
        (lambda m, t: t.update({"unet.mid.attn_1.q.weight_bits": torch.zeros(2, 2)}), "needs"),
    ],
)
def test_contents_that_do_not_fit(packed_file: Path, change: Callable, says: str) -> None:
    rewritten(packed_file, change)
    assert says in fails_in_one_line(packed_file)


def test_other_files_are_named_as_such(tmp_path: Path) -> None:
    assert "no such file" in fails_in_one_line(tmp_path / "none.bidm")
    (tmp_path / "text.bidm").write_text("hello" * 100)
    assert "not a packed file" in fails_in_one_line(tmp_path / "text.bidm")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "not a packed bidm file" in fails_in_one_line(tmp_path / "other.safetensors")


def test_numbers_that_are_not_finite_become_null(contents: tuple[dict, dict], tmp_path: Path) -> None:
    metadata, tensors = contents
    write_packed(tmp_path / "a.bidm", {**metadata, "training": {"loss": float("nan")}}, tensors)
    assert read_packed(tmp_path / "a.bidm")[0]["training"] == {"loss": None}


def test_nothing_is_left_when_writing_fails(contents: tuple[dict, dict], tmp_path: Path) -> None:
    metadata, tensors = contents
    wrong = {**tensors, "unet.mid.attn_1.q.weight_bits": torch.zeros(1, 1, dtype=torch.uint8)}
    with pytest.raises(BidmError):
        write_packed(tmp_path / "a.bidm", metadata, wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(BidmError):
        write_packed(tmp_path / "file" / "a.bidm", metadata, tensors)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


CLIPPING = {
    "clip_range": 2.0,
    "threshold_quantile": 0.9,
    "threshold_max": 3.0,
    "variance": "learned",
}


@pytest.mark.parametrize("name", CLIPPING)
def test_a_file_says_the_version_that_its_convention_needs(
    name: str, student: Callable[..., DiffusionModel], tmp_path: Path
) -> None:
    model = student()
    plain = pack_model(model, RECIPE)[0]
    assert not plain["convention"].keys() & {"clip_range", "threshold_quantile", "threshold_max"}
    model.convention = dataclasses.replace(model.convention, **{name: CLIPPING[name]})
    write_packed(tmp_path / "a.bidm", *pack_model(model, RECIPE))
    assert read_packed(tmp_path / "a.bidm")[0]["format_version"] == 3
    assert load_packed(tmp_path / "a.bidm").convention == model.convention


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_packed_sampling_clips_as_the_file_says(
    sampler: str, student: Callable[..., DiffusionModel], tmp_path: Path
) -> None:
    model = student()
    limits = {"clip": "keep_eps", "clip_ancestral": True, "clip_range": 0.25}
    model.convention = dataclasses.replace(model.convention, spacing="leading", **limits)
    write_packed(tmp_path / "a.bidm", *pack_model(model, RECIPE))
    found = sample(load_packed(tmp_path / "a.bidm", backend="torch"), n=2, steps=4, sampler=sampler)
    assert float(found.abs().max()) == 0.25

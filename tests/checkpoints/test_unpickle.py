from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import io
import os
import pickle
import random
import struct
import sys
import tarfile
import types
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bidm_cli.checkpoints.reading import restricted
from bidm_cli.checkpoints.reading.pickle_names import Stub, collect_names
from bidm_cli.checkpoints.reading.unpickle import read_file, safetensors_metadata
from bidm_cli.errors import BidmError

LAYOUTS = [{}, {"_use_new_zipfile_serialization": False}]
LAYOUT_NAMES = ["zip", "plain"]


def _state() -> dict[str, torch.Tensor]:
    return {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.arange(4, dtype=torch.int64),
        "c": torch.ones(2).half(),
    }


def _assert_state(found: Any) -> None:
    assert found.keys() == _state().keys()
    for name, tensor in _state().items():
        assert torch.equal(found[name], tensor)


def _refused(path: Path, *words: str) -> str:
    with pytest.raises(BidmError) as caught:
        read_file(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert "weights_only" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_NAMES)
def test_reads_both_layouts(tmp_path: Path, layout: dict[str, bool]) -> None:
    contents = {"state_dict": _state(), "epoch": 3, "list": [1, 2.5, None, True, ("x", b"y")], "set": {1, 2}}
    torch.save(contents, tmp_path / "m.ckpt", **layout)
    found = read_file(tmp_path / "m.ckpt")
    _assert_state(found.pop("state_dict"))
    assert found == {"epoch": 3, "list": [1, 2.5, None, True, ("x", b"y")], "set": {1, 2}}


def test_zip_files_are_mapped(tmp_path: Path) -> None:
    torch.save(_state(), tmp_path / "m.ckpt")
    storage = read_file(tmp_path / "m.ckpt")["a"].untyped_storage()
    assert not storage.resizable()
    before = (tmp_path / "m.ckpt").read_bytes()
    read_file(tmp_path / "m.ckpt")["a"].zero_()
    assert (tmp_path / "m.ckpt").read_bytes() == before


def test_reads_safetensors_whatever_its_name(tmp_path: Path) -> None:
    for name in ("m.safetensors", "m.ckpt"):
        save_file(_state(), str(tmp_path / name), metadata={"format": "pt"})
        _assert_state(read_file(tmp_path / name))
        assert safetensors_metadata(tmp_path / name) == {"format": "pt"}


def test_metadata_of_other_files(tmp_path: Path) -> None:
    torch.save(_state(), tmp_path / "m.ckpt")
    assert safetensors_metadata(tmp_path / "m.ckpt") is None
    save_file(_state(), str(tmp_path / "m.safetensors"))
    assert safetensors_metadata(tmp_path / "m.safetensors") == {}


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_NAMES)
def test_lightning_callbacks_without_lightning(
    tmp_path: Path, layout: dict[str, bool], foreign_class: Callable[..., type]
) -> None:
    key = foreign_class("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
    hyper = foreign_class("pytorch_lightning.utilities.parsing.AttributeDict", dict)
    contents = {
        "state_dict": _state(),
        "callbacks": {key: {"best_model_score": torch.tensor(0.5), "dirpath": "logs"}},
        "hyper_parameters": hyper(lr=0.1),
    }
    torch.save(contents, tmp_path / "m.ckpt", **layout)
    for module in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        sys.modules[module].__dict__.clear()
    found = read_file(tmp_path / "m.ckpt")
    ((stub, values),) = found["callbacks"].items()
    assert stub is not key
    assert issubclass(stub, Stub)
    assert values["dirpath"] == "logs"
    assert found["hyper_parameters"] == {"lr": 0.1}
    _assert_state(found["state_dict"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_NAMES)
def test_harmless_objects_become_stubs(
    tmp_path: Path, layout: dict[str, bool], foreign_class: Callable[..., type]
) -> None:
    config_class = foreign_class("omegaconf.dictconfig.DictConfig")
    config = config_class()
    config.__dict__.update(_content={"lr": 1}, _metadata=None)
    contents = {
        "state_dict": _state(),
        "args": argparse.Namespace(lr=0.1, inner=argparse.Namespace(path=Path("x"))),
        "config": config,
        "numbers": {"f": np.float64(1.5), "i": np.int64(3), "b": np.bool_(True), "a": np.arange(3)},
        "default": collections.defaultdict(list, {"k": [1]}),
        "counter": collections.Counter("aab"),
    }
    torch.save(contents, tmp_path / "m.ckpt", **layout)
    found = read_file(tmp_path / "m.ckpt")
    _assert_state(found["state_dict"])
    assert isinstance(found["args"], Stub)
    assert found["args"].state["lr"] == 0.1
    assert isinstance(found["args"].state["inner"].state["path"], Stub)
    assert type(found["config"]) is not config_class
    assert found["config"].state["_content"] == {"lr": 1}
    assert all(isinstance(number, Stub) for number in found["numbers"].values())
    assert found["default"] == {"k": [1]}
    assert found["counter"]["a"] == 2


def test_stubs_are_forgotten_afterwards(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "m.ckpt")
    before = set(torch.serialization.get_safe_globals())
    read_file(tmp_path / "m.ckpt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "m.ckpt", weights_only=True)


class _Calls:
    """Pickles to a call that leaves a file behind if it is ever made."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def _attacks(target: Path) -> list[tuple[str, Any]]:
    return [
        ("posix.system", _Calls(os.system, f"touch {target}")),
        ("builtins.eval", _Calls(eval, f"open({str(target)!r}, 'w')")),
        ("builtins.exec", _Calls(exec, f"open({str(target)!r}, 'w')")),
        ("io.open", _Calls(open, str(target), "w")),
        ("shutil.copy", _Calls(__import__("shutil").copy, __file__, str(target))),
        ("builtins.getattr", _Calls(getattr, target, "touch")),
        ("torch.serialization.save", _Calls(torch.save, {}, str(target))),
    ]


@pytest.mark.parametrize("container", ["zip", "plain", "zip protocol 4", *map(str, range(6))])
@pytest.mark.parametrize("attack", range(7))
def test_malicious_files_are_refused_by_name_and_write_nothing(
    tmp_path: Path, container: str, attack: int
) -> None:
    target, path = tmp_path / "written", tmp_path / "m.ckpt"
    name, call = _attacks(target)[attack]
    contents = {"state_dict": _state(), "extra": call}
    if container.isdigit():
        path.write_bytes(pickle.dumps({"extra": call}, int(container)))
    elif container == "zip protocol 4":
        torch.save(contents, path, pickle_protocol=4)
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=container == "zip")
    _refused(path, name)
    assert sorted(os.listdir(tmp_path)) == ["m.ckpt"]


def test_an_attack_in_the_last_pickle_of_a_plain_file(tmp_path: Path) -> None:
    """The storage keys are a pickle of their own, as dangerous as the first."""
    target, path = tmp_path / "written", tmp_path / "m.ckpt"
    torch.save(_state(), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    stream = io.BytesIO(data)
    for _ in range(4):
        collect_names(stream, set())
    path.write_bytes(data[: stream.tell()] + pickle.dumps(_Calls(os.system, f"touch {target}"), 2))
    _refused(path, "posix.system")
    assert not target.exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.ckpt")
    _refused(tmp_path / "m.ckpt", "torch.nn.modules.linear.Linear", "state_dict()")


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_NAMES)
@pytest.mark.parametrize("protocol", range(1, 6))
def test_all_protocols(tmp_path: Path, protocol: int, layout: dict[str, bool]) -> None:
    contents = {
        "state_dict": collections.OrderedDict(_state()),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [
            1 << 100,
            -5,
            1.5,
            None,
            True,
            "x" * 300,
            "\u00fc",
            b"bytes",
            bytearray(b"more"),
            (1, 2, 3, 4),
        ],
        "sets": [{1, 2}, set(), torch.float16, torch.Size((1, 2)), torch.device("cpu")],
    }
    path = tmp_path / "m.ckpt"
    torch.save(contents, path, pickle_protocol=protocol, **layout)
    found = read_file(path)
    _assert_state(found.pop("state_dict"))
    assert isinstance(found["parameter"], torch.nn.Parameter)
    assert torch.equal(found.pop("parameter"), torch.ones(2))
    assert found == {name: contents[name] for name in ("plain", "sets")}


def test_other_protocols_are_mapped_too(tmp_path: Path) -> None:
    torch.save(_state(), tmp_path / "m.ckpt", pickle_protocol=4)
    assert not read_file(tmp_path / "m.ckpt")["a"].untyped_storage().resizable()


def test_another_protocol_while_torch_may_not_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(_state(), tmp_path / "4.ckpt", pickle_protocol=4)
    torch.save(_state(), tmp_path / "2.ckpt")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    _assert_state(read_file(tmp_path / "2.ckpt"))
    with pytest.raises(BidmError, match="TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        read_file(tmp_path / "4.ckpt")


class Mode(enum.Enum):
    """Pickled as improved-diffusion's enumerations are, by class and value."""

    EPSILON = 2


def _bookkeeping(foreign_class: Callable[..., type]) -> dict[str, Any]:
    """Objects that trainers keep beside the weights."""
    easy = foreign_class("easydict.EasyDict", dict)
    mode = foreign_class("improved_diffusion.gaussian_diffusion.ModelMeanType")
    return {
        "losses": collections.deque([1.0, 2.0], maxlen=4),
        "namespace": types.SimpleNamespace(lr=0.1),
        "generator": np.random.default_rng(0),
        "state": np.random.RandomState(0),
        "bits": [np.random.PCG64(1), np.random.MT19937(1), np.random.Philox(1), np.random.SFC64(1)],
        "seed": np.random.SeedSequence(3),
        "global": np.random.get_state(),
        "python": random.Random(1),
        "paths": [Path("a/b"), datetime.datetime.now(datetime.timezone.utc), datetime.timedelta(1)],
        "array": np.arange(4.0),
        "version": torch.__version__,
        "numbers": [decimal.Decimal("0.1"), uuid.UUID(int=1), slice(1, 2), range(3), frozenset({1})],
        "easy": easy(lr=0.1, data=easy(size=16)),
        "mode": mode(),
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_NAMES)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_bookkeeping_becomes_plain_data_or_stubs(
    tmp_path: Path, protocol: int, layout: dict[str, bool], foreign_class: Callable[..., type]
) -> None:
    contents = {"state_dict": _state(), **_bookkeeping(foreign_class)}
    torch.save(contents, tmp_path / "m.ckpt", pickle_protocol=protocol, **layout)
    found = read_file(tmp_path / "m.ckpt")
    _assert_state(found["state_dict"])
    assert found["losses"] == [1.0, 2.0]
    assert found["namespace"].state == {"lr": 0.1}
    assert found["easy"] == {"lr": 0.1, "data": {"size": 16}}
    for name in ("namespace", "generator", "state", "seed", "python", "array", "version", "mode"):
        assert isinstance(found[name], Stub)
    assert all(isinstance(item, Stub) for item in [*found["bits"], *found["paths"]])


def test_classes_that_nobody_knows_are_refused_in_every_protocol(tmp_path: Path) -> None:
    for protocol in (2, 4):
        torch.save({"mode": Mode.EPSILON}, tmp_path / "m.ckpt", pickle_protocol=protocol)
        _refused(tmp_path / "m.ckpt", "Mode", "refused")


def _zip_with(path: Path, program: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", program)
        archive.writestr("m/version", b"3\n")


_PROTOCOL_4 = b"\x8c\x01a0"
"""A short string that is thrown away again: an instruction that torch's own unpickler has not."""
_ODICT = b"ccollections\nOrderedDict\n"
_HOSTILE = {
    "extension": b"\x80\x04\x82\x01.",
    "buffer outside": b"\x80\x05\x97.",
    "call of a dict": b"\x80\x04})R.",
    "call of a dtype": b"\x80\x04ctorch\nfloat32\n)R.",
    "call of a tensor class": b"\x80\x04ctorch\nTensor\n(J\xff\xff\xff\x7ftR.",
    "new object of a dict": b"\x80\x04})}\x92.",
    "attributes of a class": b"\x80\x04" + _ODICT + b"}\x8c\x01aK\x01sb.",
    "attributes of a tensor class": b"\x80\x04ctorch\nTensor\n}\x8c\x01aK\x01sb.",
    "items of a class": b"\x80\x04" + _ODICT + b"\x8c\x01aK\x01s.",
    "append to a dict": b"\x80\x04}K\x01a.",
    "add to a list": b"\x80\x04](K\x01\x90.",
    "codec": b"\x80\x04c_codecs\nencode\n\x8c\x01a\x8c\x05rot13\x86R.",
    "size by number": b"\x80\x04cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "function named like a dtype": b"\x80\x04ctorch\nfloat_power\n.",
    "module": b"\x80\x04(\x8c\x06moduleK\x01tQ.",
    "textual reference": b"\x80\x04Pstorage\n.",
    "long bytes": b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.",
    "long bytearray": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
    "old call": b"(S'touch x'\nios\nsystem\n.",
    "old object": b"(cos\nsystem\nS'touch x'\no.",
    "empty stack": b"\x80\x04\x94.",
}


@pytest.mark.parametrize("container", ["zip", "plain"])
@pytest.mark.parametrize("what", _HOSTILE)
def test_hostile_instructions(tmp_path: Path, what: str, container: str) -> None:
    path, program = tmp_path / "m.ckpt", _PROTOCOL_4 + _HOSTILE[what]
    if container == "zip":
        _zip_with(path, program)
    else:
        torch.save({}, path, _use_new_zipfile_serialization=False, pickle_protocol=4)
        stream = io.BytesIO(path.read_bytes())
        for _ in range(3):
            collect_names(stream, set())
        path.write_bytes(stream.getvalue()[: stream.tell()] + program + b"\x80\x04].")
    _refused(path)
    assert os.listdir(tmp_path) == ["m.ckpt"]
    # Let past the scan for names, the unpickler itself still refuses.
    with pytest.raises(Exception):  # noqa: B017
        restricted.load(io.BytesIO(program))


@pytest.mark.parametrize("attack", range(7))
@pytest.mark.parametrize("protocol", range(6))
def test_the_unpickler_alone_refuses_attacks(tmp_path: Path, attack: int, protocol: int) -> None:
    name, call = _attacks(tmp_path / "written")[attack]
    with pytest.raises(BidmError, match=name):
        restricted.load(io.BytesIO(pickle.dumps({"extra": call}, protocol)))
    assert os.listdir(tmp_path) == []


def test_a_tar_archive_is_not_unpacked(tmp_path: Path) -> None:
    """A file name that is a pickle, too."""
    path = tmp_path / "m.ckpt"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("\x4b\x01\x2e"))
    data = path.read_bytes()
    assert data.startswith(b"K\x01.")
    _refused(path)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_NAMES)
def test_truncated_files(tmp_path: Path, layout: dict[str, bool]) -> None:
    path = tmp_path / "m.ckpt"
    torch.save(_state(), path, **layout)
    whole = path.read_bytes()
    for length in [0, 1, 3, 4, 8, 50, *range(60, len(whole) - 1, 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        _refused(path)


def test_truncated_safetensors(tmp_path: Path) -> None:
    save_file(_state(), str(tmp_path / "whole"))
    whole = (tmp_path / "whole").read_bytes()
    for suffix in (".safetensors", ".ckpt"):
        path = tmp_path / f"m{suffix}"
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            _refused(path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n  <html>", "web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "cannot be read"),
        (b"hello\n" * 50, "cannot be read"),
        (pickle.dumps([1, 2, 3], 2), "cannot be read"),
        (struct.pack("<Q", 1 << 60) + b"{}", "cannot be read"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "m.ckpt").write_bytes(content)
    _refused(tmp_path / "m.ckpt", word)


def test_no_file_and_folder(tmp_path: Path) -> None:
    _refused(tmp_path / "none.ckpt", "no such file")
    _refused(tmp_path, "folder")


def test_other_archives(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/1.png", b"x")
    _refused(path, "zip archive")
    torch.save(_state(), tmp_path / "good.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "good.ckpt") as good,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for entry in good.infolist():
            archive.writestr(entry.filename, good.read(entry))
    _refused(path, "compressed")


def test_a_torchscript_program(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"x")
        archive.writestr("m/code/__torch__.py", b"x")
    _refused(tmp_path / "m.pt", "TorchScript")


def test_a_huge_safetensors_header_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 1 << 50) + b"{" + b" " * 100)
    _refused(tmp_path / "m.safetensors")

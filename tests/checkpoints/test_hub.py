from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.checkpoints.reading.hub import downloaded, is_hub_id
from bidm_cli.cli.models import open_model
from bidm_cli.errors import BidmError


def _hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[str, str | None]]:
    """Stands in for huggingface_hub; returns what it is asked for."""
    asked: list[tuple[str, str | None]] = []

    def snapshot_download(repo_id: str, revision: str | None = None, **_: Any) -> str:
        asked.append((repo_id, revision))
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


@pytest.mark.parametrize("path", ["hf://google/ddpm-cifar10-32", Path("hf://google/ddpm-cifar10-32")])
def test_an_id_becomes_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str | Path) -> None:
    asked = _hub(monkeypatch, tmp_path)
    assert is_hub_id(path)
    assert downloaded(path) == tmp_path
    downloaded(f"{path}@v1.0")
    assert asked == [("google/ddpm-cifar10-32", None), ("google/ddpm-cifar10-32", "v1.0")]
    assert not is_hub_id("model/hf.ckpt")


@pytest.mark.parametrize("call", [load_checkpoint, open_model])
def test_offline(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    _hub(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(BidmError, match=r"no connection to the hub \(no route to host\)") as caught:
        call("hf://org/name")
    assert "\n" not in str(caught.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BidmError, match=r"bidm\[hub\]"):
        load_checkpoint("hf://org/name")


@pytest.mark.parametrize("name", ["hf://", "hf://name", "hf://a/b/c", "hf://../x", "hf://a/b c"])
def test_what_is_no_id(name: str) -> None:
    with pytest.raises(BidmError, match="no id of the hub"):
        downloaded(name)

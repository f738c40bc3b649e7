"""Argument structs, the sources' digest, workspaces of threads, and the imports of packed/cpu."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bidm_cli.networks.fusion import Fused, Prologue
from bidm_cli.packed.backends.numba import NumbaBackend
from bidm_cli.packed.cpu.codegen.isa import instruction_set
from bidm_cli.packed.cpu.runtime.args import OPTIONAL, args_dtype, record
from bidm_cli.packed.cpu.runtime.kernel_cache import SOURCES, sources_digest
from bidm_cli.packed.cpu.runtime.workspaces import WORKSPACES, Workspaces
from bidm_cli.recipe.spec import BinarySpec
from tests.helpers import layer_of, norm_of, random

ARGS = args_dtype(("x", np.int64), ("bias", OPTIONAL), ("eps", np.float32))


def test_a_record_has_zeros_only_where_its_struct_says_so() -> None:
    args = record(ARGS, {"x": 7, "eps": 0.5})
    assert args["x"] == 7 and args["eps"] == 0.5 and args["bias"] == 0 and args["counter"] == 0
    with pytest.raises(TypeError, match=r"missing \['x'\]"):
        record(ARGS, {"eps": 0.5})
    with pytest.raises(TypeError, match=r"unknown \['y'\]"):
        record(ARGS, {"x": 1, "eps": 0.5, "y": 2})


def test_calls_fill_in_all_their_fields_or_none() -> None:
    args = record(ARGS, {"eps": 0.5}, ("x", "bias"))
    call = args[["x", "bias"]]
    call[0] = (3, 4)
    assert args["x"] == 3 and args["bias"] == 4
    with pytest.raises(ValueError, match="tuple"):
        call[0] = (5,)


@pytest.mark.parametrize("room", ["codegen", "runtime", "ops"])
def test_a_changed_byte_anywhere_changes_the_digest(room: str, tmp_path: Path) -> None:
    """Else kernels compiled from old sources would be served."""
    copy = tmp_path / "cpu"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert sources_digest(copy) == sources_digest()
    for path in sorted((copy / room).glob("*.py")):
        text = path.read_bytes()
        path.write_bytes(text + b"\n")
        assert sources_digest.__wrapped__(copy) != sources_digest()
        path.write_bytes(text)


def test_workspaces_go_with_their_thread() -> None:
    layer = layer_of(nn.Conv2d(64, 96, 3, padding=1), BinarySpec()).tensors
    x, qkv = random((1, 64, 9, 9), 1), random((3, 1, 2, 11, 20), 2)
    kept: list[weakref.ref] = []

    def work() -> None:
        backend = NumbaBackend()
        backend.run(layer, x, Fused(Prologue(norm_of(8, 64), silu=True)))
        backend.attention(*qkv)
        backend.binary_attention(*qkv, torch.ones(2))
        for workspaces in (WORKSPACES, layer.prepared("plans", Workspaces)):
            kept.extend(weakref.ref(entry) for entry in workspaces._made.values())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    # Words, sums, norm, both attentions, queue, and the layer's plan; windows for a matrix unit.
    assert len(kept) == (8 if instruction_set() == "amx" else 7)
    assert all(entry() is None for entry in kept)


def test_the_entry_unused_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workspaces, "MOST", 2)
    workspaces = Workspaces()
    first = workspaces.get("a", lambda: [1])
    workspaces.get("b", lambda: [2])
    assert workspaces.get("a", lambda: [3]) is first
    workspaces.get("c", lambda: [4])
    assert workspaces.get("a", lambda: [5]) is first and workspaces.get("b", lambda: [6]) == [6]

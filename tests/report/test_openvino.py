"""``--against openvino``: the same network, its precisions, and clear refusals."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.recipe import Recipe
from bidm_cli.report.bench.models import paired
from bidm_cli.report.bench.openvino import PRECISIONS, _check, _inputs, openvino_engines
from bidm_cli.report.bench.result import BenchResult, Timing
from bidm_cli.report.bench.tables import engine_table, slower_notes
from bidm_cli.report.bench.timing import BenchOptions, bench
from tests.report.models import model_of

SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1],
    "attention_resolutions": [1],
}


def _needs_openvino() -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    pytest.importorskip("nncf", reason="the extra openvino is not installed")


def _output(call: object) -> torch.Tensor:
    return torch.from_numpy(next(iter(call().values())).copy())  # type: ignore[operator]


@pytest.mark.parametrize(
    "more", [{}, {"use_spatial_transformer": True, "context_dim": 8}, {"num_classes": 4}]
)
def test_every_precision_computes_the_float_network(more: dict[str, object]) -> None:
    _needs_openvino()
    model = model_of("ldm_unet", SMALL | more, (3, 8, 8))
    model.num_classes = more.get("num_classes")  # type: ignore[assignment]
    calls, left_out = openvino_engines(model, 2)
    assert calls.keys() | left_out.keys() == {f"OpenVINO {name}" for name in PRECISIONS}
    assert left_out.keys() <= {"OpenVINO bfloat16"}
    inputs = _inputs(model, 2)
    with torch.no_grad():
        expected = model.unet(inputs["x"], inputs["t"], inputs.get("context"), inputs.get("y"))
    limit = {"OpenVINO float32": 1e-4, "OpenVINO bfloat16": 0.1, "OpenVINO int8": 0.5}
    for name, call in calls.items():
        error = (_output(call) - expected).abs().max() / expected.abs().max()
        assert error < limit[name], name


def test_bench_has_a_number_for_each_engine(tiny_model: DiffusionModel) -> None:
    _needs_openvino()
    with paired(tiny_model, recipe=Recipe.load("w1a1"), backend="torch") as pair:
        result = bench(pair, BenchOptions(steps=0, rounds=2, layers=False, memory=False, against="openvino"))
    found = result.to_json()["engines"]
    assert {"OpenVINO float32", "OpenVINO int8"} <= set(found)
    for timing in found.values():
        assert timing["ratio"] == pytest.approx(timing["float_seconds"] / timing["packed_seconds"])
        assert timing["packed_seconds"] == result.step.packed_seconds, "measured in the same rounds"
    text, about = engine_table(result).to_text(), result.machine["engine"]
    assert "torch float32" in text and "OpenVINO int8" in text and about["openvino"] in text
    assert ("no arithmetic" in text) == ("OpenVINO bfloat16" in about["left_out"])
    assert set(found) | set(about["left_out"]) == {f"OpenVINO {name}" for name in PRECISIONS}
    assert result.to_json()["machine"]["engine"] == about


def test_a_graph_that_computes_something_else_is_refused(tiny_model: DiffusionModel) -> None:
    inputs = _inputs(tiny_model, 1)
    with torch.no_grad():
        output = tiny_model.unet(inputs["x"], inputs["t"], None, None).numpy()
    _check(lambda: {0: output}, tiny_model.unet, inputs)
    with pytest.raises(BidmError, match=r"differs from torch's by 0\.05"):
        _check(lambda: {0: output * 1.05}, tiny_model.unet, inputs)


def test_without_the_extra_the_way_to_it_is_said(
    tiny_model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("nncf", "openvino"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BidmError, match=r'not installed.*pip install "bidm\[openvino\]"'):
        openvino_engines(tiny_model, 1)


def test_a_network_that_openvino_cannot_convert() -> None:
    _needs_openvino()

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor, *others: object) -> torch.Tensor:
            return x + torch.linalg.eigh(x[0, 0] @ x[0, 0].T)[0].sum()

    model = model_of("ldm_unet", SMALL, (3, 8, 8))
    model.unet = Odd()
    with pytest.raises(BidmError, match="OpenVINO cannot"):
        openvino_engines(model, 1)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "its quantization was ended by SIGSEGV"),
        ("raise ValueError('no such layer')", "its quantization failed: ValueError: no such layer"),
        ("raise SystemExit(3)", "its quantization failed: no reason given"),
    ],
)
def test_a_quantization_that_fails_leaves_int8_out(
    program: str, reason: str, tiny_model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO 2026.4 ends with SIGSEGV on LSUN-Churches' network."""
    _needs_openvino()
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda words, **more: run([words[0], "-c", program], **more))
    calls, left_out = openvino_engines(tiny_model, 1)
    assert left_out["OpenVINO int8"] == reason and "OpenVINO int8" not in calls and calls


def test_a_faster_engine_is_named() -> None:
    quick, slow = Timing((1.0,), (2.0,), "OpenVINO int8"), Timing((3.0,), (2.0,), "contiguous")
    result = BenchResult(slow, None, 0, [], None, 1, engines={"OpenVINO int8": quick})
    assert slower_notes(result) == [
        "Packed is SLOWER than OpenVINO int8 here: one step takes 2 s against 1 s (0.50x)."
    ]

"""Sampling with captured steps: what one CUDA graph per batch shape has to get right, without a GPU.

Graphs are recorded and replayed by tests/packed/fake_graph.py, which refuses whatever waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.model import PackedModel
from bidm_cli.packed.precision import compute_in
from bidm_cli.packed.recording import denoiser as denoiser_module
from bidm_cli.packed.recording.cuda_graph import CudaRecorder
from bidm_cli.sampling.fixed_batch import split_in_batches
from bidm_cli.sampling.options import SamplingOptions
from bidm_cli.sampling.sample import Inputs, SamplingPlan, sample
from tests.packed.recording.fake_graph import fake_graphs
from tests.packed.recording.networks import CLASSES, LDM, NETWORKS, packed


@pytest.fixture
def classes(tmp_path: Path, cupy_on_cpu: None) -> PackedModel:
    """For 1x8x8, with labels and connections."""
    return packed(tmp_path, "ldm_unet", LDM, (1, 8, 8), **CLASSES)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> fake_graphs:
    """Lets models on the cupy backend record although they are on the CPU."""

    def recorder(model: PackedModel) -> CudaRecorder | None:
        return CudaRecorder(model.device) if model.backend == "cupy" else None

    monkeypatch.setattr(denoiser_module, "recorder_for", recorder)
    return fake_graphs(monkeypatch)


def drawn(model: PackedModel, n: int, steps: int = 2, size: int = 2, **options: Any) -> Tensor:
    """``n`` images in batches as on a GPU: the last one is smaller."""
    plan = SamplingPlan.settle(model, SamplingOptions(steps, **options))
    plan = dataclasses.replace(plan, fixed_batch_size=size)
    labels = None if model.num_classes is None else torch.arange(n) % 4
    inputs = Inputs(labels=labels).checked(model, n, steps)
    batches = split_in_batches(0, n, size, padded=False)
    return torch.cat([plan.run(batch, inputs) for batch in batches])


def unrecorded(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], Tensor]) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(denoiser_module, "recorder_for", lambda model: None)
        return draw()


@pytest.mark.parametrize("options", [{}, {"guidance": 2.0, "eta": 1.0}], ids=str)
def test_sampling_replays_and_is_the_same(
    classes: PackedModel, graphs: fake_graphs, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """A lane of 2 and one of 1: a first and a later step of each size, and of each pass, are recorded."""
    expected = unrecorded(monkeypatch, lambda: drawn(classes, 3, **options))
    assert torch.equal(drawn(classes, 3, **options), expected)
    passes = 2 if "guidance" in options else 1
    assert len(graphs.made) == passes * 2 * 2
    assert sum(graph.replays for graph in graphs.made) == passes * 2 * 2
    assert all(device == classes.device for device in graphs.devices)


def test_several_planes_replay_and_are_the_same(
    tmp_path: Path, cupy_on_cpu: None, graphs: fake_graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their scales are read back from the device before anything is recorded."""
    model = packed(tmp_path, "ldm_unet", LDM, (1, 8, 8), planes=2, **CLASSES)
    expected = unrecorded(monkeypatch, lambda: drawn(load_packed(model.path, backend="cupy"), 1))
    assert torch.equal(drawn(model, 1), expected)
    assert len(graphs.made) == 2


def test_the_next_sampling_replays_what_is_there(classes: PackedModel, graphs: fake_graphs) -> None:
    first = drawn(classes, 1)
    recorded = len(graphs.made)
    assert torch.equal(drawn(classes, 1), first) and len(graphs.made) == recorded


def test_each_pass_of_guidance_has_features_of_its_own(classes: PackedModel, graphs: fake_graphs) -> None:
    """In place: nothing is copied out and in between the passes."""
    drawn(classes, 1, guidance=2.0)
    conditional, unconditional = (denoiser._shapes for denoiser in classes.recorded)
    for a, b in zip(conditional.values(), unconditional.values(), strict=True):
        assert a.features.keys() == b.features.keys() != set()
        assert all(a.features[name].data_ptr() != b.features[name].data_ptr() for name in a.features)
        assert any(not torch.equal(a.features[name], b.features[name]) for name in a.features)


def test_what_moves_or_changes_records_anew(classes: PackedModel, graphs: fake_graphs) -> None:
    for change in (
        lambda: classes.to("cpu"),
        lambda: compute_in(classes, torch.float16),
    ):
        drawn(classes, 1, steps=1)
        assert classes.recorded
        change()
        assert not classes.recorded


def test_other_backends_are_not_recorded(
    classes: PackedModel, graphs: fake_graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_packed(classes.path, backend="torch")
    drawn(plain, 1)
    assert not graphs.made and not plain.recorded
    monkeypatch.undo()
    assert denoiser_module.recorder_for(plain) is None


def test_a_step_that_waits_is_said_and_run_without(
    classes: PackedModel, graphs: fake_graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a sampling: features of the steps before are kept."""
    expected = unrecorded(monkeypatch, lambda: drawn(classes, 2, size=1))
    kind = type(classes.unet.connections)
    interpolate = kind.interpolate

    def waiting(connections: Any, new: Tensor, *others: Tensor) -> Tensor:
        float(new.sum())
        return interpolate(connections, new, *others)

    monkeypatch.setattr(kind, "interpolate", waiting)
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CUDA graph") as said:
        found = drawn(classes, 2, size=1)
    assert torch.equal(found, expected)
    assert len(said) == 1 and "\n" not in str(said[0].message)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("kind", NETWORKS)
def test_no_network_waits_in_a_step(
    kind: str, dtype: torch.dtype | None, tmp_path: Path, cupy_on_cpu: None, graphs: fake_graphs
) -> None:
    """And all of them run in half precision."""
    arguments, shape, more = NETWORKS[kind]
    model = packed(tmp_path, kind, arguments, shape, **more)
    if dtype is not None:
        compute_in(model, dtype)
    found = drawn(model, 1)
    assert torch.isfinite(found).all() and len(graphs.made) == 2


@pytest.fixture
def on_gpu(tmp_path: Path) -> PackedModel:
    from cupy_kernels.cuda import why_not

    if why_not():
        pytest.skip(why_not())
    return packed(tmp_path, "ldm_unet", LDM, (1, 8, 8), device="cuda", **CLASSES)


def test_a_gpu_draws_the_same_with_and_without(on_gpu: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> Tensor:
        return sample(on_gpu, n=3, steps=4, labels=[0, 1, 2], guidance=2.0, batch_size=2)

    expected = unrecorded(monkeypatch, draw)
    for _ in range(2):
        torch.testing.assert_close(draw(), expected, rtol=1e-3, atol=1e-3)
    assert len(on_gpu.recorded) == 2 and not any(denoiser._plain for denoiser in on_gpu.recorded)


def test_a_gpu_is_not_waited_for(on_gpu: PackedModel) -> None:
    x, t = torch.zeros(2, 1, 8, 8, device="cuda"), torch.full((2,), 500, device="cuda")
    y, memory = torch.zeros(2, dtype=torch.long, device="cuda"), {}
    with torch.no_grad():
        on_gpu.denoise(x, t, None, y, memory)  # compiles, and reads |s| back once
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_gpu.denoise(x, t, None, y, memory)
        finally:
            torch.cuda.set_sync_debug_mode("default")

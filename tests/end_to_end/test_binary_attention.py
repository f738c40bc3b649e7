"""A recipe with binary attention scores, from a checkpoint with several heads to images and a report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from bidm_cli.packed.format.read import load_packed


def test_compress_sample_report(bidm, shared, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    original = shared / "checkpoints" / "guided_diffusion" / "ema_0.9999_000010.pt"
    words = ["compress", original, "--recipe", "w1a1-attention", "--synthetic", "--batch-size", 2,
             "--run-dir", "run", "-o", "x.bidm"]  # fmt: skip
    done = bidm(*words, "--steps", 2, "--lr", 0.05)
    assert done.code == 0, done.err
    assert "binary attention scores" in done.out
    packed = load_packed("x.bidm")
    scales = [t for name, t in packed.unet.named_buffers() if name.endswith("score_scale")]
    assert scales and all(scale.numel() > 0 and bool(scale.isfinite().all()) for scale in scales)
    assert any(not torch.equal(scale, torch.ones_like(scale)) for scale in scales), "they are trained"

    for backend in ("numba", "torch"):
        out = tmp_path / backend
        drawn = bidm("sample", "x.bidm", "-n", 2, "--steps", 2, "--label", "3", "--raw", "--out", out,
                     "--backend", backend)  # fmt: skip
        assert drawn.code == 0, drawn.err
    found, expected = (np.load(tmp_path / name / "samples.npy") for name in ("numba", "torch"))
    assert np.isfinite(found).all() and np.abs(found - expected).max() < 0.5

    report = bidm("report", "x.bidm", "--layers", "--json", "r.json")
    assert report.code == 0, report.err
    assert "binary scores" in report.out
    shown = bidm("inspect", "x.bidm")
    assert f"the scores of {len(scales)} attentions" in shown.out
    kinds = {row["kind"] for row in json.loads(Path("r.json").read_text())["models"][0]["other_parts"]}
    assert "binary scores" in kinds

"""``bidm sample --precision``: half precision for what stays float."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bidm_cli
from bidm_cli.errors import BidmError
from bidm_cli.packed.model import _without_tf32
from bidm_cli.packed.precision import use_precision
from tests.kernels.test_recorded_steps import LDM, packed

DEMO = Path(bidm_cli.__file__).parent / "demo"
UNCONDITIONAL = {name: value for name, value in LDM.items() if name != "num_classes"}


@pytest.fixture(params=[1, 2], ids=["one plane", "two planes"])
def drawn(
    request: pytest.FixtureRequest,
    bidm: Callable[..., Any],
    tmp_path: Path,
    cupy_on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """One image of a packed file, in the folder ``out``."""
    packed(tmp_path, "ldm_unet", UNCONDITIONAL, (1, 8, 8), planes=request.param)
    monkeypatch.setattr("bidm_cli.sampling.sample.fixed_batch_size", lambda *given: 1)
    common = ("--device", "cpu", "-n", 1, "--steps", 2, "--raw")
    return lambda *more: bidm("sample", tmp_path / "m.bidm", *common, *more)


def test_half_precision_is_asked_for(drawn: Callable[..., Any], tmp_path: Path) -> None:
    images, out = {}, tmp_path / "out"
    for precision in ("float32", "bfloat16"):
        called = drawn("--backend", "cupy", "--precision", precision, "--out", out, "--overwrite")
        assert called.code == 0, called.err
        images[precision] = np.load(out / "samples.npy")
    assert 0 < np.abs(images["float32"] - images["bfloat16"]).max() < 2
    assert json.loads((out / "sample.json").read_text())["settings"]["precision"] == "bfloat16"
    refused = drawn("--backend", "cupy", "--out", out)
    assert refused.code == 1 and "made with precision bfloat16" in refused.err


def test_other_backends_say_what_it_takes(drawn: Callable[..., Any]) -> None:
    called = drawn("--backend", "torch", "--precision", "float16")
    assert called.code == 1 and "--precision float16 is for the cupy backend" in called.err
    assert called.err.count("\n") == 1


def test_originals_have_no_such_choice() -> None:
    model = bidm_cli.load_checkpoint(DEMO / "digits.pth", config=DEMO / "digits.yml")
    with pytest.raises(BidmError, match="for packed files"):
        use_precision(model, "float16")
    use_precision(model, "float32")
    assert all(p.dtype == torch.float32 for p in model.unet.parameters())


def test_float32_is_not_tf32_on_a_gpu() -> None:
    """And the user's own setting comes back, after an error, too."""
    before = torch.backends.cudnn.allow_tf32
    with _without_tf32(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32 == before
    with pytest.raises(ZeroDivisionError), _without_tf32(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
        raise ZeroDivisionError
    assert torch.backends.cudnn.allow_tf32 == before

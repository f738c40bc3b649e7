"""The whole packed network of the bundled digits checkpoint, step by step, against the CPU backends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bidm_cli
from bidm_cli.binary.surgery import binarize
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.packed.choose import _backend, choose_backend
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.model import PackedModel
from bidm_cli.packed.precision import compute_in
from bidm_cli.packed.recording.denoiser import RecordedDenoiser
from bidm_cli.recipe import Recipe
from bidm_cli.report.sign_flips import count_sign_flips
from tests.helpers import with_planes
from tests.kernels.conftest import HostBackend
from tests.packed.recording.test_denoiser import Recorder

DEMO = Path(bidm_cli.__file__).parent / "demo"


def packed_digits(folder: Path, planes: int) -> Path:
    """The teacher's weights binarized: right in every shape, not in its images."""
    checkpoint = load_checkpoint(DEMO / "digits.pth", config=DEMO / "digits.yml")
    recipe = with_planes(Recipe.load("bidm"), planes)
    binarize(checkpoint.unet, recipe, checkpoint.schedule.timesteps)
    write_packed(folder / "digits.bidm", *pack_model(checkpoint, recipe.to_json()))
    return folder / "digits.bidm"


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_digits(tmp_path_factory.mktemp("digits"), planes=1)


@pytest.fixture(scope="module", params=[1, 2], ids=["one plane", "two planes"])
def file_of_planes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_digits(tmp_path_factory.mktemp("digits"), planes=request.param)


def inputs(images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(images, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([700, 30])[:images]


def launched(model: PackedModel) -> list[str]:
    return choose_backend("cupy", "cpu").launcher(model.device).launched  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("other", "capability", "kernel"),
    [("torch", 75, "conv_popc"), ("torch", 90, "conv_bmma"), ("numba", 90, "conv_bmma")],
)
def test_one_step_agrees(
    file_of_planes: Path,
    other: str,
    capability: int,
    kernel: str,
    cupy_on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HostBackend, "options", {"capability": capability})
    reference, model = (load_packed(file_of_planes, backend=name) for name in (other, "cupy"))
    flips = count_sign_flips(reference, model, *inputs())
    binary = [record for record in model.layers if record.kind == "binary"]
    assert flips.signs > 100_000 and len(flips.by_layer) == len(binary)
    assert flips.rate < 1e-4
    assert flips.output_error < (1e-2 if flips.flipped else 1e-5)
    assert launched(model).count(kernel) == len(binary)
    assert "norm_pack" in launched(model)


def test_both_schedules_give_the_same_bits(
    file_of_planes: Path, cupy_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_packed(file_of_planes, backend="cupy")
    outputs = []
    for schedule in (0, 1):
        monkeypatch.setattr(HostBackend, "options", {"schedule": schedule})
        _backend.cache_clear()
        outputs.append(model.denoise(*inputs()))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_half_precision_for_what_stays_float(
    file_of_planes: Path, dtype: torch.dtype, cupy_on_cpu: None
) -> None:
    """Rounding flips a few signs, and every flip more of them in the next layers; the first see none."""
    exact, half = (load_packed(file_of_planes, backend="cupy") for _ in range(2))
    compute_in(half, dtype)
    flips = count_sign_flips(exact, half, *inputs())
    flipped, signs = flips.by_layer["down.0.block.0.conv1"]
    assert flipped <= 2e-3 * signs
    assert 0 < flips.rate < 0.2
    expected, found = (model.denoise(*inputs()) for model in (exact, half))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() / expected.norm() < 0.5
    with pytest.raises(ValueError, match="already computes in"):
        compute_in(half, dtype)


def test_recorded_steps_carry_features(packed_file: Path, cupy_on_cpu: None) -> None:
    """Three steps of a sampler with connections, as a CUDA device would replay them."""
    model = load_packed(packed_file, backend="cupy")

    denoise = RecordedDenoiser(model, Recorder())
    x, _ = inputs()
    own: dict[str, torch.Tensor] = {}
    recorded: dict[str, torch.Tensor] = {}
    for step in (700, 680, 660):
        t = torch.full((2,), step)
        expected = model.denoise(x, t, carried=own)
        assert torch.equal(denoise(x, t, carried=recorded), expected)
    assert own.keys() == recorded.keys() != set()


def test_float_layers_keep_the_channels_last(packed_file: Path, cupy_on_cpu: None) -> None:
    model = load_packed(packed_file, backend="cupy")
    weight = model.unet.conv_out.weight  # conv_in has one channel: any layout is every layout
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    seen = []
    model.unet.up[0].block[0].register_forward_hook(lambda module, given, out: seen.append(out))
    memory: dict[str, torch.Tensor] = {}
    for _ in range(2):  # with the connections' blend
        model.denoise(*inputs(), carried=memory)
    assert memory and all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)

"""The cupy backend against the torch backend, layer by layer, with what surrounds a layer in a network."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from bidm_cli.errors import BidmError
from bidm_cli.networks.fusion import Fused, Prologue
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed import choose
from bidm_cli.packed.backends.cupy import CupyBackend
from bidm_cli.packed.backends.torch import TorchBackend
from bidm_cli.packed.format.bits import pack_bits, weight_words
from bidm_cli.packed.layers import PackedLayer
from bidm_cli.recipe.spec import BinarySpec
from cupy_kernels.compiler import CompileError
from tests import small_ops
from tests.helpers import layer_of
from tests.kernels.checks import random
from tests.kernels.host_launcher import HostLauncher, available
from tests.kernels.machines import Machine
from tests.small_ops import CudaOps

REFERENCE = TorchBackend()
FULL = BinarySpec()
BARE = BinarySpec("binary", "none", "none", "none", "none")
LAYERS = {
    "same width": (nn.Conv2d(64, 64, 3, padding=1), FULL, (2, 64, 8, 8)),
    "odd widths": (nn.Conv2d(37, 50, 3, padding=1), FULL, (2, 37, 5, 7)),
    "narrower": (nn.Conv2d(96, 64, 3, padding=1), FULL, (1, 96, 6, 6)),
    "stride 2": (nn.Conv2d(32, 32, 3, stride=2, padding=1), FULL, (2, 32, 7, 8)),
    "growing": (nn.Conv2d(32, 32, 1, padding=2), FULL, (2, 32, 3, 3)),
    "shortcut conv": (nn.Conv2d(32, 48, 3, padding=1), BinarySpec(shortcut="conv"), (2, 32, 5, 5)),
    "xnor": (
        nn.Conv2d(32, 48, 3, padding=1, bias=False),
        BinarySpec("binary", "layer", "fixed", "none", "none"),
        (1, 32, 5, 5),
    ),
    "bare": (nn.Conv2d(32, 48, 3), BARE, (1, 32, 5, 5)),
    "weights only": (nn.Conv2d(32, 48, 3), BinarySpec("float", shortcut="none"), (1, 32, 5, 5)),
    "conv1d": (nn.Conv1d(64, 192, 1), BinarySpec(activation_scale="none", shortcut="none"), (2, 64, 16)),
    "conv1d stride 2": (nn.Conv1d(40, 40, 3, stride=2, padding=1), FULL, (2, 40, 9)),
    "linear": (nn.Linear(128, 65), FULL, (3, 128)),
    "linear tokens": (nn.Linear(40, 80), FULL, (2, 9, 40)),
}


def assert_close(found: Tensor, expected: Tensor, relative: float = 2e-6) -> None:
    assert found.shape == expected.shape
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.cpu().float(), expected, rtol=0, atol=relative * largest)


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize(("original", "spec", "shape"), LAYERS.values(), ids=LAYERS)
def test_whole_layers(
    any_machine: Machine, original: nn.Module, spec: BinarySpec, shape: tuple[int, ...], planes: int
) -> None:
    if spec.activations == "binary":
        spec = dataclasses.replace(spec, planes=planes)
    layer = layer_of(original, spec)
    x = random(*shape, seed=7)
    expected, signs = REFERENCE.run(layer.tensors, x), REFERENCE.signs(layer.tensors, x)
    backend, tensors = CupyBackend(any_machine.launcher), layer.to(any_machine.device).tensors
    (x,) = any_machine.put(x)
    assert_close(backend.run(tensors, x), expected)
    if spec.activations == "binary":
        assert torch.equal(backend.signs(tensors, x).cpu(), signs)


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_whole_layers_run_in_kernels(name: str, planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in torch, to which the backend could fall back unseen."""
    if not available():
        pytest.skip("no g++ here")
    original, spec, shape = LAYERS[name]
    if spec.activations == "float":
        return

    def torch_instead(*given: object) -> None:
        raise AssertionError("run by torch")

    monkeypatch.setattr(TorchBackend, "run", torch_instead)
    monkeypatch.setattr(TorchBackend, "signs", torch_instead)
    launcher = HostLauncher()
    layer = layer_of(original, dataclasses.replace(spec, planes=planes))
    CupyBackend(launcher).run(layer.tensors, random(*shape, seed=7))
    assert launcher.launched == ["pack", "conv_bmma"]


def surrounded(layer: PackedLayer, x: Tensor, film: bool) -> tuple[Prologue, Tensor, Tensor]:
    """A prologue, an offset and a residual for a layer."""
    n, c, o = x.shape[0], layer.geometry.in_channels, layer.geometry.out_channels
    norm = nn.GroupNorm(8, c).requires_grad_(False)
    norm.weight.add_(0.1 * random(c, seed=1))
    norm.bias.add_(0.1 * random(c, seed=2))
    scale, shift = (random(n, c, seed=s) * 0.1 for s in (3, 4))
    prologue = Prologue(norm, True, scale, shift) if film else Prologue(norm, True)
    return prologue, random(n, o, seed=5), random(*REFERENCE.run(layer.tensors, x).shape, seed=6)


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize(
    ("name", "planes"),
    [
        *((name, 1) for name in ("same width", "narrower", "stride 2", "conv1d", "weights only")),
        *(("same width", 2), ("stride 2", 3), ("conv1d", 2)),
    ],
)
def test_prologue_offset_and_residual(any_machine: Machine, name: str, planes: int, film: bool) -> None:
    original, spec, shape = LAYERS[name]
    spec = dataclasses.replace(spec, planes=planes)
    layer, x = layer_of(original, spec), random(*shape, seed=7)
    prologue, offset, residual = surrounded(layer, x, film)
    expected = REFERENCE.run(layer.tensors, x, Fused(prologue, 1, offset, residual))
    signs = REFERENCE.signs(layer.tensors, x, Fused(prologue))

    backend, device = CupyBackend(any_machine.launcher), any_machine.device
    layer, prologue = layer.to(device), prologue._replace(norm=prologue.norm.to(device))
    if prologue.scale is not None and prologue.shift is not None:
        scale, shift = any_machine.put(prologue.scale, prologue.shift)
        prologue = prologue._replace(scale=scale, shift=shift)
    x, offset, residual = any_machine.put(x, offset, residual)
    flipped = (backend.signs(layer.tensors, x, Fused(prologue)).cpu() != signs).sum()
    assert flipped == 0, "pick another seed: a value lies too close to its threshold to compare results"
    assert_close(backend.run(layer.tensors, x, Fused(prologue, 1, offset, residual)), expected)
    assert_close(backend.normalize(x, prologue).cpu(), REFERENCE.normalize(x.cpu(), _on_cpu(prologue)))


def _on_cpu(prologue: Prologue) -> Prologue:
    tensors = (None if t is None else t.cpu() for t in (prologue.scale, prologue.shift))
    return Prologue(prologue.norm.cpu(), prologue.silu, *tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "planes"),
    [
        *((name, 1) for name in ("same width", "shortcut conv", "weights only", "linear tokens")),
        *(("same width", 2), ("shortcut conv", 3), ("linear tokens", 2)),
    ],
)
def test_other_types_of_activations(any_machine: Machine, name: str, planes: int, dtype: torch.dtype) -> None:
    """The result has the input's type, and is the float32 result of the same input, rounded."""
    original, spec, shape = LAYERS[name]
    spec = dataclasses.replace(spec, planes=planes)
    layer, x = layer_of(original, spec), random(*shape, seed=7).to(dtype)
    expected = REFERENCE.run(layer.tensors, x.float())
    found = CupyBackend(any_machine.launcher).run(layer.to(any_machine.device).tensors, *any_machine.put(x))
    assert found.dtype == dtype
    assert_close(found, expected, {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype])


def test_the_small_operations(any_machine: Machine) -> None:
    ops = CudaOps(any_machine.launcher)
    x, threshold = random(2, 5, 4, 45, seed=1), random(45, seed=2)
    expected, sums = small_ops.REFERENCE.binarize_pack(x, threshold)
    words, found_sums = ops.binarize_pack(*any_machine.put(x, threshold))
    assert torch.equal(words.cpu(), expected)
    torch.testing.assert_close(found_sums.cpu(), sums)
    geometry = LayerGeometry("conv2d", 45, 20, (3, 3), (2, 2), (0, 1, 0, 1))
    weights = weight_words(pack_bits(random(20, 45, 3, 3, seed=3)), geometry)
    integers = ops.binary_conv2d(words, *any_machine.put(weights), geometry)
    assert torch.equal(integers.cpu(), small_ops.REFERENCE.binary_conv2d(expected, weights, geometry))
    rows = weight_words(pack_bits(random(20, 45, seed=4)), LayerGeometry("linear", 45, 20))[:, 0]
    found = ops.binary_linear(words, *any_machine.put(rows), 45)
    assert torch.equal(found.cpu(), small_ops.REFERENCE.binary_linear(expected, rows, 45))


def test_results_stay_channels_last(any_machine: Machine) -> None:
    """So that no layer of a network has to be copied into another layout."""
    layer = layer_of(*LAYERS["same width"][:2]).to(any_machine.device)
    (x,) = any_machine.put(random(2, 64, 8, 8).contiguous(memory_format=torch.channels_last))
    found = CupyBackend(any_machine.launcher).run(layer.tensors, x)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_a_kernel_that_cannot_be_compiled_is_one_clear_line() -> None:
    class Broken:
        capability, multiprocessors, shared_memory = 90, 1, 99 * 1024

        def launch(self, *args: object, **kwargs: object) -> None:
            raise CompileError("NVRTC cannot be loaded\nmore")

    layer = layer_of(*LAYERS["same width"][:2])
    with pytest.raises(BidmError) as caught:
        CupyBackend(Broken()).run(layer.tensors, random(1, 64, 4, 4))
    assert "\n" not in str(caught.value) and "`backend` torch" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_why() -> None:
    with pytest.raises(BidmError, match="the cupy backend cannot run here: it is for CUDA devices"):
        choose.resolve("cupy", "cpu")
    with pytest.raises(BidmError, match=r"cannot run here: (cupy is not installed|torch sees no NVIDIA GPU)"):
        choose.resolve("cupy", "cuda")
    assert choose.resolve("auto", "cuda") == "torch"


def test_what_is_said_of_kernels(any_machine: Machine) -> None:
    geometry = LayerGeometry("conv2d", 224, 224, (3, 3), (1, 1), (1, 1, 1, 1))
    backend = CupyBackend(any_machine.launcher)
    assert "filters per block" in backend.kernel(geometry)
    # Of two planes a block's registers hold fewer filters.
    assert backend.kernel(geometry, planes=2) != backend.kernel(geometry)

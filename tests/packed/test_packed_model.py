from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bidm_cli.binary import functional
from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.binary.sign import sign
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.container import network_bytes, read_packed, write_packed
from bidm_cli.packed.format.quantized import to_storage
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.layers import PackedLayer, RunsOnBackend
from bidm_cli.packed.model import PackedModel
from bidm_cli.recipe import Recipe

RECIPES = ["bidm", "w1a1", "w1a2", "reference", "xnor", "w1a32"]


def packed(model: DiffusionModel, recipe: str, folder: Path, backend: str = "torch") -> PackedModel:
    metadata, tensors = pack_model(model, Recipe.load(recipe).to_json(), {"seed": 3}, {"steps": 5})
    write_packed(folder / "m.bidm", metadata, tensors)
    return load_packed(folder / "m.bidm", backend=backend)


class RoundedScale:
    """alpha as it is stored, in place of the trainable layer's own."""

    def __init__(self, layer: BinaryLayer) -> None:
        scale = layer.weight_scale()
        self.value = None if scale is None else to_storage(scale, torch.float16).float()

    def __call__(self) -> torch.Tensor | None:
        return self.value


def rounded(model: DiffusionModel) -> DiffusionModel:
    """The student with every stored number rounded to float16, as it is evaluated from the file."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.unet.modules():
            if isinstance(module, BinaryLayer):
                module.weight_scale = RoundedScale(module)
        for name, parameter in model.unet.named_parameters():
            owner = model.unet.get_submodule(name.rpartition(".")[0])
            if not (isinstance(owner, BinaryLayer) and name.endswith(".weight")):
                parameter.copy_(to_storage(parameter, torch.float16).float())
        for _, buffer in model.unet.named_buffers():
            buffer.copy_(to_storage(buffer, torch.float16).float())
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_torch_backend_is_the_trained_student_bit_for_bit(
    recipe: str, student: Callable[..., DiffusionModel], tmp_path: Path
) -> None:
    model = student(recipe)
    opened = packed(model, recipe, tmp_path)
    trained = rounded(model)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([999, 500, 0])
    with torch.no_grad():
        assert torch.equal(opened.denoise(x, t), trained.denoise(x, t))
        memory, expected_memory = {}, {}
        for step in (900, 880, 860):
            t = torch.full((3,), step)
            assert torch.equal(
                opened.denoise(x, t, carried=memory), trained.denoise(x, t, carried=expected_memory)
            )
        assert memory.keys() == expected_memory.keys()


def test_each_layer_computes_the_formula(student: Callable[..., DiffusionModel], tmp_path: Path) -> None:
    """D * K * alpha + bias + |s| P(I), written out once more for one convolution."""
    opened = packed(student(), "bidm", tmp_path)
    layer = opened.unet.get_submodule("down.0.block.0.conv1")
    x = torch.randn(2, 32, 8, 8)
    from bidm_cli.packed.format.bits import unpack_bits

    signs = unpack_bits(layer.weight_bits, layer.geometry)
    dot = torch.nn.functional.conv2d(sign(x + layer.threshold[:, None, None]), signs, padding=1)
    scale = torch.nn.functional.conv2d(
        x.abs().mean(1, keepdim=True), layer.scale_filter[None, None], padding=1
    )
    expected = dot * scale * layer.weight_scale[:, None, None] + layer.bias[:, None, None]
    expected = expected + layer.shortcut_scale.abs() * functional.tile_channels(x, 32)
    assert torch.equal(layer(x), expected)


def test_what_a_packed_model_knows(student: Callable[..., DiffusionModel], tmp_path: Path) -> None:
    model = student()
    opened = packed(model, "bidm", tmp_path)
    assert opened.metadata() == model.metadata()
    assert opened.provenance == {"seed": 3} and opened.training == {"steps": 5}
    assert opened.recipe["name"] == "bidm" and opened.backend == "torch"
    assert opened.path == tmp_path / "m.bidm"
    binary = [record for record in opened.layers if record.kind == "binary"]
    assert [r.name for r in binary] == [
        n for n, m in opened.unet.named_modules() if isinstance(m, PackedLayer)
    ]
    assert torch.equal(opened.schedule.alphas_cumprod, model.schedule.alphas_cumprod)
    floats = sum(p.numel() * 4 for p in model.unet.parameters())
    assert network_bytes(read_packed(opened.path)[1]) * 10 < floats


def test_numbers_too_large_for_float16_keep_float32(
    student: Callable[..., DiffusionModel], tmp_path: Path
) -> None:
    model = student()
    with torch.no_grad():
        model.unet.norm_out.weight[0] = 1e6
    opened = packed(model, "bidm", tmp_path)
    assert opened.unet.norm_out.weight[0] == 1e6
    assert to_storage(torch.ones(2), torch.float16).dtype == torch.float16


def test_a_diverged_model_is_refused(student: Callable[..., DiffusionModel]) -> None:
    model = student()
    with torch.no_grad():
        model.unet.norm_out.weight[0] = float("nan")
    with pytest.raises(BidmError, match="norm_out"):
        pack_model(model, {})


def test_copies_and_moves_of_a_model_still_run(
    student: Callable[..., DiffusionModel], tmp_path: Path
) -> None:
    opened = packed(student(), "bidm", tmp_path, backend="auto")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 20])
    expected = opened.denoise(x, t)
    twin, thawed = copy.deepcopy(opened), pickle.loads(pickle.dumps(opened))
    del opened
    for copied in (twin, thawed):
        assert torch.equal(copied.denoise(x, t), expected)
        bound = [module for module in copied.unet.modules() if isinstance(module, RunsOnBackend)]
        assert bound and all(module.backend is copied.bound_backend for module in bound)
    assert torch.equal(twin.to("cpu").denoise(x, t), expected)


@pytest.mark.parametrize("part", ["architecture", "schedule", "convention", "connections"])
def test_a_description_that_makes_no_sense_is_one_clear_error(
    part: str, student: Callable[..., DiffusionModel], tmp_path: Path
) -> None:
    metadata, tensors = pack_model(student(), {})
    for nonsense in (3, {"kind": "none"}, [1]):
        write_packed(tmp_path / "m.bidm", {**metadata, part: nonsense}, tensors)
        with pytest.raises(BidmError) as caught:
            load_packed(tmp_path / "m.bidm")
        assert "\n" not in str(caught.value) and "m.bidm" in str(caught.value)


@pytest.mark.parametrize("backend", ["cupy", "nonsense"])
def test_a_backend_that_cannot_run_is_one_clear_error(
    backend: str, student: Callable[..., DiffusionModel], tmp_path: Path
) -> None:
    with pytest.raises(BidmError, match=backend):
        packed(student(), "bidm", tmp_path, backend=backend)

"""Half-precision weights stay as they are until the network is used, and then give float32's results."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.binary.surgery import binarize
from bidm_cli.networks.registry import build
from bidm_cli.networks.stored_precision import in_float32, keep_until_used
from bidm_cli.recipe import Recipe

UNET = {
    "kind": "ddpm_unet",
    "args": {
        "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
        "attention_levels": [1],
    },
}  # fmt: skip
STAGE = {
    "kind": "vq_first_stage",
    "args": {
        "in_channels": 3, "out_channels": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
        "attention_levels": [], "z_channels": 4, "embed_dim": 4, "n_embed": 16,
    },
}  # fmt: skip


def pair(dtype: torch.dtype = torch.float16) -> tuple[nn.Module, nn.Module]:
    """(a network whose weights are still of ``dtype``, the same one in float32 from the start)."""
    torch.manual_seed(0)
    network = build(UNET).to(dtype)
    return keep_until_used(network), copy.deepcopy(network).float()


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


def dtypes(network: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in network.parameters()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_first_call_converts_and_gives_what_float32_gives(dtype: torch.dtype) -> None:
    stored, plain = pair(dtype)
    assert dtypes(stored) == {dtype}
    before = list(stored.parameters())
    with torch.no_grad():
        assert torch.equal(stored(*inputs()), plain(*inputs()))
    assert dtypes(stored) == {torch.float32}
    assert all(now is then for now, then in zip(stored.parameters(), before, strict=True))
    assert not any(module._forward_pre_hooks for module in stored.modules())


def test_a_single_float32_weight_does_not_hide_the_others() -> None:
    stored, plain = pair()
    stored.get_submodule("conv_in").float()
    assert torch.equal(stored(*inputs()), plain(*inputs()))


def test_float32_networks_get_no_hooks() -> None:
    network = keep_until_used(build(UNET))
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_copy_converts_itself_alone() -> None:
    stored, plain = pair()
    copied = copy.deepcopy(stored)
    assert torch.equal(copied(*inputs()), plain(*inputs()))
    assert dtypes(copied) == {torch.float32} and dtypes(stored) == {torch.float16}


def test_a_part_that_is_called_alone_converts_itself() -> None:
    stored, plain = pair()
    x = inputs()[0]
    assert torch.equal(stored.get_submodule("conv_in")(x), plain.get_submodule("conv_in")(x))
    assert torch.equal(stored(*inputs()), plain(*inputs()))


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_first_stages_convert_in_their_methods(method: str) -> None:
    torch.manual_seed(0)
    stored = build(STAGE).half()
    plain = copy.deepcopy(stored).float()
    keep_until_used(stored)
    x = torch.randn(1, 3 if method == "encode" else 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(getattr(stored, method)(x), getattr(plain, method)(x))


def test_the_state_dict_is_float32_and_takes_float32() -> None:
    stored, plain = pair()
    wanted = plain.state_dict()
    found = stored.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    stored, _ = pair()
    third = {name: value + 1e-5 for name, value in wanted.items()}
    stored.load_state_dict(third)
    assert all(torch.equal(value, third[name]) for name, value in stored.state_dict().items())


def test_weights_converted_in_inference_mode_can_be_trained() -> None:
    stored, plain = pair()
    with torch.inference_mode():
        stored(*inputs())
    stored(*inputs()).square().mean().backward()
    plain(*inputs()).square().mean().backward()
    name = "conv_in.weight"
    assert torch.equal(stored.get_parameter(name).grad, plain.get_parameter(name).grad)  # type: ignore[arg-type]


def test_half_precision_on_purpose() -> None:
    stored, _ = pair()
    in_float32(stored).bfloat16()
    x, t = inputs()
    assert stored(x.bfloat16(), t).dtype == torch.bfloat16


def _hook_free(network: nn.Module) -> bool:
    return not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("use", [lambda n: n.float(), lambda n: n.to("cpu")])
def test_moving_changes_nothing_in_the_results(use: Callable[[nn.Module], nn.Module]) -> None:
    stored, plain = pair()
    assert torch.equal(use(stored)(*inputs()), plain(*inputs()))
    assert _hook_free(stored)


def test_surgery_starts_from_float32() -> None:
    stored, plain = pair()
    recipe = Recipe.load("w1a1")
    binarize(stored, recipe, 1000)
    binarize(plain, recipe, 1000)
    assert any(isinstance(module, BinaryLayer) for module in stored.modules())
    assert dtypes(stored) == {torch.float32}
    assert torch.equal(stored(*inputs()), plain(*inputs()))

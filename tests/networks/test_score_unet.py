"""The score-based U-Net against the DDPM U-Net, which it is without attention, and by its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidm_cli.networks.ddpm_unet import DDPMUNet
from bidm_cli.networks.layers import role_of
from bidm_cli.networks.score_unet import (
    FilteredDownsample,
    ResnetBlock,
    ScoreUNet,
    filtered_double,
    filtered_half,
)

ARGUMENTS: dict[str, Any] = {
    "in_channels": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 2,
    "attention_levels": [1],
    "kind": "biggan",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "DDPM++": {"skip_rescale": True},
    "NCSN++": {"skip_rescale": True, "fir": True, "input_pyramid": True},
    "pyramid without filter": {"input_pyramid": True},
    "DDPM": {"kind": "ddpm", "norm_groups": 32},
    "DDPM without convolutions": {"kind": "ddpm", "norm_groups": 32, "resamp_with_conv": False},
    "one level": {"ch_mult": [2], "attention_levels": [0]},
}


def _network(**more: Any) -> ScoreUNet:
    torch.manual_seed(0)
    return ScoreUNet(**{**ARGUMENTS, **more}).eval()


@torch.no_grad()
def test_without_attention_in_the_decoder_it_is_the_ddpm_unet() -> None:
    shape = {**ARGUMENTS, "attention_levels": []}
    network = _network(kind="ddpm", norm_groups=32, attention_levels=[])
    del shape["kind"]
    other = DDPMUNet(**shape, out_channels=3).eval()
    # Both hold the same layers in the order of execution, but DDPM's decoder has its finest level first.
    up = {name: value for name, value in other.state_dict().items() if name.startswith("up.")}
    before = [v for n, v in other.state_dict().items() if n.startswith(("temb.", "conv_in.", "down."))]
    middle = [v for n, v in other.state_dict().items() if n.startswith("mid.")]
    after = [v for n, v in other.state_dict().items() if n.startswith(("norm_out.", "conv_out."))]
    decoder = [v for level in (2, 1, 0) for n, v in up.items() if n.startswith(f"up.{level}.")]
    values = [*before, *middle, *decoder, *after]
    names = list(network.state_dict())
    network.load_state_dict(dict(zip(names, values, strict=True)))
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    torch.testing.assert_close(network(x, t), other(x, t), rtol=1e-4, atol=1e-5)


def _upfirdn(x: Tensor, up: int, down: int, pad: tuple[int, int], gain: float) -> Tensor:
    """StyleGAN2's upfirdn2d by its definition: zeros between and around, filter, every ``down``-th value."""
    n, c, height, width = x.shape
    spread = torch.zeros(n, c, height * up, width * up, dtype=x.dtype)
    spread[:, :, ::up, ::up] = x
    padded = F.pad(spread, (*pad, *pad))
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    rows = sum(tap * padded[:, :, i : padded.shape[2] - 3 + i] for i, tap in enumerate(taps))
    both = sum(tap * rows[:, :, :, i : padded.shape[3] - 3 + i] for i, tap in enumerate(taps))  # type: ignore
    return gain * both[:, :, ::down, ::down]  # type: ignore[index]


def test_the_binomial_filter_by_its_definition() -> None:
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(filtered_half(x), _upfirdn(x, 1, 2, (1, 1), 1.0))
    torch.testing.assert_close(filtered_double(x), _upfirdn(x, 2, 1, (2, 1), 4.0))
    layer = FilteredDownsample(3, 5, role="resample").double()
    wanted = layer.Conv2d_0(_upfirdn(x, 1, 1, (2, 2), 1.0))
    torch.testing.assert_close(layer(x), wanted)
    assert wanted.shape == (2, 5, 3, 4)


@torch.no_grad()
def test_a_block_that_resamples_rescales_its_sum() -> None:
    torch.manual_seed(0)
    block = ResnetBlock(16, 16, 8, kind="biggan", groups=None, resample="down", rescale=True).eval()
    x, embedding = torch.randn(2, 16, 4, 4), torch.randn(2, 8)
    h = F.silu(F.group_norm(x, 4, block.GroupNorm_0.weight, block.GroupNorm_0.bias, 1e-6))
    h = block.Conv_0(F.avg_pool2d(h, 2)) + block.Dense_0(F.silu(embedding))[..., None, None]
    h = F.silu(F.group_norm(h, 4, block.GroupNorm_1.weight, block.GroupNorm_1.bias, 1e-6))
    shortcut = block.get_submodule("Conv_2")(F.avg_pool2d(x, 2))
    torch.testing.assert_close(block(x, embedding), (shortcut + block.Conv_1(h)) / 2**0.5)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_feature_points_and_roles(variant: str) -> None:
    network = _network(**VARIANTS[variant])
    seen: list[str] = []
    for block in network.blocks():
        network.get_submodule(block.name).register_forward_hook(
            lambda module, args, out, name=block.name: seen.append(name)
        )
    assert network(torch.randn(1, 3, 16, 16), torch.tensor([5])).shape == (1, 3, 16, 16)
    assert seen == [block.name for block in network.blocks()]
    stages = [block.stage for block in network.blocks()]
    assert stages == sorted(stages, key=["encoder", "middle", "decoder"].index)
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert "other" not in {role_of(layer) for layer in layers}


def test_one_attention_after_a_level_of_the_decoder() -> None:
    network = _network(ch_mult=[1, 2], num_res_blocks=1)
    kinds = [type(layer).__name__ for layer in network.all_modules]
    assert kinds[3:12] == [
        "ResnetBlock", "ResnetBlock", "ResnetBlock", "AttnBlock",  # level 0, down, level 1
        "ResnetBlock", "AttnBlock", "ResnetBlock",  # middle
        "ResnetBlock", "ResnetBlock",
    ]  # fmt: skip
    assert kinds[12:] == ["AttnBlock", "ResnetBlock", "ResnetBlock", "ResnetBlock", "GroupNorm", "Conv2d"]

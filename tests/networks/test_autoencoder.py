from __future__ import annotations

from typing import Any

import pytest
import torch

from bidm_cli.networks.autoencoder import Codebook, KLFirstStage, VQFirstStage

SMALL: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_levels": [1],
    "z_channels": 4,
    "embed_dim": 3,
}


def test_codebook_takes_the_nearest_code() -> None:
    torch.manual_seed(0)
    book = Codebook(50, 3)
    # More positions than are searched in one piece.
    z = torch.randn(2, 3, 50, 50)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 3).double()
    nearest = torch.cdist(flat, book.embedding.weight.detach().double()).argmin(dim=1)
    expected = book.embedding.weight[nearest].reshape(2, 50, 50, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(book(z), expected)


@torch.no_grad()
def test_vq_rounds_only_when_decoding() -> None:
    torch.manual_seed(0)
    first_stage = VQFirstStage(n_embed=16, **SMALL).eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    z = first_stage.encode(images)
    assert z.shape == (1, 3, 8, 8)
    assert not torch.equal(z, first_stage.quantize(z))
    torch.testing.assert_close(first_stage.decode(z), first_stage.decode(first_stage.quantize(z)))
    assert first_stage.decode(z).shape == images.shape


@torch.no_grad()
def test_kl_encodes_to_the_mean() -> None:
    torch.manual_seed(0)
    first_stage = KLFirstStage(**SMALL).eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    moments = first_stage.quant_conv(first_stage.encoder(images))
    assert moments.shape == (1, 6, 8, 8)
    torch.testing.assert_close(first_stage.encode(images), moments[:, :3])
    assert first_stage.decode(moments[:, :3]).shape == images.shape


@pytest.mark.parametrize(
    "option", [{"resamp_with_conv": False}, {"mid_attention": False}, {"tanh_out": True}]
)
@torch.no_grad()
def test_options(option: dict[str, bool]) -> None:
    torch.manual_seed(0)
    first_stage = KLFirstStage(**{**SMALL, "attention_levels": []}, **option).eval()
    names = first_stage.state_dict().keys()
    assert any(".downsample.conv." in name for name in names) == option.get("resamp_with_conv", True)
    assert any(".attn_1." in name for name in names) == option.get("mid_attention", True)
    out = first_stage.decode(torch.randn(1, 3, 8, 8) * 1e3)
    assert out.shape == (1, 3, 16, 16)
    assert bool((out.abs() <= 1).all()) == option.get("tanh_out", False)

"""Decoding in tiles: the same pictures where a decoder sees no further than the overlap."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bidm_cli.sampling import tiles
from bidm_cli.sampling.tiles import OVERLAP, SIDE, in_tiles, starts


def local(z: Tensor) -> Tensor:
    """Upsampling by 2 with a 5x5 window; exact but at borders, where it sees zeros."""
    window = torch.arange(1, 26, dtype=z.dtype).reshape(1, 1, 5, 5) / 325
    return F.conv2d(F.interpolate(z, scale_factor=2.0, mode="nearest"), window, padding=2)


@pytest.mark.filterwarnings("ignore:latents of")
@pytest.mark.parametrize(("height", "width"), [(129, 128), (96, 300), (250, 97), (20, 1000)])
def test_large_latents(height, width):
    z = torch.rand(1, 1, height, width, dtype=torch.float64) * 2 - 1
    sizes: list[tuple[int, ...]] = []

    def noting(part: Tensor) -> Tensor:
        sizes.append(tuple(part.shape[2:]))
        return local(part)

    with pytest.warns(UserWarning, match=f"latents of {height}x{width} are decoded in overlapping tiles"):
        found = in_tiles(noting, z)
    whole = local(z)
    assert len(sizes) > 1 and all(h <= SIDE and w <= SIDE for h, w in sizes)
    # Only the two pixels at a tile's border see zeros in place of what is beyond; their weights are small.
    assert found.shape == whole.shape and float((found - whole).abs().max()) < 0.06
    constant = in_tiles(lambda part: torch.ones(1, 3, 4 * part.shape[2], 4 * part.shape[3]), z)
    torch.testing.assert_close(constant, torch.ones(1, 3, 4 * height, 4 * width))


def test_latents_up_to_the_limit_are_decoded_at_once():
    z = torch.randn(2, 1, 128, 128)
    assert torch.equal(in_tiles(local, z), local(z))


@pytest.mark.parametrize("size", [1, 95, 96, 97, 160, 176, 177, 500, 1000])
def test_tiles_cover_all_and_overlap(size):
    found = starts(size)
    assert found[0] == 0 and found[-1] + min(SIDE, size) == size
    assert all(0 < b - a <= SIDE - OVERLAP for a, b in itertools.pairwise(found))


@pytest.mark.filterwarnings("ignore:latents of")
def test_sampling_decodes_so(monkeypatch, tmp_path):
    from bidm_cli.sampling.images import decode
    from tests.packed.format.test_first_stage import latent_model

    model, z = latent_model(), torch.randn(2, 4, 8, 8)
    whole = decode(model, z)
    monkeypatch.setattr(tiles, "LARGEST", 63)
    monkeypatch.setattr(tiles, "SIDE", 6)
    monkeypatch.setattr(tiles, "OVERLAP", 2)
    parts = decode(model, z)
    assert parts.shape == whole.shape and (parts != whole).any(), "norms see one tile"

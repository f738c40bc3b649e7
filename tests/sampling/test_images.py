import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.errors import BidmError
from bidm_cli.sampling.images import (
    decode,
    grid,
    is_decodable,
    read_png,
    to_uint8,
    write_npz,
    write_png,
)


def test_floats_become_bytes_as_the_families_round():
    values = torch.tensor([-2.0, -1.0, 0.0, 1 / 127.5 * 0.6, 1.0, 3.0, float("nan"), float("inf")])
    images = values.reshape(1, 1, 2, 4)
    assert to_uint8(images).flatten().tolist() == [0, 0, 128, 128, 255, 255, 0, 255]
    assert to_uint8(images, "truncate").flatten().tolist() == [0, 0, 127, 128, 255, 255, 0, 255]


@pytest.mark.parametrize(
    ("family", "rounding"),
    [("ldm", "truncate"), ("openai", "truncate"), ("ddpm", "nearest"), ("lucidrains", "nearest")],
)
def test_files_that_do_not_say_the_rounding_have_their_familys(family: str, rounding: str) -> None:
    convention = SamplingConvention.from_json({"spacing": "ldm"}, family)
    assert convention.rounding == rounding and "rounding" not in convention.to_json(family)
    other = SamplingConvention.from_json({**convention.to_json(family), "rounding": "nearest"}, family)
    assert other.rounding == "nearest"
    assert SamplingConvention.from_json(other.to_json(family), family) == other


def test_every_byte_survives_the_round_trip():
    exact = torch.arange(256.0).reshape(1, 1, 16, 16) / 127.5 - 1
    assert to_uint8(exact).flatten().tolist() == list(range(256))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (8, 5, channels), dtype=np.uint8)
    write_png(tmp_path / "new" / "000000.png", image)
    assert np.array_equal(read_png(tmp_path / "new" / "000000.png"), image)
    with Image.open(tmp_path / "new" / "000000.png") as png:
        assert png.mode == ("L" if channels == 1 else "RGB")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["000000.png"]


def test_a_broken_png_is_named(tmp_path):
    (tmp_path / "000000.png").write_bytes(b"no image")
    with pytest.raises(BidmError, match=r"000000\.png"):
        read_png(tmp_path / "000000.png")


def test_small_images_are_enlarged_in_the_grid():
    images = np.full((5, 8, 8, 1), 100, dtype=np.uint8)
    images[4, 0, 0] = 200
    sheet = grid(images)
    assert sheet.shape == (2 * 64 + 8, 3 * 64 + 2 * 8, 1)
    assert (sheet[72:80, 72:80] == 200).all() and sheet[80, 72] == 100
    assert not sheet[64:72].any() and not sheet[72:, 144:].any()
    assert grid(np.zeros((4, 64, 64, 3), dtype=np.uint8)).shape == (130, 130, 3)
    assert grid(np.zeros((1, 100, 90, 3), dtype=np.uint8)).shape == (100, 90, 3)


def test_npz_is_adms_layout_and_the_same_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    for name in ("a.npz", "b.npz"):
        write_npz(tmp_path / name, images, [3, 1, 2])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], images) and arrays["arr_1"].tolist() == [3, 1, 2]
    write_npz(tmp_path / "a.npz", images)
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays.files == ["arr_0"]


def test_latents_without_a_first_stage_make_no_images(small):
    assert is_decodable(small)
    small.sample_shape = (4, 8, 8)
    assert not is_decodable(small)
    with pytest.raises(BidmError, match="`raw`"):
        decode(small, torch.zeros(2, 4, 8, 8))


def test_images_are_decoded_one_at_a_time(small):
    class Decoder(nn.Module):
        def decode(self, z):
            assert len(z) == 1
            return z.repeat(1, 3, 2, 2)

    small.first_stage, small.scale_factor = Decoder(), 2.0
    images = decode(small, torch.ones(3, 1, 8, 8))
    assert images.shape == (3, 16, 16, 3) and (images == round(1.5 * 127.5)).all()

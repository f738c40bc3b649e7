"""Conditioning channels made of images, masks and segmentation maps, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.data.concat import channels_from, concat_kind
from bidm_cli.diffusion.condition import Condition
from bidm_cli.errors import BidmError
from tests.end_to_end.conditioned import checkpoint


@pytest.fixture
def opened(tmp_path):
    return lambda kind: load_checkpoint(checkpoint(kind, tmp_path / "original"))


def save(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


def random_pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_small_image_is_in_unit_range(opened, tmp_path):
    model, pixels = opened("super-resolution"), random_pixels(8, 8, 3)
    notes: list[str] = []
    found = channels_from(model, save(tmp_path / "a.png", pixels), None, notes)
    wanted = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(found, wanted)
    assert concat_kind(model) == "image" and "1 low-resolution images" in notes[0]


def test_openais_upsamplers_enlarge_bilinearly(opened, tmp_path):
    pixels = random_pixels(4, 4, 3)
    found = channels_from(opened("openai"), save(tmp_path / "a.png", pixels), None, [])
    small = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(found, torch.nn.functional.interpolate(small, (8, 8), mode="bilinear"))


@pytest.mark.parametrize("kind", ["inpainting", "text inpainting"])
def test_inpainting_masks_encodes_and_joins_as_the_family_does(opened, tmp_path, kind):
    model, pixels = opened(kind), random_pixels(16, 16, 3)
    model.scale_factor = 0.5
    hole = np.zeros((16, 16), np.uint8)
    hole[2:9, 5:] = 128
    image, mask = save(tmp_path / "a.png", pixels), save(tmp_path / "m.png", hole)
    found = channels_from(model, image, mask, [])[0]
    unit = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    inside = torch.from_numpy(hole >= 128)
    if kind == "inpainting":  # LDM: zero the hole in [0, 1], then everything to [-1, 1]
        code = model.first_stage.encode((unit * ~inside * 2 - 1)[None])[0]
        wanted = torch.cat([code, inside[None, ::2, ::2] * 2.0 - 1])
    else:  # Stable Diffusion: zero the hole in [-1, 1]; the mask first
        code = model.first_stage.encode(((unit * 2 - 1) * ~inside)[None])[0] * 0.5
        wanted = torch.cat([inside[None, ::2, ::2].float(), code])
    torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(BidmError, match="give `mask`"):
        channels_from(model, image, None, [])
    with pytest.raises(BidmError, match="2 images, `condition` 1"):
        masks = np.stack([hole, hole])
        channels_from(model, image, torch.from_numpy(masks), [])


def test_segmentation_maps_go_through_the_models_rescaler(opened, tmp_path):
    model = opened("semantic")
    maps = np.random.default_rng(0).integers(0, 5, (2, 16, 16))
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(maps), 5).permute(0, 3, 1, 2).float()
    halved = torch.nn.functional.avg_pool2d(one_hot, 2)  # bilinear at half size is the mean of four
    mapper = model.conditioner.channel_mapper.weight.detach()
    wanted = torch.nn.functional.conv2d(halved, mapper)
    np.save(tmp_path / "maps.npy", maps)
    for source in (tmp_path / "maps.npy", one_hot):
        torch.testing.assert_close(channels_from(model, source, None, []), wanted)
    (tmp_path / "maps").mkdir()
    for i, numbers in enumerate(maps.astype(np.uint8)):
        save(tmp_path / "maps" / f"{i}.png", numbers)
    torch.testing.assert_close(channels_from(model, tmp_path / "maps", None, []), wanted)


def test_depth_maps_are_brought_to_the_latents_size_and_stretched(opened, tmp_path):
    model = opened("depth")
    maps = 7 + 90 * torch.rand(2, 1, 24, 16)
    found = channels_from(model, maps, None, [])
    small = torch.nn.functional.interpolate(maps, (8, 8), mode="bicubic", align_corners=False)
    lowest, highest = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, 2 * (small - lowest) / (highest - lowest) - 1)
    gray = random_pixels(24, 16)
    from_image = channels_from(model, save(tmp_path / "d.png", gray), None, [])
    torch.testing.assert_close(
        from_image, channels_from(model, torch.from_numpy(gray)[None, None].float(), None, [])
    )
    with pytest.raises(BidmError, match="one depth everywhere"):
        channels_from(model, torch.ones(1, 1, 9, 9), None, [])


def test_upscalers_add_the_noise_of_the_level_that_the_label_says(opened):
    model = opened("upscaler")
    assert (model.num_classes, concat_kind(model)) == (40, "image")
    small, levels = torch.rand(3, 3, 8, 8) * 2 - 1, torch.tensor([0, 30, 30])
    rows = Condition(context=torch.randn(3, 5, 24), concat=small)
    given = model.make_condition(levels, rows)
    betas = torch.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2  # what LDM calls linear
    kept = torch.cumprod(1 - betas, dim=0)[levels].reshape(3, 1, 1, 1)
    noise = (given.concat - kept.sqrt() * small) / (1 - kept).sqrt()
    torch.testing.assert_close(noise[1], noise[2], atol=1e-4, rtol=1e-4)
    assert abs(float(noise[:2].mean())) < 0.2 and 0.8 < float(noise[:2].std()) < 1.2
    assert torch.equal(given.y, levels)
    alone = model.make_condition(levels[1:2], Condition(context=rows.context[1:2], concat=small[1:2]))
    torch.testing.assert_close(alone.concat, given.concat[1:2])
    model.null_context = torch.zeros(1, 5, 24)
    assert torch.equal(model.unconditional(given).concat, given.concat)


@pytest.mark.parametrize(
    "kind, source, words",
    [
        ("semantic", np.full((1, 16, 16), 5), "classes 5 to 5; the model knows 0 to 4"),
        ("semantic", np.zeros((1, 8, 8), np.int64), r"segmentation maps \[16, 16\]"),
        ("super-resolution", np.zeros((1, 4, 8, 8), np.float32), r"\[n, 3, 8, 8\], or images"),
        ("text", np.zeros((1, 4, 8, 8), np.float32), "leave out `condition`"),
    ],
)
def test_what_does_not_fit_is_one_line(opened, kind, source, words):
    with pytest.raises(BidmError, match=words) as caught:
        channels_from(opened(kind), torch.from_numpy(source), None, [])
    assert "\n" not in str(caught.value)


def test_ready_made_channels_are_taken_as_they_are(opened):
    ready = torch.randn(2, 5, 8, 8)
    model = opened("inpainting")
    assert torch.equal(channels_from(model, ready, None, []), ready)
    with pytest.raises(BidmError, match="leave out `mask`"):
        channels_from(model, ready, torch.zeros(16, 16, dtype=torch.uint8), [])

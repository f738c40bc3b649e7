"""Training data: pixels, crops, labels, and samples of the teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bidm_cli.data.concat import image_shape
from bidm_cli.distill.data import SyntheticData
from bidm_cli.distill.image_data import ImageData
from bidm_cli.errors import BidmError
from bidm_cli.sampling.sample import sample


def test_images_reach_the_network_as_pixels_in_one(teacher, tmp_path):
    pixels = np.zeros((3, 8, 8), np.uint8)
    pixels[1], pixels[2] = 255, 51
    np.savez(tmp_path / "x.npz", images=pixels)
    data = ImageData(teacher, tmp_path / "x.npz")
    x0, given = data.batch(torch.tensor([0, 1, 2, 1]), torch.Generator())
    assert given.y is None and x0.shape == (4, 1, 8, 8)
    assert [v.item() for v in x0.mean(dim=(1, 2, 3))] == pytest.approx([-1, 1, -0.6, 1])


def test_other_sizes_are_cropped_in_the_middle_and_resized(teacher, tmp_path):
    wide = np.zeros((1, 16, 32, 3), np.uint8)
    wide[:, :, 8:24] = 255
    np.savez(tmp_path / "x.npz", images=wide)
    x0, _ = ImageData(teacher, tmp_path / "x.npz").batch(torch.tensor([0]), torch.Generator())
    assert x0.shape == (1, 1, 8, 8) and x0.min() == 1


def test_missing_data_is_one_clear_line(teacher, tmp_path):
    with pytest.raises(BidmError):
        ImageData(teacher, tmp_path / "nothing")


def test_labels_must_be_there_and_fit(teacher, images, tmp_path):
    teacher.num_classes = 3
    with pytest.raises(BidmError, match="no labels"):
        ImageData(teacher, images)
    pixels = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "y.npz", images=pixels, labels=np.array([0, 1, 2, 3]))
    with pytest.raises(BidmError, match="3 classes"):
        ImageData(teacher, tmp_path / "y.npz")
    np.savez(tmp_path / "z.npz", images=pixels, labels=np.array([0, 1, 2, 2]))
    given = ImageData(teacher, tmp_path / "z.npz").batch(torch.tensor([3, 1]), torch.Generator())[1]
    assert given.y.tolist() == [2, 1]


def test_synthetic_data_is_what_the_teacher_samples_and_is_drawn_once(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(SyntheticData, "PIECE", 4)
    data = SyntheticData(teacher, tmp_path, count=6, steps=3, seed=7)
    expected = sample(teacher, n=6, steps=3, seed=7)
    assert torch.equal(data.batch(torch.arange(6), torch.Generator())[0], expected)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.npy")}
    again = SyntheticData(teacher, tmp_path, count=6, steps=3, seed=7)
    assert torch.equal(again.x0, data.x0)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.npy")} == stamps


def test_image_shape_of_a_pixel_model(teacher):
    assert image_shape(teacher) == (1, 8, 8)

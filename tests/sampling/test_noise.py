import pytest
import torch

from bidm_cli.errors import BidmError
from bidm_cli.sampling.noise import ImageNoise


def test_an_images_noise_is_its_own():
    together = ImageNoise(5, [0, 1, 2], (1, 4, 4), "cpu")
    alone = ImageNoise(5, [2], (1, 4, 4), "cpu")
    for _ in range(3):
        assert torch.equal(together.draw()[2:], alone.draw())


def test_no_two_images_or_seeds_share_noise():
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (2**32, 1), (0, 2**32), (2**32 + 1, 0)]
    drawn = [ImageNoise(seed, [number], (1, 2, 2), "cpu").draw() for seed, number in pairs]
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == len(pairs)


def test_it_is_standard_normal_and_never_changes():
    noise = ImageNoise(0, range(64), (1, 16, 16), "cpu").draw()
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    first = ImageNoise(0, [0], (1, 1, 4), "cpu").draw().flatten()
    torch.testing.assert_close(first, torch.tensor(FIRST))


def test_a_negative_seed_is_refused():
    with pytest.raises(BidmError, match="seed"):
        ImageNoise(-1, [0], (1, 2, 2), "cpu")


FIRST = [0.09606295824050903, 0.27457600831985474, 1.4646127223968506, 1.3001806735992432]

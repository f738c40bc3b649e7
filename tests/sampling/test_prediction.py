import pytest
import torch

from bidm_cli.sampling.prediction import Clipping, estimate

A = 0.37


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    eps = torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)
    x = A**0.5 * x0 + (1 - A) ** 0.5 * eps
    return x0, eps, x, {"epsilon": eps, "x0": x0, "v": A**0.5 * eps - (1 - A) ** 0.5 * x0}


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_every_prediction_gives_both_image_and_noise(parts, prediction):
    x0, eps, x, outputs = parts
    found = estimate(prediction, x, outputs[prediction], A)
    torch.testing.assert_close(found.x0, x0)
    torch.testing.assert_close(found.eps, eps)
    assert found.variance is None


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_clipping_keeps_or_rederives_the_noise(parts, prediction):
    x0, eps, x, outputs = parts
    kept = estimate(prediction, x, outputs[prediction], A, "keep_eps")
    torch.testing.assert_close(kept.x0, x0.clamp(-1, 1))
    torch.testing.assert_close(kept.eps, eps)
    rederived = estimate(prediction, x, outputs[prediction], A, "rederive")
    torch.testing.assert_close(A**0.5 * rederived.x0 + (1 - A) ** 0.5 * rederived.eps, x)
    assert rederived.x0.abs().max() <= 1 and (rederived.eps - eps).abs().max() > 0.1


def test_a_learned_variance_is_taken_off(parts):
    _, eps, x, _ = parts
    found = estimate("epsilon", x, torch.cat([eps, eps + 7], dim=1), A)
    torch.testing.assert_close(found.eps, eps)
    torch.testing.assert_close(found.variance, eps + 7)


def test_limits():
    x0 = torch.tensor([-3.0, -0.5, 0.5, 2.0]).reshape(1, 1, 2, 2)
    assert Clipping().clip(x0).flatten().tolist() == [-1.0, -0.5, 0.5, 1.0]
    assert Clipping(clip_range=2.5).clip(x0).flatten().tolist() == [-2.5, -0.5, 0.5, 2.0]


def test_dynamic_thresholding_divides_by_each_images_own_limit():
    """arXiv 2205.11487: clip to the quantile s of |x0| if it is above 1, and divide by s."""
    x0 = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 0.1, 0.2, 0.3, 0.4]]).reshape(2, 1, 1, 5)
    found = Clipping(threshold_quantile=0.75, threshold_max=10.0).clip(x0)
    expected = torch.tensor([[0.0, 1 / 3, 2 / 3, 1.0, 1.0], [0.0, 0.1, 0.2, 0.3, 0.4]])
    torch.testing.assert_close(found.reshape(2, 5), expected)
    found = Clipping(threshold_quantile=0.75, threshold_max=2.0).clip(x0)
    torch.testing.assert_close(found[0].flatten(), torch.tensor([0.0, 0.5, 1.0, 1.0, 1.0]))

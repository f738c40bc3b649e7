import pytest
import torch

from bidm_cli.sampling.prediction import estimate

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

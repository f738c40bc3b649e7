"""Noise schedules in float32, as code that works in it throughout has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bidm_cli.diffusion.schedule import NoiseSchedule

KINDS = {
    "linear": NoiseSchedule.linear(50, 1e-4, 0.02),
    "scaled_linear": NoiseSchedule.scaled_linear(50, 1e-4, 0.02),
    "cosine": NoiseSchedule.cosine(50),
    "explicit": NoiseSchedule.explicit(torch.linspace(0.99, 0.1, 50, dtype=torch.float64)),
    "explicit in float32": NoiseSchedule.explicit(torch.linspace(0.99, 0.1, 50)),
}


def test_betas_their_complements_and_products_are_rounded() -> None:
    expected, product = [], 1.0
    for beta in torch.linspace(1e-4, 0.02, 1000).numpy():
        product *= float(np.float32(1.0) - beta)  # torch's cumprod accumulates in float64
        expected.append(float(np.float32(product)))
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    assert schedule.single_precision().tolist() == expected
    assert schedule.alphas_cumprod.tolist() != expected


@pytest.mark.parametrize("kind", KINDS)
def test_about_the_same_as_in_float64(kind: str) -> None:
    found = KINDS[kind].single_precision()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), KINDS[kind].alphas_cumprod, atol=1e-6, rtol=0)


def test_what_was_made_in_float32_stays_as_it_is() -> None:
    values = torch.linspace(0.99, 0.1, 50)
    assert torch.equal(NoiseSchedule.explicit(values).single_precision(), values)

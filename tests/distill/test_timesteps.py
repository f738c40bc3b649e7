"""Timesteps of training: distribution, range, and what the default leaves as it was."""

import pytest
import torch

from bidm_cli.distill.timesteps import training_timesteps


def _drawn(power: float, n: int = 200_000, timesteps: int = 1000) -> torch.Tensor:
    return training_timesteps(n, timesteps, power, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.4, 0.9])
def test_share_of_timesteps_below_a_bound(power, share):
    below = (_drawn(power) < share * 1000).float().mean().item()
    assert below == pytest.approx(1 - (1 - share) ** power, abs=0.005)


@pytest.mark.parametrize("timesteps", [1, 7, 1000])
def test_every_timestep_is_in_range_and_reached(timesteps):
    for power in (1.0, 1.3):
        found = _drawn(power, 500_000, timesteps)
        assert found.dtype == torch.int64
        assert set(found.tolist()) == set(range(timesteps))


def test_uniform_timesteps_are_those_of_earlier_versions():
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(_drawn(1.0, 64), torch.randint(1000, (64,), generator=generator))

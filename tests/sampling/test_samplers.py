import math

import pytest
import torch

from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.errors import BidmError
from bidm_cli.sampling.options import SamplingOptions
from bidm_cli.sampling.prediction import Estimate
from bidm_cli.sampling.sample import SamplingPlan, sample
from bidm_cli.sampling.samplers.ancestral import Ancestral
from bidm_cli.sampling.timesteps import Step, sampling_steps


def ode_error(model, steps, sampler):
    """Largest distance from the exact solution of the probability-flow ODE at the sampler's own end."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    plan = SamplingPlan.settle(model, SamplingOptions(steps, sampler))
    exact = model.unet.solution(x, plan.steps[0].alpha_bar, plan.steps[-1].alpha_bar_next)
    return (sample(model, steps=steps, sampler=sampler, x_t=x) - exact).abs().max().item()


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_ddim_converges_to_the_ode_with_order_one(gaussian, prediction):
    model = gaussian(prediction=prediction)
    coarse, fine = ode_error(model, 125, "ddim"), ode_error(model, 1000, "ddim")
    assert fine < 0.006
    assert 6 < coarse / fine < 9


@pytest.mark.parametrize("convention", [{}, {"spacing": "ldm", "final_alpha": "first"}], ids=str)
def test_dpm_solver_converges_with_order_two(gaussian, convention):
    model = gaussian(**convention)
    coarse, fine = ode_error(model, 25, "dpm++"), ode_error(model, 50, "dpm++")
    assert fine < 0.015 and coarse / fine > 4
    assert fine < ode_error(model, 50, "ddim") / 5


def test_the_first_and_last_dpm_steps_are_ddim_steps(gaussian):
    model = gaussian()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for steps in (1, 2):
        torch.testing.assert_close(
            sample(model, steps=steps, sampler="dpm++", x_t=x), sample(model, steps=steps, x_t=x)
        )
    three = [sample(model, steps=4, sampler=name, x_t=x) for name in ("dpm++", "ddim")]
    assert (three[0] - three[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddim"},
        {"sampler": "ddim", "eta": 1.0},
        {"sampler": "ddim", "eta": 0.5},
        {"sampler": "ddpm"},
        {"sampler": "dpm++", "steps": 50},
    ],
    ids=str,
)
def test_every_sampler_gives_the_datas_mean_and_deviation(gaussian, options):
    images = sample(gaussian(mean=0.4, deviation=0.3), n=64, **{"steps": 250, **options})
    assert images.mean().item() == pytest.approx(0.4, abs=0.02)
    assert images.std().item() == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("steps", [1000, 20])
def test_ddim_with_eta_one_is_ancestral_sampling(gaussian, steps):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    noises = torch.randn(steps, 2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    common = {"steps": steps, "x_t": x, "noises": list(noises)}
    ddim = sample(gaussian(), eta=1.0, **common)
    torch.testing.assert_close(sample(gaussian(), sampler="ddpm", **common), ddim, rtol=0, atol=2e-5)


def ancestral(steps, variance, **convention):
    return Ancestral(steps, SamplingConvention(variance=variance, **convention))


def test_the_variance_kinds(gaussian):
    model = gaussian()
    steps = sampling_steps(model.schedule, model.convention, 10)
    x = torch.randn(1, 1, 8, 8)
    learned = torch.zeros_like(x)  # halfway between both logs
    spread = {}
    for kind in ("small", "large", "ddim_noisy", "learned_range"):
        found = Estimate(x, x, learned)
        advanced = [
            ancestral(steps, kind).advance(4, x, found, lambda z=z: z * torch.ones_like(x)) for z in (0, 1)
        ]
        spread[kind] = (advanced[1] - advanced[0]).mean().item()
    beta = 1 - steps[4].alpha_bar / steps[4].alpha_bar_next
    posterior = beta * (1 - steps[4].alpha_bar_next) / (1 - steps[4].alpha_bar)
    assert spread["small"] == pytest.approx(math.sqrt(posterior), rel=1e-4)
    assert spread["large"] == spread["ddim_noisy"] == pytest.approx(math.sqrt(beta), rel=1e-4)
    assert spread["learned_range"] == pytest.approx((beta * posterior) ** 0.25, rel=1e-4)
    with pytest.raises(BidmError, match="variance"):
        ancestral(steps, "learned_range").advance(4, x, Estimate(x, x), lambda: x)


def test_the_last_ancestral_step_adds_no_noise():
    x = torch.randn(1, 1, 4, 4)
    rule = ancestral([Step(5, 0.5, 0.9)], "large")
    moved = [rule.advance(0, x, Estimate(x, x), lambda z=z: z * torch.ones_like(x)) for z in (0.0, 1.0)]
    assert torch.equal(*moved)


def test_diffusers_adds_noise_after_the_last_step_but_from_0():
    x = torch.randn(1, 1, 4, 4)
    for t, same in ((5, False), (0, True)):
        rule = ancestral([Step(t, 0.5, 1.0)], "large", noise_at_end=True)
        moved = [rule.advance(0, x, Estimate(x, x), lambda z=z: z * torch.ones_like(x)) for z in (0.0, 1.0)]
        assert torch.equal(*moved) == same
        assert same or torch.allclose(moved[1] - moved[0], torch.full_like(x, 0.5**0.5))

import math

import numpy as np
import pytest

from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.sampling.timesteps import ancestral_convention, sampling_steps

LDM = SamplingConvention(spacing="ldm", final_alpha="first")
DDIM = SamplingConvention(spacing="ddim")
SCHEDULE = NoiseSchedule.linear(1000, 1e-4, 0.02)


def visited(convention, steps, schedule=SCHEDULE, skip="uniform"):
    """Timesteps in rising order, as the originals list them."""
    return [step.t for step in sampling_steps(schedule, convention, steps, skip)][::-1]


@pytest.mark.parametrize("name", ["ldm_unconditional_vq4", "ldm_class_conditional"])
def test_ldm_lists_are_the_originals(reference, name):
    ref = reference(name)
    schedule = NoiseSchedule.scaled_linear(1000, 0.0015, 0.0195)
    steps = sampling_steps(schedule, LDM, 10)[::-1]
    assert [step.t for step in steps] == ref["ddim10_timesteps"].tolist()
    after = [step.alpha_bar_next for step in steps]
    np.testing.assert_allclose(after, ref["ddim10_alphas_prev"], rtol=2e-6)


def test_ermongroup_quad_list_is_the_originals(reference):
    assert visited(DDIM, 10, skip="quad") == reference("ddpm_ermongroup")["ddim10quad_seq"].tolist()


def test_openai_lists_are_the_originals(reference):
    ref = reference("guided_diffusion")
    schedule = NoiseSchedule.cosine(1000)
    strided = SamplingConvention(spacing="openai_ddim")
    assert visited(strided, 5) == ref["map_ddim5"].tolist()
    assert visited(ancestral_convention(strided), 5) == ref["map_5"].tolist()
    for convention, betas in ((strided, "betas_ddim5"), (ancestral_convention(strided), "betas_5")):
        steps = sampling_steps(schedule, convention, 5)[::-1]
        found = [1 - step.alpha_bar / step.alpha_bar_next for step in steps]
        np.testing.assert_allclose(found, ref[betas], rtol=1e-9)


def test_diffusers_leading_is_the_original(reference):
    ref = reference("diffusers_ldm_vq")
    convention = SamplingConvention(spacing="leading", steps_offset=1, final_alpha="first")
    assert visited(convention, 10)[::-1] == ref["ddim10_timesteps"].tolist()
    assert sampling_steps(SCHEDULE, convention, 10) == sampling_steps(SCHEDULE, LDM, 10)


def test_dit_list_is_the_original(reference):
    assert visited(SamplingConvention(spacing="openai_ddim"), 5) == reference("dit")["map"].tolist()


def test_diffusers_trailing_and_linspace():
    assert visited(SamplingConvention(spacing="trailing"), 10)[::-1] == list(range(999, 0, -100))
    assert visited(SamplingConvention(spacing="linspace"), 4) == [0, 333, 666, 999]
    last = sampling_steps(SCHEDULE, SamplingConvention(spacing="linspace"), 4)[0]
    assert last.alpha_bar_next == SCHEDULE.alphas_cumprod[999 - 250]


@pytest.mark.parametrize("steps", [*range(1, 1001, 7), 3, 9, 27, 36, 37, 101, 111, 251, 333, 501, 999, 1000])
def test_ldm_takes_every_count_that_the_original_trips_over(steps):
    found = visited(LDM, steps)
    assert found == sorted(set(found)) and found[-1] < 1000
    stride = 1000 // steps
    assert len(found) == math.ceil(1000 / stride) - (1 if stride == 1 else 0)


def test_each_step_ends_where_the_next_begins_and_the_last_at_the_final_alpha():
    for convention, final in ((LDM, float(SCHEDULE.alphas_cumprod[0])), (DDIM, 1.0)):
        steps = sampling_steps(SCHEDULE, convention, 17)
        assert [s.alpha_bar_next for s in steps[:-1]] == [s.alpha_bar for s in steps[1:]]
        assert steps[-1].alpha_bar_next == final
        assert steps[0].alpha_bar < steps[-1].alpha_bar


def test_ancestral_sampling_on_all_steps_visits_every_timestep():
    for spacing in ("ldm", "ddim", "openai", "openai_ddim", "leading"):
        convention = ancestral_convention(SamplingConvention(spacing=spacing, final_alpha="first"))
        assert visited(convention, 1000) == list(range(1000))
        assert sampling_steps(SCHEDULE, convention, 1000)[-1].alpha_bar_next == 1.0


@pytest.mark.parametrize("steps", [0, -1, 1001])
@pytest.mark.parametrize(
    "spacing", ["ldm", "ddim", "openai_ddim", "openai", "leading", "linspace", "trailing"]
)
def test_impossible_counts_are_refused(spacing, steps):
    with pytest.raises(BidmError, match="1 to 1000"):
        sampling_steps(SCHEDULE, SamplingConvention(spacing=spacing), steps)


def test_openai_says_which_counts_it_can_give():
    with pytest.raises(BidmError, match="`steps` 250 or 334"):
        sampling_steps(SCHEDULE, SamplingConvention(spacing="openai_ddim"), 300)


def test_quad_is_for_two_families():
    assert visited(LDM, 10, skip="quad") == [t + 1 for t in visited(DDIM, 10, skip="quad")]
    with pytest.raises(BidmError, match="no quad"):
        sampling_steps(SCHEDULE, SamplingConvention(spacing="openai"), 10, "quad")
    with pytest.raises(BidmError, match="uniform or quad"):
        sampling_steps(SCHEDULE, DDIM, 10, "cubic")

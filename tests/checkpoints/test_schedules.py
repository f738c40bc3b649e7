from __future__ import annotations

import pytest
import torch

from bidm_cli.checkpoints.reading.schedules import one_line, schedule_from_buffers
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError

LDM = NoiseSchedule.scaled_linear(1000, 0.0015, 0.0195)


def test_no_buffers() -> None:
    assert schedule_from_buffers({}, LDM) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_betas", [True, False])
def test_the_configured_form_is_taken_if_it_gives_the_buffer(dtype: torch.dtype, with_betas: bool) -> None:
    buffers = {"alphas_cumprod": LDM.alphas_cumprod.to(dtype)}
    if with_betas:
        buffers["betas"] = LDM.betas.to(dtype)
    found, _ = schedule_from_buffers(buffers, LDM)  # type: ignore[misc]
    assert found is LDM


@pytest.mark.parametrize(
    "schedule",
    [
        LDM,
        NoiseSchedule.scaled_linear(1000, 0.00085, 0.012),
        NoiseSchedule.scaled_linear(500, 0.0015, 0.0155),
        NoiseSchedule.linear(1000, 1e-4, 0.02),
        NoiseSchedule.cosine(1000),
        NoiseSchedule.cosine(4000),
    ],
    ids=one_line,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_closed_forms_are_recognised_without_a_configuration(
    schedule: NoiseSchedule, dtype: torch.dtype
) -> None:
    buffers = {"alphas_cumprod": schedule.alphas_cumprod.to(dtype), "betas": schedule.betas.to(dtype)}
    found, note = schedule_from_buffers(buffers, None)  # type: ignore[misc]
    assert found.description == schedule.description
    assert note == "from the file's buffers"
    del buffers["betas"]
    if dtype == torch.float32:
        found, _ = schedule_from_buffers(buffers, None)  # type: ignore[misc]
        assert found.description == schedule.description
    only_betas, _ = schedule_from_buffers({"betas": schedule.betas.float()}, None)  # type: ignore[misc]
    torch.testing.assert_close(only_betas.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_the_file_beats_the_configuration() -> None:
    buffers = {"alphas_cumprod": LDM.alphas_cumprod.float()}
    found, _ = schedule_from_buffers(buffers, NoiseSchedule.linear(1000, 1e-4, 0.02))  # type: ignore[misc]
    assert found.description == LDM.description


def test_other_schedules_are_kept_number_by_number() -> None:
    values = torch.linspace(0.99, 0.01, 77) ** 1.7
    found, note = schedule_from_buffers({"alphas_cumprod": values}, LDM)  # type: ignore[misc]
    assert found.description["kind"] == "explicit"
    assert torch.equal(found.alphas_cumprod, values.double())
    assert "configuration says otherwise" in note


@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(0.1, 0.9, 10),
        torch.linspace(0.9, -0.1, 10),
        torch.full((10,), torch.nan),
        torch.linspace(2, 0.5, 10),
        torch.arange(10, 0, -1),
        torch.tensor(0.5),
        torch.ones(2, 2),
        torch.ones(1),
        torch.ones(0),
    ],
)
def test_what_is_no_schedule_is_refused(values: torch.Tensor) -> None:
    with pytest.raises(BidmError, match="no noise schedule"):
        schedule_from_buffers({"alphas_cumprod": values}, None)

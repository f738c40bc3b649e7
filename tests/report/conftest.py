"""Fixtures for the tests of bidm_cli.report."""

from __future__ import annotations

import pytest

from bidm_cli.diffusion.model import DiffusionModel
from tests.report.models import tiny


@pytest.fixture
def tiny_model() -> DiffusionModel:
    return tiny()

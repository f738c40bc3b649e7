"""The published configurations have exactly their original code's number of parameters."""

from __future__ import annotations

import pytest
import torch

from bidm_cli.networks.registry import build
from tests.networks.published import ALL


@pytest.mark.parametrize("name", ALL)
def test_parameter_count(name: str) -> None:
    architecture, expected = ALL[name]
    with torch.device("meta"):
        network = build(architecture)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert not list(network.buffers())

"""Samplers by name: one class under a decorator is enough for sample(), recipes and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bidm_cli.errors import BidmError
from bidm_cli.recipe import Recipe
from bidm_cli.registry import SAMPLERS
from bidm_cli.sampling.sample import sample
from bidm_cli.sampling.samplers.base import Sampler, register_sampler
from tests.cli.running import DEMO, Runner

RECIPE = "name: x\nlayers:\n  - {role: stem, keep: float}\nsampler: {name: toy}\n"


@pytest.fixture
def toy(monkeypatch):
    """A sampler from outside: each step goes to the estimated image."""
    monkeypatch.setattr(SAMPLERS, "_classes", dict(SAMPLERS._classes))

    @register_sampler("toy")
    class Toy(Sampler):
        def advance(self, index, x, found, draw):
            return found.x0

    return Toy


def test_an_unknown_sampler_is_refused_by_name(small):
    assert SAMPLERS.names() == ["ddim", "ddpm", "dpm++"]
    with pytest.raises(BidmError, match=r"unknown sampler 'toy'; use ddim, ddpm, dpm\+\+"):
        sample(small, n=1, steps=2, sampler="toy")
    with pytest.raises(BidmError, match=r"recipe, line 4: sampler\.name is 'toy'; it takes ddim or ddpm"):
        Recipe.parse(RECIPE)


def test_a_registered_sampler_is_known_everywhere(toy, small, tmp_path, monkeypatch, capsys):
    assert Recipe.parse(RECIPE).sampler.name == "toy"
    assert not torch.equal(sample(small, n=1, steps=2, sampler="toy"), sample(small, n=1, steps=2))
    monkeypatch.chdir(tmp_path)
    ran = Runner(monkeypatch, capsys)(
        "sample", DEMO / "digits.pth", "-n", 1, "--steps", 2, "--sampler", "toy"
    )
    assert ran.status == 0 and "2 steps of toy" in ran.out
    assert Path("samples/digits-original/000000.png").is_file()
    assert "[ddim|ddpm|dpm++|toy]" in Runner(monkeypatch, capsys)("sample", "--help").out


def test_a_name_belongs_to_one_class(toy):
    register_sampler("toy")(toy)
    with pytest.raises(ValueError, match="registered twice"):
        register_sampler("ddim")(toy)

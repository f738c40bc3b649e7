"""Decoders captured for the CPU: the same pictures as without."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from bidm_cli.packed.cpu.ops import winograd
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.model import PackedModel
from bidm_cli.packed.recording import decoder
from bidm_cli.packed.recording.decoder import decoder_of
from bidm_cli.packed.recording.recorder import CannotRecord
from bidm_cli.recipe import Recipe
from bidm_cli.sampling.images import decode
from tests.packed.format.test_first_stage import STAGES, latent_model

pytest.importorskip("numba")


def packed(folder: Path, name: str = "kl", backend: str = "numba") -> PackedModel:
    write_packed(folder / "m.bidm", *pack_model(latent_model(name), Recipe.load("w1a1").to_json()))
    return load_packed(folder / "m.bidm", backend=backend)


def latents(n: int, side: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(n, 1, 4, side, side, generator=generator))


@pytest.mark.parametrize("name", STAGES)
def test_replays_draw_what_the_decoder_draws(name, tmp_path, monkeypatch):
    monkeypatch.setattr(winograd, "FEWEST_PIXELS", 64)
    model = packed(tmp_path, name)
    recorded, plain = decoder_of(model), load_packed(model.path, backend="numba")
    for side in (8, 8, 8, 16, 8, 16, 16):
        for z in latents(2, side):
            assert torch.equal(recorded(z), plain.decode(z))
    assert decoder_of(model) is recorded and decoder_of(copy.copy(model)) is not recorded
    assert all(known[1].replay is not None for known in recorded._known.values())
    reference = load_packed(model.path, backend="torch")
    torch.testing.assert_close(recorded(z), reference.decode(z), atol=1e-4, rtol=1e-4)


def test_pictures_do_not_depend_on_those_before(tmp_path):
    model, zs = packed(tmp_path), torch.cat(latents(4))
    together = decode(model, zs)
    assert (decode(model, zs[2:3])[0] == together[2]).all()
    assert (decode(load_packed(model.path, backend="numba"), zs[3:])[0] == together[3]).all()


def test_results_outlive_the_next_picture(tmp_path):
    recorded, (first, second, *_) = decoder_of(packed(tmp_path)), latents(2)
    kept = [recorded(first) for _ in range(4)]
    recorded(second)
    assert all(torch.equal(images, kept[0]) for images in kept)


def test_other_backends_decode_as_they_are(tmp_path):
    model = packed(tmp_path, backend="torch")
    assert decoder_of(model) == model.decode
    float_model = latent_model()
    assert decoder_of(float_model) == float_model.decode


def test_what_cannot_be_captured_is_decoded_all_the_same(tmp_path):
    model, z = packed(tmp_path), latents(1)[0]

    class Refusing:
        what, runs_first = "nothing", True

        def __call__(self, run, inputs):
            raise CannotRecord

    recorded = decoder_of(model)
    recorded.recorder = Refusing()
    assert all(torch.equal(recorded(z), model.decode(z)) for _ in range(3))


def test_the_captures_used_last_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "MOST", 2)
    model = packed(tmp_path)
    recorded, expected = decoder_of(model), load_packed(model.path, backend="numba")
    for side in (8, 8, 16, 8, 24, 24, 8, 16):
        z = latents(1, side)[0]
        assert torch.equal(recorded(z), expected.decode(z))
    assert [shape[-1] for _, _, shape, _ in recorded._known] == [8, 16]

"""Training under contexts, channels and latents: who gets which, dropping, and runs that resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bidm_cli.binary.surgery import binarize
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.data.array_images import holds_floats
from bidm_cli.diffusion.condition import Condition, ConditionSet
from bidm_cli.distill.compress import compress
from bidm_cli.distill.data import LatentData, SyntheticData
from bidm_cli.distill.image_data import ImageData
from bidm_cli.distill.objective import Objective
from bidm_cli.distill.trainer import Trainer, binarized_copy
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.read import load_packed
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Recipe
from bidm_cli.sampling.sample import sample
from tests.distill.conftest import TINY
from tests.end_to_end.conditioned import checkpoint

CONTEXTS = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def text(tmp_path):
    return load_checkpoint(checkpoint("text", tmp_path / "original"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_synthetic_samples_keep_the_context_they_were_drawn_under(text, tmp_path):
    data = SyntheticData(text, tmp_path, count=4, steps=2, seed=5, conditions=ConditionSet(CONTEXTS))
    x0, given = data.batch(torch.arange(4), seeded())
    wanted = sample(text, n=4, steps=2, seed=5, context=given.context)
    assert torch.equal(x0, wanted)
    rows = {tuple(row.flatten().tolist()) for row in given.context}
    assert len(rows) > 1 and rows <= {tuple(row.flatten().tolist()) for row in CONTEXTS}


def test_latents_are_taken_as_they_are_with_their_own_contexts(text, tmp_path):
    x0 = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", latents=x0)
    np.save(tmp_path / "x.npy", x0)
    conditions = ConditionSet(CONTEXTS, paired=True)
    for name in ("x.npz", "x.npy"):
        assert holds_floats(tmp_path / name)
        found, given = LatentData(text, tmp_path / name, conditions).batch(torch.tensor([2, 0]), seeded())
        assert np.array_equal(found.numpy(), x0[[2, 0]]) and torch.equal(given.context, CONTEXTS[[2, 0]])
    drawn = LatentData(text, tmp_path / "x.npy", ConditionSet(CONTEXTS))
    orders = {tuple(drawn.batch(torch.arange(3), seeded(i))[1].context[:, 0, 0].tolist()) for i in range(8)}
    assert len(orders) > 1  # independent of the sample, by the step's generator
    assert torch.equal(*(drawn.batch(torch.arange(3), seeded(1))[1].context for _ in range(2)))


def test_images_are_not_latents(images):
    assert not holds_floats(images)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((2, 3, 8, 8), np.float32), r"\[2, 3, 8, 8\]; as latents .* \[M, 4, 8, 8\]"),
        (np.full((2, 4, 8, 8), np.inf, np.float32), "not finite"),
        (np.zeros((2, 4, 8, 8), np.int32), "int32"),
    ],
)
def test_latents_that_do_not_fit(text, tmp_path, array, words):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(BidmError, match=words):
        LatentData(text, tmp_path / "x.npy", ConditionSet(CONTEXTS))


def test_conditions_of_given_samples_have_to_be_as_many(tmp_path):
    model = load_checkpoint(checkpoint("super-resolution", tmp_path / "original"))
    pixels = np.zeros((4, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels)
    with pytest.raises(BidmError, match="3 conditions for 4 samples"):
        ImageData(model, tmp_path / "x.npz", ConditionSet(concat=torch.zeros(3, 3, 8, 8)))
    concat = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 8, 8)
    _, given = ImageData(model, tmp_path / "x.npz", ConditionSet(concat=concat)).batch(
        torch.tensor([3, 1]), seeded()
    )
    assert given.concat[:, 0, 0, 0].tolist() == [3, 1]


def test_a_tenth_of_the_contexts_is_dropped_where_the_null_is_known(text, tmp_path):
    text = text.with_null_context(torch.full((5, 24), 9.0))
    objective = Objective(text, text, Recipe.parse(TINY))
    condition = Condition(torch.zeros(2000, 5, 24))
    condition = objective._with_dropout(condition, objective.draws(2000, condition, seeded()).dropped)
    share = condition.context[:, 0, 0].eq(9).float().mean().item()
    assert 0.07 < share < 0.13 and (condition.context.eq(9) | condition.context.eq(0)).all()


def train(text, rows, folder, stop=None):
    recipe = Recipe.parse(TINY).override("train", steps=4)
    student = binarized_copy(text)
    torch.manual_seed(0)
    binarize(student.unet, recipe, 1000)
    data = SyntheticData(text, folder, count=4, steps=2, seed=0, conditions=rows)

    def advance(row):
        if trainer.step == stop:
            raise KeyboardInterrupt

    trainer = Trainer(text, student, recipe, data, folder, reporter=Reporter(advance=advance))
    trainer.resume()
    trainer.train()
    return student.unet.state_dict()


def test_resuming_gives_the_same_bits(text, tmp_path, monkeypatch):
    monkeypatch.setattr("bidm_cli.distill.trainer.CHECKPOINT_EVERY_SECONDS", 0.0)
    text, rows = text.with_null_context(torch.zeros(5, 24)), ConditionSet(CONTEXTS)
    whole = train(text, rows, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(text, rows, tmp_path / "parts", stop=3)
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 2
    parts = train(text, rows, tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_null_context_is_packed_and_runs_keep_to_their_contexts(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.parse(TINY).override("train", steps=1, synthetic_steps=2)
    null, said = torch.randn(5, 24), []
    options = {"context": CONTEXTS, "unconditional_context": null, "run_dir": "run"}
    with pytest.raises(BidmError, match="has 4 tokens, the contexts 5"):
        compress(text, recipe, "x.bidm", context=CONTEXTS, unconditional_context=null[:4])
    assert not (tmp_path / "runs").exists()
    result = compress(text, recipe, "x.bidm", **options, reporter=Reporter(say=said.append))
    packed = load_packed("x.bidm")
    assert torch.equal(packed.null_context, null.half().float()[None])
    assert result.trajectory["n"] > 1
    plain, guided = (sample(packed, n=1, steps=2, context=CONTEXTS[:1], guidance=g) for g in (1.0, 3.0))
    assert not torch.equal(plain, guided)
    with pytest.raises(BidmError, match="other contexts or conditions"):
        compress(text, recipe, "x.bidm", **{**options, "context": CONTEXTS[:2]}, resume=True)


def test_compress_says_how_data_was_taken(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.parse(TINY).override("train", steps=1)
    latents = np.zeros((3, 4, 8, 8), np.float32)
    np.savez(tmp_path / "paired.npz", latents=latents, context=CONTEXTS.numpy())
    np.savez(tmp_path / "plain.npz", latents=latents)
    said: list[str] = []
    reporter = Reporter(say=said.append, begin=lambda planned: said.append(planned.data))
    compress(text, recipe, "x.bidm", data="paired.npz", run_dir="a", reporter=reporter)
    assert said[0] == "3 contexts, each sample has its own"
    assert said[1].startswith("paired.npz: 3 latents of [4, 8, 8]; 0 to 0") and "implausible" in said[1]
    said.clear()
    compress(text, recipe, "x.bidm", data="plain.npz", context=CONTEXTS, run_dir="b", reporter=reporter)
    assert said[0] == "3 contexts, drawn independently of the samples"
    with pytest.raises(BidmError, match="`context`"):
        compress(text, recipe, "x.bidm", data="plain.npz", run_dir="c")

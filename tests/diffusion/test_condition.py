"""Conditions: what a model takes, what it refuses and in which words, and rows that start over."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bidm_cli.data.condition_files import ConditionSource, gather
from bidm_cli.diffusion.condition import Condition, ConditionSet
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.networks.conditioners import ClassEmbedder
from bidm_cli.networks.registry import build

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "num_heads": 4,
}
TEXT = {"use_spatial_transformer": True, "context_dim": 24}


def model(**more) -> DiffusionModel:
    torch.manual_seed(0)
    unet = {"kind": "ldm_unet", "args": {**UNET, **more}}
    return DiffusionModel(
        family="ldm",
        unet=build(unet),
        sample_shape=(4, 8, 8),
        schedule=NoiseSchedule.linear(20, 1e-3, 0.2),
        convention=SamplingConvention(),
        architecture={"unet": unet, "first_stage": None, "conditioner": None},
    )


def with_classes() -> DiffusionModel:
    torch.manual_seed(1)
    return dataclasses.replace(model(**TEXT), conditioner=ClassEmbedder(5, 24), num_classes=5, null_label=4)


def test_what_a_model_takes_follows_from_its_network():
    assert (model().context_width, model().concat_channels) == (None, 0)
    assert (model(**TEXT).context_width, model(in_channels=9).concat_channels) == (24, 5)
    assert with_classes().embeds_labels and not model(**TEXT).embeds_labels


def test_channels_are_joined_after_the_networks_own():
    told = Condition(concat=torch.ones(2, 3, 8, 8))
    joined = told.join(torch.zeros(2, 4, 8, 8))
    assert joined.shape == (2, 7, 8, 8) and joined[:, 4:].eq(1).all() and joined[:, :4].eq(0).all()
    conditioned = model(in_channels=7)
    x, t = torch.zeros(1, 4, 8, 8), torch.tensor([3])
    with torch.no_grad():
        one, other = (
            conditioned.denoise(Condition(concat=c).join(x), t)
            for c in (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
        )
    assert not torch.equal(one, other)
    with pytest.raises(BidmError, match=r"`condition`.*\[n, 3, 8, 8\]"):
        conditioned.denoise(x, t)


@pytest.mark.parametrize(
    "made, rows, words",
    [
        (lambda: model(**TEXT), Condition(), r"`context`, embeddings \[L, 24\] or \[n, L, 24\]"),
        (lambda: model(**TEXT), Condition(torch.zeros(1, 5, 23)), r"\[1, 5, 23\]; this model takes"),
        (lambda: model(**TEXT), Condition(torch.full((1, 5, 24), float("nan"))), "not finite"),
        (lambda: model(), Condition(torch.zeros(1, 5, 24)), "leave out `context`"),
        (lambda: model(), Condition(concat=torch.zeros(1, 1, 8, 8)), "leave out `condition`"),
        (lambda: model(in_channels=7), Condition(), r"`condition`.*\[n, 3, 8, 8\]"),
        (lambda: model(in_channels=7), Condition(concat=torch.zeros(2, 3, 8, 9)), r"\[2, 3, 8, 9\]; this"),
        (with_classes, Condition(), "class-conditional; give `labels`"),
    ],
)
def test_what_does_not_fit_is_one_line(made, rows, words):
    with pytest.raises(BidmError, match=words) as caught:
        made().make_condition(None, rows)
    assert "\n" not in str(caught.value)


def test_a_class_model_takes_its_label_or_its_embedding_not_both():
    classes = with_classes()
    embedded = classes.make_condition(torch.tensor([2])).context
    assert torch.equal(classes.make_condition(None, Condition(embedded)).context, embedded)
    with pytest.raises(BidmError, match="either `labels` or `context`"):
        classes.make_condition(torch.tensor([2]), Condition(embedded))


def test_guidance_compares_with_the_null_label_or_the_null_context():
    classes = with_classes()
    assert torch.equal(
        classes.unconditional(classes.make_condition(torch.tensor([2, 3]))).context,
        classes.make_condition(torch.tensor([4, 4])).context,
    )
    text, context = model(**TEXT), Condition(torch.randn(2, 5, 24))
    with pytest.raises(BidmError, match=r"`unconditional_context`, \[L, 24\]"):
        text.unconditional(text.make_condition(None, context))
    null = torch.randn(3, 24)
    found = text.with_null_context(null).unconditional(text.make_condition(None, context))
    assert torch.equal(found.context, null.expand(2, 3, 24))
    assert text.null_context is None
    with pytest.raises(BidmError, match="it has to be one"):
        text.with_null_context(torch.zeros(2, 3, 24))
    with pytest.raises(BidmError, match="null label"):
        model().check_guidance()


def test_mixed_takes_rows_of_both():
    ours, theirs = Condition(torch.zeros(3, 2, 4)), Condition(torch.ones(3, 2, 4))
    found = ours.mixed(theirs, torch.tensor([False, True, False]))
    assert found.context[:, 0, 0].tolist() == [0, 1, 0] and found.y is None


def test_rows_start_over_and_one_serves_all():
    rows = ConditionSet(torch.arange(3.0).reshape(3, 1, 1), torch.full((1, 1, 2, 2), 7.0))
    found = rows.take([0, 4, 5])
    assert found.context.flatten().tolist() == [0, 1, 2] and found.concat.shape == (3, 1, 2, 2)
    assert len(rows) == 3 and len(ConditionSet()) == 0
    with pytest.raises(BidmError, match="3 rows, `condition` 2"):
        ConditionSet(torch.zeros(3, 1, 1), torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors"])
def test_contexts_from_files(tmp_path, name):
    values = np.random.default_rng(0).standard_normal((2, 5, 24)).astype(np.float32)
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, values)
    elif name == "a.npz":
        np.savez(path, context=values, other=np.zeros(3))
    else:
        save_file({"whatever": torch.from_numpy(values).half()}, str(path))
    _, rows = gather(model(**TEXT), ConditionSource(context=path))
    torch.testing.assert_close(rows.context, torch.from_numpy(values), atol=2e-3, rtol=0)
    assert rows.context.dtype == torch.float32
    _, one = gather(model(**TEXT), ConditionSource(context=torch.zeros(5, 24)))
    assert one.context.shape == (1, 5, 24)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file"),
        (b"rubbish", "damaged"),
        (np.zeros((2, 5, 24), np.int64), "floats"),
        (np.full((1, 2), None), "damaged"),
        (np.zeros(24, np.float32), r"\[24\]"),
    ],
)
def test_bad_context_files_are_one_line(tmp_path, content, words):
    path = tmp_path / "a.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(BidmError, match=words) as caught:
        gather(model(**TEXT), ConditionSource(context=path))
    assert "\n" not in str(caught.value)
    with pytest.raises(BidmError, match="takes arrays"):
        (tmp_path / "a.txt").write_text("x")
        gather(model(**TEXT), ConditionSource(context=tmp_path / "a.txt"))


def test_several_unnamed_arrays_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 1, 24)), y=np.zeros((1, 1, 24)))
    with pytest.raises(BidmError, match="x, y; call the one to use 'context'"):
        gather(model(**TEXT), ConditionSource(context=tmp_path / "a.npz"))

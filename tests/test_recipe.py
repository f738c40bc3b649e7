"""Recipes: reading, overriding, and errors that name their line."""

from __future__ import annotations

import pytest

from bidm_cli.errors import BidmError
from bidm_cli.recipe import Recipe, available
from bidm_cli.recipe.bounds import Bounds, hints, plain_types
from bidm_cli.recipe.reader import RecipeReader
from bidm_cli.recipe.spec import BinarySpec

SMALL = "name: x\nlayers:\n  - {role: stem, keep: float}\n"


@pytest.mark.parametrize("name", ["w1a1", "w1a2", "bidm", "w1a1-attention", "reference", "xnor", "w1a32"])
def test_bundled_recipes_load_and_survive_json(name):
    recipe = Recipe.load(name)
    assert recipe.name == name and name in available()
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe and again.to_json() == recipe.to_json()


def test_attention_is_written_only_where_it_is_asked_for():
    """Stored recipes of before it existed stay equal to what they were."""
    assert "attention" not in Recipe.load("w1a1").to_json()
    assert Recipe.load("w1a1-attention").to_json()["attention"] == {"scores": "binary"}


def test_later_keys_are_written_only_where_they_say_something():
    """Stored recipes of bidm 0.1.0 read back as they were written."""
    plain, later = Recipe.load("reference").to_json(), Recipe.load("w1a2").to_json()
    assert "predict" not in plain["distill"]
    assert not {"progressive", "timestep_power"} & set(plain["train"])
    assert later["distill"]["predict"] == "v" and later["train"]["progressive"] == 0.5
    assert "refine" not in later and "planes" not in plain["layers"][1]["binarize"]


def test_what_the_bundled_recipes_promise():
    names = ("w1a1", "w1a2", "bidm", "reference", "xnor")
    w1a1, w1a2, bidm, reference, xnor = (Recipe.load(n) for n in names)
    assert w1a1.distill.predict == "v" and w1a1.train.progressive == 0.5 and w1a1.tbs is None
    assert {rule.binarize.planes for rule in w1a1.layers if rule.binarize} == {1}
    assert {rule.binarize.planes for rule in w1a2.layers if rule.binarize} == {2}
    assert bidm.tbs is not None and bidm.tbs.pair == "ddim" and bidm.tbs.initial == 0
    assert (bidm.distill.loss, bidm.distill.weight, bidm.distill.target) == ("spd", 0.01, "noise")
    assert any("skip" in rule.roles and rule.binarize is None for rule in reference.layers)
    assert reference.tbs is not None and reference.tbs.stride == 1
    assert xnor.tbs is None and xnor.distill.loss == "none"
    assert xnor.layers[-1].binarize.activation_scale == "fixed"


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        (SMALL + "trian: {steps: 1}\n", 4, "trian"),
        (SMALL + "train:\n  stps: 3\n", 5, "stps"),
        (SMALL + "train:\n  steps: many\n", 5, "many"),
        (SMALL + "train: {batch_size: 0}\n", 4, "batch_size"),
        (SMALL + "train: {lr: .nan}\n", 4, "lr"),
        (SMALL + "train: {lr: -1.0}\n", 4, "lr"),
        (SMALL + "tbs: {pair: twice}\n", 4, "twice"),
        (SMALL + "name: y\n", 4, "twice"),
        (SMALL + "attention: {scores: ternary}\n", 4, "ternary"),
        (SMALL + "attention: binary\n", 4, "attention"),
        (SMALL + "sampler: ddim\n", 4, "sampler"),
        (SMALL + "sampler:\n  steps: 10\n  name: euler\n", 6, "ddim or ddpm or dpm++"),
        (SMALL + "sampler: {steps: 0}\n", 4, "from 1 to"),
        (SMALL + "sampler: {eta: 1.5}\n", 4, "from 0 to 1"),
        (SMALL + "train:\n  progressive: 1.5\n", 5, "from 0 to 1"),
        (SMALL + "train:\n  timestep_power: 0\n", 5, "from 0.1 to 10"),
        (SMALL + "distill:\n  predict: score\n", 5, "score"),
        (SMALL + "  - {role: conv, binarize: {planes: 4}}\n", 4, "from 1 to 3"),
        (SMALL + "  - {role: conv, binarize: {planes: 1.5}}\n", 4, "a whole number"),
        (SMALL + "  - {role: conv, binarize: {planes: 2, activations: float}}\n", 4, "binary activations"),
        (SMALL + "refine: {channels: -1}\n", 4, "from 0 to"),
        (SMALL + "train: {ema: 2}\n", 4, "train.ema is 2.0; it takes a number from 0 to 1"),
        (SMALL + "train: {lr: 1" + 400 * "0" + "}\n", 4, "lr"),
        (SMALL + "train: {batch_size: 1" + 400 * "0" + "}\n", 4, "from 1 to"),
        (SMALL + "train: {warmup: -1}\n", 4, "warmup"),
        (SMALL + "tbs: {plain: 7}\n", 4, "plain"),
        (SMALL + "tbs: {stride: 0}\n", 4, "stride"),
        (SMALL + "distill:\n  patches: 0\n", 5, "patches"),
        ("name: x\nlayers:\n  - {role: conv, binarize: {shortcut_init: -1}}\n", 3, "shortcut_init"),
        ("name: x\nlayers:\n  - {role: steem, keep: float}\n", 3, "steem"),
        ("name: x\nlayers:\n  - {role: stem}\n", 3, "keep"),
        ("name: x\nlayers:\n  - {keep: float}\n", 3, "role"),
        ("name: x\nlayers:\n  - {role: stem, keep: half}\n", 3, "float"),
        ("name: x\nlayers:\n  - {role: conv, binarize: {shortcut: til}}\n", 3, "til"),
        ("name: x\nlayers: []\n", 2, "list"),
        ("layers:\n  - {role: stem, keep: float}\n", 1, "name"),
        ("name: [x\nlayers: 3\n", 2, "YAML"),
        ("- a\n- b\n", 1, "mapping"),
    ],
)
def test_errors_name_the_line(text, line, word):
    with pytest.raises(BidmError) as caught:
        Recipe.parse(text, "my.yaml")
    message = str(caught.value)
    assert f"my.yaml, line {line}:" in message and word in message and "\n" not in message


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("keep: encoder", r"my\.yaml, line 5: first_stage\.keep is 'encoder'; it takes decoder or both"),
        ("weights: int4", r"my\.yaml, line 5: .*int8 or int6 or float16 or float32"),
        ("bits: 8", r"my\.yaml, line 5: unknown key 'bits'"),
    ],
)
def test_what_a_first_stage_cannot_be_names_the_line(section, says):
    with pytest.raises(BidmError, match=says):
        Recipe.parse(SMALL + f"first_stage:\n  {section}\n", "my.yaml")


def test_numbers_as_people_write_them():
    recipe = Recipe.parse(SMALL + "train: {lr: 2e-5, clip: 1, amp: off, warmup: 0}\n")
    assert (recipe.train.lr, recipe.train.clip, recipe.train.amp) == (2e-5, 1.0, "off")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(BidmError, match=r"no recipe 'w2a2'.*w1a1"):
        Recipe.load("w2a2")


def test_overrides_leave_the_rest_alone():
    recipe = Recipe.load("w1a1")
    changed = recipe.override("train", steps=3, lr=None)
    assert changed.train.steps == 3 and changed.train.lr == recipe.train.lr
    assert changed.layers == recipe.layers


@pytest.mark.parametrize("section", [*RecipeReader.SECTIONS.values(), BinarySpec])
def test_every_number_has_bounds_and_a_default_within_them(section):
    for name, hint in hints(section).items():
        numeric = {int, float} & set(plain_types(hint))
        bounds = [entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, Bounds)]
        if numeric:
            assert len(bounds) == 1, name
            bounds[0].check(name, getattr(section(), name))


def test_overrides_keep_to_the_bounds():
    with pytest.raises(BidmError, match=r"train\.batch_size is 0"):
        Recipe.load("w1a1").override("train", batch_size=0)


def test_messages_name_the_line_of_a_key_or_of_its_section():
    recipe = Recipe.parse(SMALL + "sampler:\n  steps: 3\n  eta: 0.5\n", "my.yaml")
    assert recipe.where("sampler.eta") == "my.yaml, line 6"
    assert recipe.where("sampler.name") == "my.yaml, line 5"

"""Recipes of the ablation, each made from a domain's base recipe by the parts that it adds or leaves out.

    VARIANTS["w1a1 + SPD 0.01"](Recipe.load("faces-w1a1.yaml"))

The base has v, progressive activations, low noise more often, one plane, no connections and no SPD. Rate,
batch and schedule are the base's in all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bidm_cli.recipe import Recipe
from bidm_cli.recipe.sections import Rule
from bidm_cli.recipe.spec import Refine

Change = Callable[[Recipe], Recipe]
PROGRESSIVE = 0.4


def chain(*changes: Change) -> Change:
    """All changes, the first one first."""

    def changed(recipe: Recipe) -> Recipe:
        for change in changes:
            recipe = change(recipe)
        return recipe

    return changed


def train(**values: float | int | str) -> Change:
    """Keys of the section ``train``."""
    return lambda recipe: recipe.override("train", **values)


def distill(**values: float | int | str) -> Change:
    """Keys of the section ``distill``."""
    return lambda recipe: recipe.override("distill", **values)


def spd(weight: float) -> Change:
    """Space Patched Distillation of so much weight, on all blocks."""
    return distill(loss="spd", patches=4, weight=weight)


def layers_of(name: str) -> Change:
    """The layers of a bundled recipe."""
    return lambda recipe: dataclasses.replace(recipe, layers=Recipe.load(name).layers)


def connections(recipe: Recipe) -> Recipe:
    """Cross-timestep connections as in the bundled recipe ``bidm``."""
    return dataclasses.replace(recipe, tbs=Recipe.load("bidm").tbs)


def method_of(name: str) -> Change:
    """Layers, connections and losses of a bundled recipe; activations binary at once, timesteps uniform."""

    def change(recipe: Recipe) -> Recipe:
        other = Recipe.load(name)
        parts = {"layers": other.layers, "tbs": other.tbs, "distill": other.distill}
        return dataclasses.replace(recipe, **parts).override("train", progressive=0.0, timestep_power=1.0)

    return change


def planes(count: int, names: tuple[str, ...] = ()) -> Change:
    """So many activation planes: in every binary layer, or in those that the patterns ``names`` take."""

    def with_planes(rule: Rule, restricted: tuple[str, ...]) -> Rule:
        assert rule.binarize is not None
        spec = dataclasses.replace(rule.binarize, planes=count)
        return dataclasses.replace(rule, binarize=spec, names=restricted or rule.names)

    def change(recipe: Recipe) -> Recipe:
        kept = [rule for rule in recipe.layers if rule.binarize is None]
        binary = [rule for rule in recipe.layers if rule.binarize is not None]
        changed = [with_planes(rule, names) for rule in binary]
        return dataclasses.replace(recipe, layers=(*kept, *changed, *(binary if names else ())))

    return change


def refined(recipe: Recipe) -> Recipe:
    """A refinement net of two channels and width four."""
    return dataclasses.replace(recipe, refine=Refine(channels=2, width=4))


NOISE = chain(distill(predict="teacher"), train(progressive=0.0))
FULL_RESOLUTION = ("input_blocks.[12].*", "output_blocks.[345].*", "down.0.*", "up.0.*")
"""Layers at full resolution of the bundled U-Nets."""

MAIN: dict[str, Change] = {
    "xnor": method_of("xnor"),
    "bidm": method_of("bidm"),
    "v": train(progressive=0.0),
    "w1a1": lambda recipe: recipe,
    "w1a2": planes(2),
}
FURTHER: dict[str, Change] = {
    "noise": NOISE,
    "noise + connections": chain(NOISE, connections),
    "noise + SPD 0.01": chain(NOISE, spd(0.01)),
    "noise + connections + SPD 0.01": chain(NOISE, connections, spd(0.01)),
    "xnor + learnable binarizer": chain(method_of("xnor"), layers_of("w1a1")),
    "progressive alone": chain(NOISE, train(progressive=PROGRESSIVE)),
    "w1a1 + connections": connections,
    "w1a1 + SPD 0.001": spd(0.001),
    "w1a1 + SPD 0.01": spd(0.01),
    "w1a1 + SPD 0.1": spd(0.1),
    "w1a1 + SPD 1": spd(1.0),
    "w1a1 + connections + SPD 0.01": chain(connections, spd(0.01)),
    "w1a2 + connections + SPD 0.01": chain(planes(2), connections, spd(0.01)),
    "w1a1 + refinement": refined,
    "two planes at full resolution": planes(2, FULL_RESOLUTION),
    "w1a3": planes(3),
    "w1a32": chain(layers_of("w1a32"), train(progressive=0.0)),
    "w1a1, uniform timesteps": train(timestep_power=1.0),
    "w1a1, timestep power 2": train(timestep_power=2.0),
    "w1a2, uniform timesteps": chain(planes(2), train(timestep_power=1.0)),
    "w1a2, timestep power 2": chain(planes(2), train(timestep_power=2.0)),
    "w1a1, rate 2e-3": train(lr=2e-3, lr_binary=2e-3),
    "w1a1, rate 8e-3": train(lr=8e-3, lr_binary=8e-3),
    "w1a1, progressive 0.6": train(progressive=0.6),
    "w1a2, progressive 0.6": chain(planes(2), train(progressive=0.6)),
}
VARIANTS = MAIN | FURTHER

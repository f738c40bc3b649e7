"""Recipes: YAML that says which layers become binary, where connections go, and how to distil.

    recipe = Recipe.load("w1a1")            # by name, or a path
    recipe.train.steps

Every key is checked; an unknown key, a wrong value or a rule that matches nothing is an error with its line.
"""

from bidm_cli.recipe.recipe import Recipe, available
from bidm_cli.recipe.sections import (
    Attention,
    Connections,
    Distill,
    FirstStage,
    Optimization,
    Rule,
    Sampler,
    StageTrain,
    Store,
    Train,
)

__all__ = [
    "Attention",
    "Connections",
    "Distill",
    "FirstStage",
    "Optimization",
    "Recipe",
    "Rule",
    "Sampler",
    "StageTrain",
    "Store",
    "Train",
    "available",
]

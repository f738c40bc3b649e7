"""Binary decoders of first stages: a recipe's ``first_stage.layers`` over a decoder.

    student = binary_decoder(model.first_stage, recipe)      # None if the recipe leaves it as it is
    student.network.take_encoder(model.first_stage)

Names of layers are those within the first stage, such as ``decoder.mid.block_1.conv1``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

from torch import nn

from bidm_cli.binary.surgery import LayerPlan, binarize, plan
from bidm_cli.networks.autoencoder import FirstStage
from bidm_cli.recipe import Attention, Recipe


@dataclass(frozen=True)
class BinaryDecoder:
    """Decoder with binary layers (a first stage without its encoder), and the decision on each layer."""

    network: FirstStage
    layers: list[LayerPlan]


def decoder_recipe(recipe: Recipe) -> Recipe:
    """The recipe as it is for a decoder: its rules, and nothing that belongs to the denoising network."""
    rules = recipe.first_stage.layers
    return replace(recipe, layers=rules, attention=Attention(), tbs=None, refine=None)


def planned_decoder(stage: nn.Module | None, recipe: Recipe) -> list[LayerPlan]:
    """Decision on each layer of a float first stage's decoder; none where it is to stay as it is.

    Raises:
        BidmError: as :func:`bidm_cli.binary.surgery.plan`.
    """
    if not isinstance(stage, FirstStage) or not recipe.first_stage.is_binary:
        return []
    return plan(stage.without_encoder(), decoder_recipe(recipe))


def binary_decoder(stage: nn.Module | None, recipe: Recipe) -> BinaryDecoder | None:
    """A copy of the decoder, with its binary layers; None where it is to stay as it is.

    Raises:
        BidmError: as :func:`bidm_cli.binary.surgery.binarize`.
    """
    if not isinstance(stage, FirstStage) or not recipe.first_stage.is_binary:
        return None
    network = copy.deepcopy(stage)
    network.drop_encoder()
    return BinaryDecoder(network, binarize(network, decoder_recipe(recipe), timesteps=1))

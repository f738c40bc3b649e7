"""Layer surgery: swap the layers that a recipe selects in any nn.Module for binary ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from bidm_cli.binary.attention import BinaryAttention
from bidm_cli.binary.connections import CrossTimestepConnections
from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.binary.refinement import Refinement
from bidm_cli.binary.sign import binarizer_of
from bidm_cli.errors import BidmError
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.layers import AttentionProduct, Block, is_by_name_only, role_of
from bidm_cli.networks.stored_precision import in_float32
from bidm_cli.recipe import Recipe, Rule
from bidm_cli.recipe.spec import BinarySpec

_STAGES = r"(encoder|middle|decoder)(?:\[(-?\d*):(-?\d*)\])?"


@dataclass(frozen=True)
class LayerPlan:
    """Decision of a recipe on one layer.

    Attributes:
        role: the network's word for the layer's purpose.
        spec: options of the binary layer; None if it stays float.
        rule: index of the recipe's rule that decided, None if no rule matched (it stays float).
    """

    name: str
    role: str
    spec: BinarySpec | None
    rule: int | None


def plan(network: nn.Module, recipe: Recipe) -> list[LayerPlan]:
    """Apply the recipe's rules to every Conv2d, Conv1d and Linear of a float network, without changes.

    Warns where the recipe wants binary attention scores and the network has no scores.

    Raises:
        BidmError: a rule with a name pattern decides no layer, a selected layer cannot be made binary, or a
            binarizer is not registered.
    """
    kinds = (nn.Conv2d, nn.Conv1d, nn.Linear)
    layers = [(name, layer) for name, layer in network.named_modules() if isinstance(layer, kinds)]
    plans = [_plan_layer(name, layer, recipe) for name, layer in layers]
    used = {planned.rule for planned in plans}
    for index, rule in enumerate(recipe.layers):
        # A role that this network lacks is no mistake (one recipe serves all families); a name is.
        if rule.names and index not in used:
            raise BidmError(
                f"{recipe.where('layers', rule.line)}: the rule for {', '.join(rule.names)} decides no layer "
                "of this network; see the names with bidm inspect `layers`"
            )
    if recipe.attention.scores == "binary" and not binary_attentions(network):
        warnings.warn(
            f"{recipe.where('attention')}: this network has no attention with a softmax, so there are no "
            "scores to make binary",
            stacklevel=1,
        )
    return plans


def _plan_layer(name: str, layer: nn.Module, recipe: Recipe) -> LayerPlan:
    role = role_of(layer)
    index, rule = next(
        (
            (i, rule)
            for i, rule in enumerate(recipe.layers)
            if _matches(rule, name, role) and (rule.names or not is_by_name_only(layer))
        ),
        (None, None),
    )
    if rule is None or rule.binarize is None:
        return LayerPlan(name, role, None, index)
    try:
        LayerGeometry.of(layer, name)
        binarizer_of(rule.binarize.binarizer)
    except BidmError as error:
        raise BidmError(f"{recipe.where('layers', rule.line)}: {error}") from error
    return LayerPlan(name, role, rule.binarize, index)


def _matches(rule: Rule, name: str, role: str) -> bool:
    by_role = not rule.roles or "*" in rule.roles or role in rule.roles
    return by_role and (not rule.names or any(fnmatchcase(name, pattern) for pattern in rule.names))


def binarize(network: nn.Module, recipe: Recipe, timesteps: int) -> list[LayerPlan]:
    """Swap the selected layers in place, in float32, and attach the recipe's connections and refinement net.

    Raises:
        BidmError: as :func:`plan`; also if a selected layer did not become binary, or none was selected, or
            the network cannot have the refinement net.
    """
    planned = plan(network, recipe)
    in_float32(network)
    chosen = [(item.name, item.spec) for item in planned if item.spec is not None]
    for name, spec in chosen:
        network.set_submodule(name, BinaryLayer.from_float(network.get_submodule(name), spec, name))
    missed = [name for name, _ in chosen if not isinstance(network.get_submodule(name), BinaryLayer)]
    if missed:
        raise BidmError(f"these layers were selected but did not become binary: {', '.join(missed)}")
    if not chosen:
        raise BidmError(
            f"{recipe.source}: no layer of this network becomes binary; see bidm inspect `layers`"
        )
    if recipe.attention.scores == "binary":
        binarize_attention(network)
    attach_connections(network, recipe, timesteps)
    refinement = planned_refinement(network, recipe)
    if refinement is not None:
        refinement.attach(network)
    return planned


def planned_refinement(network: nn.Module, recipe: Recipe) -> Refinement | None:
    """The recipe's refinement net for a network, not yet attached; BidmError if it cannot have one."""
    if recipe.refine is None:
        return None
    return Refinement.for_network(network, recipe.refine, recipe.where("refine"))


def set_binary_share(network: nn.Module, share: float) -> None:
    """Let every binary layer see ``share`` of its binary activation and the rest of its input."""
    for module in network.modules():
        if isinstance(module, BinaryLayer):
            module.binary_share = share


def binarize_attention(network: nn.Module) -> None:
    """Give every softmax attention of the network binary scores, with one scale per head."""
    device = next(network.parameters()).device
    for name in binary_attentions(network):
        parent = network.get_submodule(name.rpartition(".")[0])
        network.set_submodule(name, BinaryAttention(int(getattr(parent, "heads", 1))).to(device))


def binary_attentions(network: nn.Module) -> list[str]:
    """Names of a float network's attentions whose scores can be binary: those with a softmax."""
    return [name for name, module in network.named_modules() if isinstance(module, AttentionProduct)]


def attach_connections(network: nn.Module, recipe: Recipe, timesteps: int) -> None:
    """Add the recipe's cross-timestep connections to a network, if both have them."""
    tbs = recipe.tbs
    names = [] if tbs is None else select_blocks(network, tbs.connect, recipe.where("tbs"))
    if tbs is not None and names:
        connections = CrossTimestepConnections(names, timesteps, tbs.buckets, tbs.initial)
        connections.to(next(network.parameters()).device).attach(network)


def select_blocks(network: nn.Module, wanted: Sequence[str], where: str) -> list[str]:
    """Names of the blocks that entries such as "decoder[-8:]", "blocks" or "up.0.*" select, in order.

    A stage that the network lacks is no mistake, as one recipe serves all families (a DiT of one block has no
    decoder): the entry selects nothing, with a warning.

    Raises:
        BidmError: an entry that names a block, or blocks of a stage that is there, selects nothing.
    """
    blocks: list[Block] = network.blocks() if hasattr(network, "blocks") else []  # type: ignore[operator]
    modules = [name for name, _ in network.named_modules() if name]
    chosen: set[str] = set()
    for entry in wanted:
        selected = _selected(entry, blocks, modules)
        if not selected:
            _explain(entry, blocks, where)
        chosen.update(selected)
    order = [b.name for b in blocks] + modules
    return [name for name in dict.fromkeys(order) if name in chosen]


def _explain(entry: str, blocks: Sequence[Block], where: str) -> None:
    """Warn of an entry that selects nothing, or raise BidmError if it is a mistake."""
    stages = list(dict.fromkeys(b.stage for b in blocks))
    sliced = re.fullmatch(_STAGES, entry)
    if (sliced and sliced[1] not in stages) or (entry == "blocks" and not blocks):
        missing = f"no {sliced[1]} blocks" if sliced else "no blocks"
        warnings.warn(f"{where}: {entry!r} selects nothing: this network names {missing}", stacklevel=1)
        return
    raise BidmError(
        f"{where}: {entry!r} selects no block of this network; its stages are {', '.join(stages) or 'none'}, "
        f"its blocks {', '.join(b.name for b in blocks) or 'unknown'}"
    )


def _selected(entry: str, blocks: Sequence[Block], modules: Sequence[str]) -> list[str]:
    names = [b.name for b in blocks]
    if entry == "blocks":
        return names
    sliced = re.fullmatch(_STAGES, entry)
    if sliced:
        stage = [b.name for b in blocks if b.stage == sliced[1]]
        first, last = (int(part) if part else None for part in (sliced[2], sliced[3]))
        return stage[first:last]
    return [n for n in names if fnmatchcase(n, entry)] or [n for n in modules if fnmatchcase(n, entry)]

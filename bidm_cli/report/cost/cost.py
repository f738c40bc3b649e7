"""Storage and operations of a network, before and after binarization.

    cost = bidm_cli.cost(architecture, Recipe.load("w1a1"))      # nothing is trained, no weights are needed
    cost.storage_ratio, cost.ops_ratio, cost.ops_ratio_with_attention

Two conventions. The paper's (BiDM, arXiv 2412.05926) counts the multiply-accumulates of convolutions and
linear layers for one sample, a MAC being one operation, and OPs = BOPs / 64 + float operations for a binary
network (Bi-Real Net, arXiv 1808.00278). The other adds the two matrix products of attention to both sides.
Float operations follow the rule of :mod:`bidm_cli.report.cost.operations`. Norms, activation functions and
residual additions are the same in both networks and left out of both, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bidm_cli.binary.refinement import Refinement
from bidm_cli.binary.surgery import binary_attentions, plan, planned_refinement, select_blocks
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.recipe import Recipe
from bidm_cli.recipe.spec import BinarySpec
from bidm_cli.report.cost import operations
from bidm_cli.report.cost.file_sizes import stored_network_tensors
from bidm_cli.report.cost.trace import (
    Trace,
    TracedAttention,
    TracedLayer,
    example_inputs,
    float_network,
    to_meta,
    trace_network,
)
from bidm_cli.report.cost.whole_file import (
    PartCost,
    StageCost,
    planned_parts,
    planned_stage,
    stored_parts,
    stored_stage,
)


@dataclass(frozen=True)
class LayerCost:
    """Cost of a layer, or of what is not a layer (``kind`` parameters, connections or attention).

    Attributes:
        shape: of the weight.
        macs: multiply-accumulates of the float network.
        float_bytes, packed_bytes: in float32, and as the packed file stores it.
        bops: binary multiply-accumulates of the binary network.
        items: its float operations by item of :data:`operations.ITEMS`.
    """

    name: str
    role: str
    kind: str
    shape: tuple[int, ...] = ()
    macs: int = 0
    float_bytes: int = 0
    packed_bytes: int = 0
    bops: int = 0
    items: dict[str, int] = field(default_factory=dict)
    input: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    spec: BinarySpec | None = None

    @property
    def float_ops(self) -> int:
        """All float operations of the binary network in this row."""
        return sum(self.items.values())

    def to_json(self) -> dict[str, Any]:
        values = asdict(self) | {"float_ops": self.float_ops, "spec": self.spec and self.spec.to_json()}
        del values["items"]
        return values


@dataclass(frozen=True)
class Cost:
    """Totals and rows of one network for one sample.

    Attributes:
        parameters: of the float network.
        layers: convolutions and linear layers, in order.
        others: the remaining parameters and the cross-timestep connections.
        attention: the matrix products of attention; only in the figures "with attention".
        parts: what the packed file holds beside the network; none where there is no such file or recipe.
        decoder: of the first stage's decoder, for one picture, where layers of it are binary; else None.
    """

    parameters: int
    layers: list[LayerCost]
    others: list[LayerCost]
    attention: list[LayerCost]
    parts: tuple[PartCost, ...] = ()
    decoder: Cost | None = None

    @property
    def rows(self) -> list[LayerCost]:
        """All rows: layers, others, attention."""
        return self.layers + self.others + self.attention

    @property
    def float_bytes(self) -> int:
        """Bytes of the float network's parameters in float32."""
        return 4 * self.parameters

    @property
    def packed_bytes(self) -> int:
        """Bytes of the network's tensors as the packed file stores them."""
        return sum(row.packed_bytes for row in self.rows)

    @property
    def storage_ratio(self) -> float:
        return self.float_bytes / self.packed_bytes

    @property
    def whole_float_bytes(self) -> int:
        """Bytes in float32 of network, first stage (encoder included) and conditioner."""
        return self.float_bytes + sum(part.float_bytes for part in self.parts)

    @property
    def whole_packed_bytes(self) -> int:
        """Bytes of all tensors of the packed file; header and log come on top."""
        return self.packed_bytes + sum(part.packed_bytes for part in self.parts)

    @property
    def whole_ratio(self) -> float:
        return self.whole_float_bytes / self.whole_packed_bytes

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the float network's convolutions and linear layers."""
        return sum(row.macs for row in self.layers)

    @property
    def ops(self) -> float:
        """BOPs / 64 + float operations of the binary network, attention's products left out."""
        return sum(row.bops / 64 + row.float_ops for row in self.layers + self.others)

    @property
    def ops_ratio(self) -> float:
        return self.macs / self.ops

    @property
    def macs_with_attention(self) -> int:
        return self.macs + sum(row.macs for row in self.attention)

    @property
    def ops_with_attention(self) -> float:
        return self.ops + sum(row.bops / 64 + row.float_ops for row in self.attention)

    @property
    def ops_ratio_with_attention(self) -> float:
        return self.macs_with_attention / self.ops_with_attention

    @property
    def binary_layers(self) -> int:
        """Number of layers with 1-bit weights."""
        return sum(row.kind == "binary" for row in self.layers)

    def breakdown(self) -> dict[str, float]:
        """Operations of the binary network by item, largest first; the sum is ``ops_with_attention``."""
        totals: dict[str, float] = {}
        for row in self.rows:
            binary = {"binary (BOPs / 64)": row.bops / 64} if row.bops else {}
            for item, count in (binary | row.items).items():
                totals[item] = totals.get(item, 0) + count
        return dict(sorted(totals.items(), key=lambda pair: -pair[1]))

    def to_json(self) -> dict[str, Any]:
        """The totals, a binary decoder's among them: the ``cost`` object in the JSON of ``bidm inspect``."""
        sizes = ("parameters", "float_bytes", "packed_bytes", "storage_ratio")
        whole = ("whole_float_bytes", "whole_packed_bytes", "whole_ratio")
        counts = ("macs", "ops", "ops_ratio")
        names = (*sizes, *whole, *counts, *(f"{name}_with_attention" for name in counts))
        decoder = {} if self.decoder is None else {"decoder": self.decoder.to_json()}
        return {name: getattr(self, name) for name in names} | decoder


@dataclass(frozen=True)
class _Binarization:
    """Specs of a network's binary layers, bytes of a stored float, binary attentions, connected blocks."""

    specs: dict[str, BinarySpec]
    float_bytes: int
    attention: Sequence[str]
    connected: Sequence[str] = ()
    buckets: int = 0


def cost(
    model: DiffusionModel | nn.Module,
    recipe: Recipe | str | Path | None = None,
    *,
    sample_shape: tuple[int, int, int] | None = None,
) -> Cost:
    """Count storage and operations of a network for one sample, without computing anything.

    Args:
        model: a checkpoint, a bare architecture, a packed file or a student; or a network on its own.
        recipe: to apply to the float network before counting. Without it the model is counted as it is:
            packed files with the bytes they really take, float models with a ratio of 1.
        sample_shape: (C, H, W) of the input; needed (only) for a network on its own.

    Raises:
        BidmError: a recipe that does not fit, or a network that does not take inputs of this shape.
    """
    if isinstance(recipe, (str, Path)):
        recipe = Recipe.load(recipe)
    if isinstance(model, DiffusionModel):
        network, inputs, unet = float_network(model), example_inputs(model), model.unet
    elif sample_shape is not None:
        x, t = torch.empty(1, *sample_shape, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
        network, inputs, unet = to_meta(model), (x, t), model
    else:
        raise BidmError("the cost of a network on its own needs sample_shape=(C, H, W)")
    trace = trace_network(network, inputs)
    if recipe is not None:
        planned = _planned(network, recipe)
        counted = _cost_of(trace, planned, _refined(network, inputs, planned_refinement(network, recipe)))
        if not isinstance(model, DiffusionModel):
            return counted
        decoder = _decoder_cost(model, planned_stage(model, recipe))
        return replace(counted, parts=planned_parts(model, recipe), decoder=decoder)
    counted = _cost_of(trace, _as_it_is(unet), _refined(network, inputs, getattr(unet, "refinement", None)))
    path = getattr(model, "path", None)
    if not isinstance(model, DiffusionModel) or not isinstance(path, Path):
        return counted
    counted = _with_stored_bytes(counted, stored_network_tensors(path))
    decoder = _decoder_cost(model, stored_stage(model, path))
    return replace(counted, parts=stored_parts(model, path), decoder=decoder)


def _decoder_cost(model: DiffusionModel, stage: StageCost | None) -> Cost | None:
    """Cost of a binary decoder, for one picture."""
    if stage is None:
        return None
    z = torch.empty(1, *model.sample_shape, device="meta")
    counted = _cost_of(trace_network(stage.network, (z,)), _Binarization(stage.specs, 2, ()))
    return _with_stored_bytes(counted, stage.tensors)


def _planned(network: nn.Module, recipe: Recipe) -> _Binarization:
    specs = {item.name: item.spec for item in plan(network, recipe) if item.spec is not None}
    width = getattr(torch, recipe.store.float).itemsize
    attention = binary_attentions(network) if recipe.attention.scores == "binary" else []
    tbs = recipe.tbs
    blocks = [] if tbs is None else select_blocks(network, tbs.connect, recipe.where("tbs"))
    return _Binarization(specs, width, attention, blocks, 0 if tbs is None else tbs.buckets)


def _as_it_is(unet: nn.Module) -> _Binarization:
    """From the binary layers that the network has, packed or in training."""
    modules = dict(unet.named_modules())
    specs = {name: m.spec for name, m in modules.items() if isinstance(getattr(m, "spec", None), BinarySpec)}
    attention = [name for name, m in modules.items() if getattr(m, "score_scale", None) is not None]
    connections: Any = getattr(unet, "connections", None)
    if connections is None:
        return _Binarization(specs, 2 if specs else 4, attention)
    return _Binarization(specs, 2, attention, list(connections.block_names), connections.buckets)


def _refined(network: nn.Module, inputs: Sequence[Any], refinement: Refinement | None) -> list[TracedLayer]:
    """The layers of the network's refinement net and its widened head."""
    if refinement is None:
        return []
    Refinement(**refinement.to_json()).to("meta").attach(network)
    own = (refinement.head, *(f"refinement.{name}" for name, _ in refinement.named_children()))
    return [layer for layer in trace_network(network, inputs).layers if layer.name in own]


def _cost_of(trace: Trace, binarization: _Binarization, refined: Sequence[TracedLayer] = ()) -> Cost:
    width, blocks, buckets = binarization.float_bytes, binarization.connected, binarization.buckets
    name, count = f"norms and the rest ({len(trace.others)} tensors)", sum(trace.others)
    others = [LayerCost(name, "other", "parameters", (count,), 0, 4 * count, count * width)]
    if blocks:
        name, kind, shape = f"connections of {len(blocks)} blocks", "connections", (buckets, len(blocks))
        items = {kind: 2 * sum(trace.elements[block] for block in blocks)}
        others.append(LayerCost(name, kind, kind, shape, packed_bytes=width * math.prod(shape), items=items))
    return Cost(
        count + sum(layer.parameters for layer in trace.layers),
        _layer_rows(trace.layers, binarization, refined),
        others,
        [_attention_row(product, binarization) for product in trace.attention],
    )


def _layer_rows(
    layers: Sequence[TracedLayer], binarization: _Binarization, refined: Sequence[TracedLayer]
) -> list[LayerCost]:
    """Rows of the layers; those of a refinement net cost the binary network alone."""
    added = {layer.name: _layer_row(layer, binarization) for layer in refined}
    rows = []
    for layer in layers:
        row = _layer_row(layer, binarization)
        wide = added.pop(layer.name, None)
        if wide is not None:
            # By its filters: what the trace saw of its output is already refined.
            items = {"float layers": row.macs // row.shape[0] * wide.shape[0]}
            row = replace(row, packed_bytes=wide.packed_bytes, items=items)
        rows.append(row)
    return rows + [replace(row, macs=0, float_bytes=0) for row in added.values()]


def _layer_row(layer: TracedLayer, binarization: _Binarization) -> LayerCost:
    spec, width = binarization.specs.get(layer.name), binarization.float_bytes
    row = LayerCost(
        name=layer.name,
        role=layer.role,
        kind="float",
        shape=layer.shape,
        macs=layer.macs,
        float_bytes=4 * layer.parameters,
        packed_bytes=layer.parameters * width,
        items={"float layers": layer.macs},
        input=layer.input,
        output=layer.output,
        spec=spec,
    )
    if spec is None or layer.geometry is None:
        return row
    sizes = (layer.in_elements, layer.out_elements)
    return replace(
        row,
        kind="binary",
        packed_bytes=operations.stored_bytes(layer.geometry, spec, layer.has_bias, width),
        bops=operations.bit_operations(layer.geometry, spec, layer.out_elements),
        items=operations.float_operations(layer.geometry, spec, *sizes, layer.has_bias),
    )


def _attention_row(product: TracedAttention, binarization: _Binarization) -> LayerCost:
    macs, kind = product.scores + product.values, "attention"
    row = LayerCost(product.name, kind, kind, macs=macs, items={"attention products": macs})
    if product.name not in binarization.attention:
        return row
    items = {"attention products": product.values, "scores": product.pairs + 2 * product.inputs}
    packed = product.heads * binarization.float_bytes
    return replace(row, kind="binary scores", packed_bytes=packed, bops=product.scores, items=items)


def _with_stored_bytes(counted: Cost, tensors: dict[str, int]) -> Cost:
    """Replace predicted bytes by those of a packed file's tensors."""
    names = {row.name for row in counted.layers + counted.attention}
    stored: dict[str, int] = {}
    for tensor, size in tensors.items():
        module = tensor.rpartition(".")[0]
        owner = module if module in names else "connections" if module == "connections" else "other"
        stored[owner] = stored.get(owner, 0) + size

    def rows(of: list[LayerCost]) -> list[LayerCost]:
        keys = [row.name if row.name in names else row.role for row in of]
        return [replace(row, packed_bytes=stored.get(key, 0)) for row, key in zip(of, keys, strict=True)]

    return Cost(counted.parameters, rows(counted.layers), rows(counted.others), rows(counted.attention))

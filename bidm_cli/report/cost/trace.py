"""Trace of a network: one run on the meta device that notes every layer's input and output shapes.

trace = trace_network(network, (x, t))     # meta tensors: shapes only, nothing is computed or allocated
trace.layers[0].macs, trace.attention, trace.elements["mid.block_1"]
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.layers import AttentionProduct, LinearAttentionProduct, role_of
from bidm_cli.networks.registry import build
from bidm_cli.recipe.spec import BinarySpec


@dataclass
class TracedLayer:
    """One convolution or linear layer of a network.

    Attributes:
        shape: of the weight.
        spec: set if the layer is already a binary one.
        geometry: None for layers that can only stay float (groups, dilation).
        parameters: numbers of weight and bias as the float layer has them.
        input, output: shapes at the last call, () if the layer was never called.
        in_elements, out_elements, macs: summed over calls.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    geometry: LayerGeometry | None
    spec: BinarySpec | None
    has_bias: bool
    parameters: int
    input: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    in_elements: int = 0
    out_elements: int = 0
    macs: int = 0


@dataclass(frozen=True)
class TracedAttention:
    """One attention product at one call.

    Attributes:
        scores, values: multiply-accumulates of q k^T, and of the scores with v. Attention without a softmax
            between its products has no scores; both count as ``values``.
        heads, pairs, inputs: numbers of heads, of scores in all, and of elements of q and k.
    """

    name: str
    scores: int
    values: int
    heads: int = 1
    pairs: int = 0
    inputs: int = 0


@dataclass
class Trace:
    """Layers, attention products and sizes of one forward pass of a network for one sample.

    Attributes:
        layers: convolutions and linears, in the network's own order.
        attention: attention products.
        elements: output elements of every submodule that returns one tensor.
        other_parameters: numbers outside the layers (norms, embedding tables).
        other_tensors: number of those tensors.
    """

    layers: list[TracedLayer] = field(default_factory=list)
    attention: list[TracedAttention] = field(default_factory=list)
    elements: Counter[str] = field(default_factory=Counter)
    other_parameters: int = 0
    other_tensors: int = 0


def to_meta(module: nn.Module) -> nn.Module:
    """A copy of ``module`` without weights; the original's are neither copied nor changed."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)


def float_network(model: DiffusionModel) -> nn.Module:
    """The model's denoising network as it was before any binarization, on the meta device."""
    architecture = model.architecture.get("unet")
    if not architecture:
        return to_meta(model.unet)
    with torch.device("meta"):
        return build(architecture)


def example_inputs(model: DiffusionModel) -> tuple[Tensor | None, ...]:
    """(x, t, context, y) of one sample for the model's network, on the meta device.

    x has the conditioning channels, if the network takes any.
    """
    channels, *size = model.sample_shape
    x = torch.empty(1, channels + model.concat_channels, *size, device="meta")
    label = torch.zeros(1, dtype=torch.long, device="meta")
    context, y = None, None
    if model.embeds_labels and model.conditioner is not None:
        context = to_meta(model.conditioner)(label)
    elif model.num_classes is not None:
        y = label
    elif model.vector_width is not None:
        y = torch.empty(1, model.vector_width, device="meta")
    if context is None and model.context_width is not None:
        # A text encoder is not part of the model: one token stands for its output, where one will do.
        context = torch.empty(1, model.context_tokens or 1, model.context_width, device="meta")
    return x, label, context, y


def bare_inputs(sample_shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """(x, t) of one sample for a network on its own, on the meta device."""
    return torch.empty(1, *sample_shape, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")


def trace_network(network: nn.Module, inputs: Sequence[Any]) -> Trace:
    """Run ``network`` once; all its tensors and ``inputs`` are on the meta device.

    Raises:
        BidmError: the network does not take these inputs.
    """
    trace = Trace()
    try:
        with contextlib.ExitStack() as stack, torch.no_grad():
            for name, module in network.named_modules():
                layer = _traced(name, module)
                trace.layers += [] if layer is None else [layer]
                note = functools.partial(_note_call, trace, name, layer)
                stack.callback(module.register_forward_hook(note).remove)
            _count_other_parameters(network, trace)
            network(*inputs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        shapes = ", ".join(str(tuple(i.shape)) for i in inputs if isinstance(i, Tensor))
        raise BidmError(f"the network cannot be run on inputs of shape {shapes}: {error}") from error
    return trace


def _traced(name: str, module: nn.Module) -> TracedLayer | None:
    geometry, spec, bias = (getattr(module, key, None) for key in ("geometry", "spec", "bias"))
    if isinstance(geometry, LayerGeometry):
        kernel = {"conv2d": geometry.kernel, "conv1d": geometry.kernel[1:], "linear": ()}[geometry.kind]
        shape = (geometry.out_channels, geometry.in_channels, *kernel)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        shape, spec = tuple(module.weight.shape), None
        try:
            geometry = LayerGeometry.of(module, name)
        except BidmError:
            geometry = None
    else:
        return None
    parameters = math.prod(shape) + (0 if bias is None else shape[0])
    return TracedLayer(name, role_of(module), shape, geometry, spec, bias is not None, parameters)


def _count_other_parameters(network: nn.Module, trace: Trace) -> None:
    layers = {layer.name for layer in trace.layers}
    for name, parameter in network.named_parameters():
        owner = name.rpartition(".")[0]
        added = name.startswith("connections.") or name.endswith(".score_scale")
        if owner not in layers and not added:
            trace.other_parameters += parameter.numel()
            trace.other_tensors += 1


def _note_call(
    trace: Trace, name: str, layer: TracedLayer | None, module: nn.Module, inputs: Any, output: Any
) -> None:
    """Add a module's call to the trace."""
    if isinstance(output, Tensor):
        trace.elements[name] += output.numel()
    if layer is not None:
        layer.input, layer.output = tuple(inputs[0].shape), tuple(output.shape)
        layer.in_elements += inputs[0].numel()
        layer.out_elements += output.numel()
        layer.macs += output.numel() * math.prod(layer.shape[1:])
    elif isinstance(module, LinearAttentionProduct):
        q, k, v = inputs[:3]
        trace.attention.append(TracedAttention(name, 0, (k.numel() + q.numel()) * v.shape[-2]))
    elif isinstance(module, AttentionProduct):
        q, k, v = inputs[:3]
        pairs = q.numel() // q.shape[-1] * k.shape[-2]
        sizes = (pairs * q.shape[-1], pairs * v.shape[-1], q.shape[1], pairs, q.numel() + k.numel())
        trace.attention.append(TracedAttention(name, *sizes))

"""Trace of a network: one run on the meta device that notes every layer's input and output shapes."""

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


@dataclass
class TracedLayer:
    """One convolution or linear layer of a network.

    Attributes:
        shape: of the weight.
        geometry: None for layers that can only stay float (groups, dilation).
        parameters: numbers of weight and bias as the float layer has them.
        input, output: shapes at the last call, () if the layer was never called.
        in_elements, out_elements, macs: summed over calls.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    geometry: LayerGeometry | None
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
        elements: output elements of every submodule that returns one tensor.
        others: size of each parameter outside the layers (norms, embedding tables).
    """

    layers: list[TracedLayer] = field(default_factory=list)
    attention: list[TracedAttention] = field(default_factory=list)
    elements: Counter[str] = field(default_factory=Counter)
    others: list[int] = field(default_factory=list)


def to_meta(module: nn.Module) -> nn.Module:
    """A copy of ``module`` without weights; the original's are neither copied nor changed."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)


def float_network(model: DiffusionModel) -> nn.Module:
    """The model's denoising network as it was before any binarization, on the meta device.

    Without the refinement net of a student or packed file.
    """
    architecture = model.architecture.get("unet")
    if not architecture:
        return to_meta(model.unet)
    with torch.device("meta"):
        return build(architecture)


def example_inputs(model: DiffusionModel) -> tuple[Tensor | None, ...]:
    """(x, t, context, y) of one sample on the meta device; x includes the conditioning channels."""
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
        # A text encoder is not part of the model: its output is one token, unless the network wants more.
        context = torch.empty(1, model.context_tokens or 1, model.context_width, device="meta")
    return x, label, context, y


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
            network(*inputs)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        shapes = ", ".join(str(tuple(i.shape)) for i in inputs if isinstance(i, Tensor))
        raise BidmError(f"the network cannot be run on inputs of shape {shapes}: {error}") from error
    layers = {layer.name for layer in trace.layers}
    for name, parameter in network.named_parameters():
        owner, _, part = name.rpartition(".")
        if owner not in layers and owner != "connections" and part != "score_scale":
            trace.others.append(parameter.numel())
    return trace


def _traced(name: str, module: nn.Module) -> TracedLayer | None:
    geometry, bias = getattr(module, "geometry", None), getattr(module, "bias", None)
    if isinstance(geometry, LayerGeometry):
        kernel = {"conv2d": geometry.kernel, "conv1d": geometry.kernel[1:], "linear": ()}[geometry.kind]
        shape = (geometry.out_channels, geometry.in_channels, *kernel)
        parameters = geometry.out_channels * (geometry.fan_in + (bias is not None))
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
        shape, parameters = (
            tuple(module.weight.shape),
            sum(p.numel() for p in module.parameters(recurse=False)),
        )
        try:
            geometry = LayerGeometry.of(module, name)
        except BidmError:
            geometry = None
    else:
        return None
    return TracedLayer(name, role_of(module), shape, geometry, bias is not None, parameters)


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
    elif isinstance(module, (AttentionProduct, LinearAttentionProduct)):
        q, k, v = inputs[:3]
        elements, pairs = q.numel() + k.numel(), q.numel() // q.shape[-1] * k.shape[-2]
        sizes = (pairs * q.shape[-1], pairs * v.shape[-1], q.shape[1], pairs, elements)
        linear = isinstance(module, LinearAttentionProduct)
        trace.attention.append(TracedAttention(name, *((0, elements * v.shape[-2]) if linear else sizes)))

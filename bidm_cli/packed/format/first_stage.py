"""First stage of a packed file: the parts that are kept, and the form of its weights.

form = StageForm.of(model, recipe_json)
tensors, about = form.store(model.first_stage)      # named within the first stage
values = stored_weights(network, tensors)           # float32 again, for load_state_dict
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.binary.layer_parts import part_shapes
from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.data.concat import needs_encoder
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.networks.autoencoder import Codebook, FirstStage
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.format.network import layer_records, network_tensors
from bidm_cli.packed.format.quantized import dequantize, quantize, stored_shapes, to_storage
from bidm_cli.recipe.spec import BinarySpec

QUANTIZED = {"int8": torch.int8, "int6": torch.uint8}
"""Forms of integer weights and the types of their tensors, ``weight_int8`` or ``weight_int6``."""
FLOATS = {"float16": torch.float16, "float32": torch.float32}
_LAYERS = (nn.Conv2d, nn.Conv1d, nn.Linear)
FEWEST = 4096
"""Weights of fewer numbers stay floats: they are the ends of the network, and save nothing."""
_NONE: Mapping[str, BinarySpec] = {}


@dataclass(frozen=True)
class StageForm:
    """Form of a first stage in a file.

    Attributes:
        keep: "decoder" or "both". weights: of convolutions and linear layers, "int8", "int6" or a float type.
        rest: type of what is not quantized.
        is_whole: all of it in the type of the file's other floats, as files before this form had it.
    """

    keep: str
    weights: str
    rest: torch.dtype
    is_whole: bool

    @classmethod
    def of(cls, model: DiffusionModel, recipe_json: Mapping[str, Any]) -> StageForm:
        """The form that a recipe asks for; with the encoder, if the model's conditions need it."""
        stored = recipe_json.get("store", {}).get("float", "float16")
        wanted = recipe_json.get("first_stage") or {"keep": "both", "weights": stored}
        keep = "both" if needs_encoder(model) else wanted["keep"]
        weights = wanted["weights"]
        rest = FLOATS[weights if weights in FLOATS else stored]
        return cls(keep, weights, rest, (keep, weights) == ("both", stored))

    def store(self, stage: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """(tensors by their names within the first stage, metadata ``first_stage`` or None).

        Raises:
            BidmError: a number that is not finite.
        """
        tensors: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        for name, tensor, kind in self.plan(stage):
            if isinstance(kind, torch.dtype):
                tensors[name] = to_storage(tensor, kind, name)
                continue
            stored = quantize(tensor, kind, name)
            tensors |= dict(zip(_names(name, kind), stored, strict=True))
            errors[name] = _relative_error(tensor, dequantize(*stored, kind, tensor.shape))
        records = layer_records(decoder_of(stage)) if has_binary_layers(stage) else []
        if not isinstance(stage, FirstStage) or (self.is_whole and not records):
            return tensors, None
        layers = {"layers": [record.to_json() for record in records]} if records else {}
        return tensors, {"keep": self.keep, "weights": self.weights, "errors": errors, **layers}

    def plan(self, stage: nn.Module) -> Iterator[tuple[str, Tensor, str | torch.dtype]]:
        """(name, tensor, "int8", "int6" or its float type) of all that is kept, bits of binary layers too."""
        if self.keep == "decoder":
            stage = decoder_of(stage)
        layers = {f"{name}.weight" for name, m in stage.named_modules() if isinstance(m, _LAYERS)}
        codes = {f"{name}.embedding.weight" for name, m in stage.named_modules() if isinstance(m, Codebook)}
        for name, tensor in network_tensors(stage):
            if self.weights not in QUANTIZED:
                yield name, tensor, self.rest
            elif name in layers and tensor.numel() >= FEWEST:
                yield name, tensor, self.weights
            else:
                # A rounded code may no longer be the nearest one, which changes the picture.
                yield name, tensor, torch.float32 if name in codes else self.rest

    def bytes(self, stage: nn.Module, specs: Mapping[str, BinarySpec] = _NONE) -> dict[str, int]:
        """Bytes of a float first stage's tensors in the file, by their shapes alone.

        Args:
            specs: of the layers that become binary, by name; all of one is counted as its ``weight_bits``.
        """
        found: dict[str, int] = {}
        for name, tensor, kind in self.plan(stage):
            if name.rpartition(".")[0] in specs:
                continue
            if isinstance(kind, torch.dtype):
                width = kind.itemsize if tensor.is_floating_point() else tensor.element_size()
                found[name] = tensor.numel() * width
            else:
                integers, scales = stored_shapes(tensor.shape, kind)
                found[name] = torch.Size(integers).numel() + 2 * torch.Size(scales).numel()
        for name, spec in specs.items():
            layer = stage.get_submodule(name)
            geometry, has_bias = LayerGeometry.of(layer, name), layer.bias is not None
            shapes = part_shapes(geometry, spec, has_bias)
            bits = torch.Size(shapes.pop("weight_bits")).numel()
            floats = sum(torch.Size(shape).numel() for shape in shapes.values())
            found[f"{name}.weight_bits"] = bits + self.rest.itemsize * floats
        return found


def has_binary_layers(stage: nn.Module) -> bool:
    """True for a first stage whose decoder is binary, in training."""
    return any(isinstance(module, BinaryLayer) for module in stage.modules())


def decoder_of(stage: nn.Module) -> nn.Module:
    """A first stage without its encoder, which shares all else; anything else as it is."""
    return stage.without_encoder() if isinstance(stage, FirstStage) else stage


def stored_form(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """``first_stage`` of a file's metadata; None where it is whole, in floats.

    Keys: "keep", "weights", "errors", and "layers" (the decoder's layer table) where layers are binary.

    Raises:
        BidmError: it makes no sense.
    """
    about = metadata.get("first_stage")
    if about is None:
        return None
    values = about if isinstance(about, dict) else {}
    errors = values.get("errors")
    measured = isinstance(errors, dict) and all(type(error) in (int, float) for error in errors.values())
    table = isinstance(values.get("layers", []), list)
    known = values.get("keep") in ("decoder", "both") and values.get("weights") in (*QUANTIZED, *FLOATS)
    if not known or not measured or not table:
        raise BidmError(
            f"what it says about its first stage makes no sense ({str(about)[:60]}); copy it again"
        )
    return values


def stored_weights(network: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of a file's first stage with weights in place of integers and scales.

    Raises:
        BidmError: integers or scales of the wrong type or shape, missing, or scales that are not finite.
    """
    wanted, found = network.state_dict(), dict(values)
    for name, weight in wanted.items():
        kind = next((kind for kind in QUANTIZED if _names(name, kind)[0] in found), None)
        if kind is None or name in found or not name.endswith(".weight"):
            continue
        names = _names(name, kind)
        if names[1] not in found:
            raise BidmError(f"the tensor first_stage.{names[1]} is missing")
        integers, scales = (found.pop(part) for part in names)
        if integers.dtype != QUANTIZED[kind] or not scales.is_floating_point():
            raise BidmError(f"first_stage.{names[0]} and its scales are {integers.dtype} and {scales.dtype}")
        for part, tensor, shape in zip(
            names, (integers, scales), stored_shapes(weight.shape, kind), strict=True
        ):
            if tuple(tensor.shape) != shape:
                stored, needed = list(tensor.shape), list(shape)
                raise BidmError(f"the tensor first_stage.{part} is {stored}, the network needs {needed}")
        if not bool((scales.float() * 128).isfinite().all()):
            raise BidmError(
                f"the tensor first_stage.{names[1]} holds infinities, NaN or scales that make them"
            )
        found[name] = dequantize(integers, scales, kind, weight.shape)
    return found


def _names(weight: str, kind: str) -> tuple[str, str]:
    """Names of a weight's integers and scales."""
    return f"{weight}_{kind}", f"{weight}_scale"


def _relative_error(weight: Tensor, stored: Tensor) -> float:
    """Root mean square error over the root mean square of the weight, to four digits."""
    weight = weight.detach().cpu().float()
    power = float(weight.square().sum())
    error = float((weight - stored).square().sum())
    return float(f"{(error / power) ** 0.5:.4g}") if power else 0.0

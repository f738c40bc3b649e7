"""Layer table of a packed file: one record per convolution and linear layer of the network.

It determines the tensors of the file and their shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bidm_cli.binary.layer_parts import part_shapes
from bidm_cli.errors import BidmError
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.recipe.spec import BinarySpec

UNET = "unet."
"""Prefix of the network's tensors in a packed file."""
STAGE = "first_stage."
"""Prefix of the first stage's."""


@dataclass(frozen=True)
class LayerRecord:
    """Record of one convolution or linear layer in the table.

    Attributes:
        name: in the network. role: see :data:`bidm_cli.networks.layers.ROLES`.
        geometry: shape, stride and padding; None for a float layer that could not be binary.
        spec: the parts of a binary layer; None for a float layer. bias: whether the layer has one.
    """

    name: str
    role: str
    geometry: LayerGeometry | None
    spec: BinarySpec | None
    bias: bool

    @property
    def kind(self) -> str:
        """ "binary" or "float"."""
        return "float" if self.spec is None else "binary"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": self.role,
            "kind": self.kind,
            "geometry": None if self.geometry is None else self.geometry.to_json(),
            "spec": None if self.spec is None else self.spec.to_json(),
            "bias": self.bias,
        }

    @classmethod
    def from_json(cls, values: Any) -> LayerRecord:
        """Read back :meth:`to_json`.

        Raises:
            BidmError: anything but what :meth:`to_json` writes.
        """
        try:
            geometry = None if values["geometry"] is None else _geometry(values["geometry"])
            spec = None if values["spec"] is None else _spec(values["spec"])
            record = cls(str(values["name"]), str(values["role"]), geometry, spec, bool(values["bias"]))
            if record.kind != values["kind"] or (record.spec is not None and record.geometry is None):
                raise ValueError("kind, geometry and spec do not go together")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BidmError(f"its layer table has a record that makes no sense ({error})") from error
        return record


def _geometry(values: Any) -> LayerGeometry:
    geometry = LayerGeometry.from_json(values)
    counts = (geometry.in_channels, geometry.out_channels, *geometry.kernel, *geometry.stride)
    lengths = (len(geometry.kernel), len(geometry.stride), len(geometry.padding))
    whole = all(type(n) is int for n in (*counts, *geometry.padding))
    if not whole or min(counts) < 1 or min(geometry.padding) < 0 or lengths != (2, 2, 4):
        raise ValueError(f"geometry {values}")
    if geometry.kind not in ("conv2d", "conv1d", "linear"):
        raise ValueError(f"kind {geometry.kind!r}")
    return geometry


def _spec(values: Any) -> BinarySpec:
    spec = BinarySpec(**values)
    for name, options in _spec_options().items():
        if getattr(spec, name) not in options:
            raise ValueError(f"{name} {getattr(spec, name)!r}")
    return dataclasses.replace(spec, shortcut_init=float(spec.shortcut_init))


@functools.cache
def _spec_options() -> dict[str, tuple[Any, ...]]:
    """Values that a field may have, where they can be listed."""
    hints = typing.get_type_hints(BinarySpec).items()
    return {name: typing.get_args(wanted) for name, wanted in hints if typing.get_args(wanted)}


def tensor_shapes(record: LayerRecord) -> dict[str, tuple[int, ...]]:
    """Shapes of a binary layer's tensors by the last part of their name; empty for a float layer."""
    if record.spec is None or record.geometry is None:
        return {}
    return part_shapes(record.geometry, record.spec, record.bias)


@dataclass(frozen=True)
class AttentionRecord:
    """An attention with binary scores, one row of ``metadata["attention"]``; other attentions have none.

    Attributes:
        name: of the product in the network. heads: scales in its tensor ``score_scale``.
    """

    name: str
    heads: int

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "scores": "binary", "heads": self.heads}


def read_attention(metadata: Mapping[str, Any]) -> list[AttentionRecord]:
    """The records under ``metadata["attention"]``; none where the key is missing, as in older files.

    Raises:
        BidmError: a record that makes no sense.
    """
    records = []
    try:
        for values in metadata.get("attention") or ():
            if values["scores"] != "binary" or type(values["heads"]) is not int or values["heads"] < 1:
                raise ValueError(f"attention {values}")
            records.append(AttentionRecord(str(values["name"]), values["heads"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BidmError(f"its table of attentions has a record that makes no sense ({error})") from error
    return records


def read_table(metadata: Mapping[str, Any]) -> list[LayerRecord]:
    """The records under ``metadata["layers"]``.

    Raises:
        BidmError: no table, a record that makes no sense, or two layers of one name.
    """
    layers = metadata.get("layers")
    if not isinstance(layers, list):
        raise BidmError("it has no layer table")
    records = [LayerRecord.from_json(values) for values in layers]
    if len({record.name for record in records}) != len(records):
        raise BidmError("its layer table names a layer twice")
    return records


def read_stage_table(metadata: Mapping[str, Any]) -> list[LayerRecord]:
    """The records of a first stage's decoder, none where no layer of it is binary; raises as others do."""
    stage = metadata.get("first_stage")
    return read_table(stage) if isinstance(stage, dict) and "layers" in stage else []


def check_tensors(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare the binary layers' tensors with the tables of network and first stage.

    Raises:
        BidmError: as :func:`read_table`; a tensor is missing, of another shape, or belongs to no layer of a
            table.
    """
    bits = {name for name in tensors if name.endswith(".weight_bits")}
    records = [(UNET + record.name, record) for record in read_table(metadata)]
    records += [(STAGE + record.name, record) for record in read_stage_table(metadata)]
    for layer, record in records:
        for part, shape in tensor_shapes(record).items():
            name = f"{layer}.{part}"
            if name not in tensors:
                raise BidmError(f"the tensor {name} is missing")
            if tuple(tensors[name].shape) != shape:
                stored = list(tensors[name].shape)
                raise BidmError(f"the tensor {name} is {stored}, its layer needs {list(shape)}")
            bits.discard(name)
    if bits:
        raise BidmError(f"the tensor {min(bits)} belongs to no layer of the table")

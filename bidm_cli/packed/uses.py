"""Uses that modules make of their backend, so that only kernels for these are compiled."""

from __future__ import annotations

from typing import Literal, NamedTuple

from bidm_cli.networks.geometry import LayerGeometry

Products = Literal["float32", "bfloat16"]
"""Precision of the factors of attention's float products."""


class Use(NamedTuple):
    """A method of :class:`bidm_cli.packed.backend.Backend`, or "group norm", "RMS norm" or "bfloat16
    attention"; for ``run`` also the layer's geometry and activation planes.
    """

    method: str
    geometry: LayerGeometry | None = None
    planes: int = 1

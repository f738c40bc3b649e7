"""Results of a benchmark: seconds of the same work on both sides, by layer, kind and whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of the same work on both sides, one entry per round."""

    float_rounds: tuple[float, ...]
    packed_rounds: tuple[float, ...]
    float_format: str

    @property
    def float_seconds(self) -> float:
        return median(self.float_rounds)

    @property
    def packed_seconds(self) -> float:
        return median(self.packed_rounds)

    @property
    def ratio(self) -> float:
        """Speedup of packed over float, by the medians; below 1 it is slower."""
        return self.float_seconds / self.packed_seconds

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of a single round."""
        ratios = [f / p for f, p in zip(self.float_rounds, self.packed_rounds, strict=True)]
        return min(ratios), max(ratios)

    def to_json(self) -> dict[str, Any]:
        return {
            "float_seconds": self.float_seconds,
            "packed_seconds": self.packed_seconds,
            "ratio": self.ratio,
            "ratio_spread": list(self.spread),
            "rounds": len(self.float_rounds),
            "float_format": self.float_format,
        }


@dataclass(frozen=True)
class LayerTiming:
    """Timing of one shape of layer on its own, shared by all layers of that shape."""

    names: tuple[str, ...]
    role: str
    kind: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    timing: Timing

    def to_json(self) -> list[dict[str, Any]]:
        """One object per layer."""
        shared = {key: getattr(self, key) for key in ("role", "kind", "weight", "input")}
        return [{"name": name, **shared, **self.timing.to_json()} for name in self.names]


@dataclass(frozen=True)
class KindTiming:
    """Sum of the medians of all layers of a role and kind, each timed on its own."""

    role: str
    kind: str
    layers: int
    float_seconds: float
    packed_seconds: float

    @classmethod
    def of(cls, role: str, kind: str, layers: Sequence[LayerTiming]) -> KindTiming:
        counted = [(len(layer.names), layer.timing) for layer in layers]
        before = sum(count * timing.float_seconds for count, timing in counted)
        after = sum(count * timing.packed_seconds for count, timing in counted)
        return cls(role, kind, sum(count for count, _ in counted), before, after)

    @property
    def ratio(self) -> float:
        return self.float_seconds / self.packed_seconds if self.packed_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class BenchResult:
    """Everything measured, and the machine. ``attention`` holds its products, which are no layers, and
    ``engines`` the original's step in other engines, by name, against the packed one.
    """

    step: Timing
    sampling: Timing | None
    sampling_steps: int
    layers: list[LayerTiming]
    memory: dict[str, int] | None
    batch_size: int
    machine: dict[str, Any] = field(default_factory=dict)
    attention: list[LayerTiming] = field(default_factory=list)
    engines: dict[str, Timing] = field(default_factory=dict)

    def kinds(self) -> list[KindTiming]:
        """Sums by role and kind of layer, and the sum of all last; empty if layers were not timed."""
        groups: dict[tuple[str, str], list[LayerTiming]] = {}
        for layer in self.layers:
            groups.setdefault((layer.role, layer.kind), []).append(layer)
        kinds = [KindTiming.of(*key, layers) for key, layers in groups.items()]
        return [*kinds, KindTiming.of("all binary layers", "", self.layers)] if kinds else []

    @property
    def memory_ratio(self) -> float:
        """Peak memory of float over packed; 0 if it was not measured."""
        return self.memory["float_bytes"] / max(1, self.memory["packed_bytes"]) if self.memory else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "step": self.step.to_json(),
            "engines": {name: timing.to_json() for name, timing in self.engines.items()},
            "sampling": self.sampling and {"steps": self.sampling_steps, **self.sampling.to_json()},
            "memory": self.memory and {**self.memory, "ratio": self.memory_ratio},
            "kinds": [kind.to_json() for kind in self.kinds()],
            "layers": [entry for layer in self.layers for entry in layer.to_json()],
            "attention": [entry for product in self.attention for entry in product.to_json()],
            "machine": self.machine,
        }

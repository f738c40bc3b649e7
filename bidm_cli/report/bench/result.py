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
    """Timing of one shape of layer on its own, shared by all layers of that shape.

    ``products``: of signs; 0 where there are none. ``limit``: products per second that the kernels' inner
    loop reaches, 0 if that was not measured; ``share_of_limit``: of it, by the whole layer.
    """

    names: tuple[str, ...]
    role: str
    kind: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    timing: Timing
    products: int = 0
    limit: float = 0.0

    @property
    def share_of_limit(self) -> float:
        return _share(self.products, self.timing.packed_seconds, self.limit)

    def to_json(self) -> list[dict[str, Any]]:
        """One object per layer."""
        shared = {key: getattr(self, key) for key in ("role", "kind", "weight", "input", "share_of_limit")}
        return [{"name": name, **shared, **self.timing.to_json()} for name in self.names]


@dataclass(frozen=True)
class KindTiming:
    """Sum of the medians of all layers of a role and kind, each timed on its own."""

    role: str
    kind: str
    layers: int
    float_seconds: float
    packed_seconds: float
    share_of_limit: float = 0.0

    @classmethod
    def of(cls, role: str, kind: str, layers: Sequence[LayerTiming]) -> KindTiming:
        counted = [(len(layer.names), layer.timing) for layer in layers]
        before = sum(count * timing.float_seconds for count, timing in counted)
        after = sum(count * timing.packed_seconds for count, timing in counted)
        products, limit = sum(len(layer.names) * layer.products for layer in layers), layers[0].limit
        return cls(
            role, kind, sum(count for count, _ in counted), before, after, _share(products, after, limit)
        )

    @property
    def ratio(self) -> float:
        return self.float_seconds / self.packed_seconds if self.packed_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


def _share(products: int, seconds: float, limit: float) -> float:
    return products / seconds / limit if seconds and limit else 0.0


@dataclass(frozen=True)
class BenchResult:
    """Everything measured, and the machine.

    Attributes:
        attention: its products, which are no layers.
        engines: the original's step in other engines, by name, against the packed one.
        decoding: one picture by the first stage. picture_steps: of the sampler, for a whole picture.
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
    decoding: Timing | None = None
    picture_steps: int = 0

    @property
    def picture(self) -> Timing | None:
        """A whole picture: its steps and its decoding; None without a first stage."""
        if self.decoding is None:
            return None
        steps = self.picture_steps / self.batch_size

        def whole(step: tuple[float, ...], decoding: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(steps * one + other for one, other in zip(step, decoding, strict=True))

        return Timing(
            whole(self.step.float_rounds, self.decoding.float_rounds),
            whole(self.step.packed_rounds, self.decoding.packed_rounds),
            self.step.float_format,
        )

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
            "decoding": self.decoding and self.decoding.to_json(),
            "picture": self.picture and {"steps": self.picture_steps, **self.picture.to_json()},
            "sampling": self.sampling and {"steps": self.sampling_steps, **self.sampling.to_json()},
            "memory": self.memory and {**self.memory, "ratio": self.memory_ratio},
            "kinds": [kind.to_json() for kind in self.kinds()],
            "layers": [entry for layer in self.layers for entry in layer.to_json()],
            "attention": [entry for product in self.attention for entry in product.to_json()],
            "machine": self.machine,
        }

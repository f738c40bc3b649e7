"""Benchmark of packed against float: layers, a whole step, whole sampling, peak memory.

    with paired(model, recipe=recipe) as pair:
        result = bench(pair, BenchOptions(batch_size=1))

The two sides alternate, so that other load on the machine hits both; medians are compared. Float is torch in
the better of its two memory formats. The packed side includes the packing of activations.
"""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.networks.fusion import Features
from bidm_cli.networks.layers import AttentionProduct
from bidm_cli.packed.cpu.codegen.isa import cpu_model
from bidm_cli.report.bench import openvino
from bidm_cli.report.bench.decoding import FORMATS, decoding_seconds
from bidm_cli.report.bench.limit import layer_products, products_per_second
from bidm_cli.report.bench.memory import peak_memory
from bidm_cli.report.bench.models import Pair
from bidm_cli.report.bench.result import BenchResult, LayerTiming, Timing
from bidm_cli.report.bench.step import step_call, time_in_turn, timed, warm_up
from bidm_cli.report.hooks import note_inputs
from bidm_cli.report.pages.tables import shape_text
from bidm_cli.sampling.options import SamplingOptions
from bidm_cli.sampling.sample import sample

_SHORTEST = 0.005
_LONG_SAMPLING = 20.0


@dataclass(frozen=True)
class BenchOptions:
    """Settings of a benchmark: images per step, sampler steps of the whole sampling (0 leaves it out),
    measurements per side, True for layers and memory to measure these, and another engine ("openvino") to
    time the original's step in, in the same rounds; ``kept`` is a file for its int8 model.
    """

    batch_size: int = 1
    steps: int = 10
    rounds: int = 7
    layers: bool = True
    memory: bool = True
    against: str | None = None
    kept: Path | None = None


@torch.no_grad()
def bench(pair: Pair, options: BenchOptions, say: Callable[[str], None] = lambda line: None) -> BenchResult:
    """Measure a pair; ``say`` receives the name of each measurement as it begins."""
    say("warming up")
    float_step = step_call(pair.float_model, options.batch_size)
    packed_step = step_call(pair.packed, options.batch_size)
    plain_step = step_call(pair.packed, options.batch_size, plain=True)
    inputs = _record_inputs(pair, float_step, plain_step)
    warm_up(packed_step)
    form = choose_format(pair.float_model, float_step)
    say(f"one step, batch {options.batch_size}")
    engines = _engines(pair, options, say)
    others = {} if engines is None else engines.calls
    times = times_in_turn({form: float_step, **others, "": packed_step}, options.rounds, pair.packed.device)
    against = {name: Timing(times[name], times[""], name) for name in others}
    step = Timing(times[form], times[""], form)
    layers, attention, sampling, memory = [], [], None, None
    if options.layers:
        say("each layer")
        layers = _layer_timings(pair, inputs, options.rounds, products_per_second(pair.packed.backend))
        attention = attention_timings(pair, plain_step, options.rounds)
    if options.steps:
        say(f"sampling, {options.steps} steps")
        sampling = _sampling(pair, options, form)
    if options.memory:
        say("peak memory, each in a process of its own")
        memory = _memory(pair, options.batch_size)
    decoding, steps = None, 0
    if pair.decoders is not None:
        say("decoding one picture")
        best, seconds = decoding_seconds(*pair.decoders, options.rounds)
        decoding = Timing(seconds[best], seconds[""], best)
        steps = SamplingOptions().resolved(pair.decoders[1]).steps or 0
    about = machine(pair) | ({} if engines is None else {"engine": engines.about()})
    return BenchResult(
        step,
        sampling,
        options.steps,
        layers,
        memory,
        options.batch_size,
        about,
        attention,
        against,
        decoding,
        steps,
    )


def _engines(pair: Pair, options: BenchOptions, say: Callable[[str], None]) -> openvino.Engines | None:
    """The original's step in the other engine, if there is one to compare with."""
    if options.against is None:
        return None
    if options.against != "openvino":
        raise BidmError(f"no engine is called {options.against!r}; there is openvino")
    say("OpenVINO: converting and compiling")
    return openvino.openvino_engines(pair.float_model, options.batch_size, say, kept=options.kept)


def alternate(
    float_calls: Mapping[str, Callable[[], Any]],
    packed_call: Callable[[], Any],
    rounds: int,
    device: torch.device | None = None,
) -> Timing:
    """Time both sides in turn, ``rounds`` times; of several float variants the best by its median counts.

    Work shorter than 5 ms is repeated within a round. Every call has run before.
    """
    times = times_in_turn({**float_calls, "": packed_call}, rounds, device)
    best = min(float_calls, key=lambda name: median(times[name]))
    return Timing(times[best], times[""], best)


def times_in_turn(
    calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device | None = None
) -> dict[str, tuple[float, ...]]:
    """Seconds per call, by name, one entry per round; work shorter than 5 ms is repeated within a round."""
    repeats = {
        name: max(1, round(_SHORTEST / max(timed(call, 1, device), 1e-7))) for name, call in calls.items()
    }
    times = time_in_turn(calls, rounds, device, repeats=repeats)
    return {name: tuple(found) for name, found in times.items()}


def choose_format(model: DiffusionModel, step: Callable[[], Tensor]) -> str:
    """Put the float network into the faster memory format and return its name."""
    seconds = {}
    for name, form in FORMATS.items():
        model.unet.to(memory_format=form)  # type: ignore[call-overload]
        step()
        seconds[name] = min(timed(step, 1, model.device) for _ in range(2))
    best = min(seconds, key=seconds.__getitem__)
    model.unet.to(memory_format=FORMATS[best])  # type: ignore[call-overload]
    return best


def _record_inputs(
    pair: Pair, float_step: Callable[[], Tensor], plain_step: Callable[[], Tensor]
) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Run both once: by packed layer its input's shape, and True if the packed network passes it in
    channels-last layout.
    """
    modules = {r.name: _submodules(pair, r.name) for r in pair.packed.layers if r.spec is not None}
    originals, packed = ({name: both[side] for name, both in modules.items()} for side in (0, 1))
    shapes, _ = note_inputs(originals, float_step, lambda module, inputs: tuple(inputs[0].shape))
    channels_last, _ = note_inputs(packed, plain_step, lambda module, inputs: _is_channels_last(inputs[0]))
    return {name: (shapes[name], channels_last.get(name, False)) for name in modules if name in shapes}


def _is_channels_last(x: Features) -> bool:
    x = x if isinstance(x, Tensor) else x[0]
    last = torch.channels_last
    return x.dim() == 4 and x.is_contiguous(memory_format=last) and not x.is_contiguous()


def _layer_timings(
    pair: Pair, inputs: Mapping[str, tuple[tuple[int, ...], bool]], rounds: int, limit: float
) -> list[LayerTiming]:
    """Time every packed layer and its float original on their own; equal layers are measured once.

    ``limit``: :func:`products_per_second`.
    """
    records = {record.name: record for record in pair.packed.layers}
    groups: dict[Any, list[str]] = {}
    for name, seen in inputs.items():
        record = records[name]
        groups.setdefault((record.geometry, record.spec, record.role, seen), []).append(name)
    timings = []
    for (geometry, spec, role, (shape, by_pixels)), names in groups.items():
        original = pair.float_model.unet.get_submodule(names[0])
        timing = _layer_timing(pair, names[0], shape, by_pixels, rounds)
        weight = tuple(original.weight.shape)  # type: ignore[union-attr, arg-type]
        products = layer_products(geometry, shape, spec.planes)
        timings.append(
            LayerTiming(tuple(names), role, _kind(original), weight, shape, timing, products, limit)
        )
    return timings


def _submodules(pair: Pair, name: str) -> tuple[nn.Module, nn.Module]:
    """Float and packed module of a name."""
    return pair.float_model.unet.get_submodule(name), pair.packed.unet.get_submodule(name)


def attention_timings(pair: Pair, plain_step: Callable[[], Tensor], rounds: int) -> list[LayerTiming]:
    """Time both networks' attention products on the packed one's inputs; equal ones are measured once."""
    products = {n: m for n, m in pair.packed.unet.named_modules() if isinstance(m, AttentionProduct)}
    seen, _ = note_inputs(products, plain_step, lambda module, inputs: inputs)
    groups: dict[Any, list[str]] = {}
    for name, inputs in seen.items():
        groups.setdefault(tuple(tuple(part.shape) for part in inputs[:3]), []).append(name)
    timings = []
    for (shape, *_), names in groups.items():
        original, packed = _submodules(pair, names[0])
        calls = [functools.partial(module, *seen[names[0]]) for module in (original, packed)]
        for call in calls:
            call()
        timing = alternate({"contiguous": calls[0]}, calls[1], rounds, pair.packed.device)
        kind = "binary scores" if hasattr(packed, "score_scale") else "float"
        timings.append(LayerTiming(tuple(names), "attention", kind, (), shape, timing))
    return timings


def _kind(layer: nn.Module) -> str:
    """Kind of a layer as text: 3x3, 3x3 stride 2, 1x1, linear."""
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return "linear" if isinstance(layer, nn.Linear) else type(layer).__name__
    stride = max(layer.stride)
    return shape_text(layer.kernel_size) + (f" stride {stride}" if stride > 1 else "")


def _layer_timing(pair: Pair, name: str, shape: tuple[int, ...], by_pixels: bool, rounds: int) -> Timing:
    (original, packed), device = _submodules(pair, name), pair.packed.device
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    forms = FORMATS if len(shape) == 4 else {"contiguous": torch.contiguous_format}
    calls: dict[str, Callable[[], Any]] = {}
    for form_name, form in forms.items():
        layer = copy.deepcopy(original).to(memory_format=form)  # type: ignore[call-overload]
        calls[form_name] = functools.partial(layer, x.contiguous(memory_format=form))
    x = x.contiguous(memory_format=torch.channels_last) if by_pixels else x
    packed_call: Callable[[], Any] = functools.partial(packed, x)
    for call in (*calls.values(), packed_call):
        call()
    return alternate(calls, packed_call, rounds, device)


def _sampling(pair: Pair, options: BenchOptions, form: str) -> Timing:
    """Time whole samplings, from noise to the last latents; fewer rounds where one takes long."""

    def run(model: DiffusionModel) -> Callable[[], Tensor]:
        labels = None if model.num_classes is None else 0
        count, condition = options.batch_size, model.example(options.batch_size)
        draw = functools.partial(sample, model, count, options.steps, labels=labels, batch_size=count)
        context = None if model.embeds_labels else condition.context
        return functools.partial(draw, context=context, condition=condition.concat)

    original, packed = run(pair.float_model), run(pair.packed)
    began = time.perf_counter()
    packed()
    rounds = 1 if time.perf_counter() - began > _LONG_SAMPLING else max(1, min(3, options.rounds))
    return alternate({form: original}, packed, rounds, pair.packed.device)


def _memory(pair: Pair, batch: int) -> dict[str, int]:
    shared = {"batch": batch, "device": str(pair.packed.device)}
    original = peak_memory({"metadata": pair.float_model.metadata(), **shared})["bytes"]
    packed = peak_memory({"packed": str(pair.path), "backend": pair.packed.backend, **shared})
    return {"float_bytes": original, "packed_bytes": packed["bytes"], "kernel_bytes": packed["kernels"]}


def machine(pair: Pair) -> dict[str, Any]:
    """Device, versions and date of a measurement."""
    device = pair.packed.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "backend": pair.packed.backend,
        "float_weights": pair.origin,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }

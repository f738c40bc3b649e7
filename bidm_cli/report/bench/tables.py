"""Tables of a benchmark, and plain sentences where packed is the slower side."""

from __future__ import annotations

from bidm_cli.report.bench.result import BenchResult, KindTiming, LayerTiming, Timing
from bidm_cli.report.pages.tables import Table, bytes_text, percent_text, ratio_text, seconds_text, shape_text


def speed_table(result: BenchResult) -> Table:
    """Whole step, whole sampling and peak memory."""
    rows = [(f"one step, batch {result.batch_size}", *_times(result.step))]
    if result.decoding is not None and result.picture is not None:
        rows.append(("decoding one picture", *_times(result.decoding)))
        whole = f"a whole picture: {result.picture_steps} steps and its decoding"
        rows.append((whole, *_times(result.picture)))
    if result.sampling is not None:
        rows.append((f"sampling, {result.sampling_steps} steps", *_times(result.sampling)))
    if result.memory is not None:
        sizes = [bytes_text(result.memory[key]) for key in ("float_bytes", "packed_bytes")]
        rows.append(("peak memory", *sizes, ratio_text(result.memory_ratio), ""))
    machine = result.machine
    note = (
        f"{machine['device']}, {machine['threads']} threads, backend {machine['backend']}; float: torch "
        f"{machine['torch']}, {result.step.float_format}, {machine['float_weights']}; medians, "
        "spread over single rounds"
    )
    return Table("Speed and memory", ["", "float32", "packed", "ratio", "spread"], rows, note=note)


def engine_table(result: BenchResult) -> Table:
    """One step of the original in torch and in other engines, against the packed one."""
    sides = {f"torch float32, {result.step.float_format}": result.step, **result.engines}
    rows = [(name, *_times(timing)) for name, timing in sides.items()]
    machine, engine = result.machine, result.machine["engine"]
    rows += [(name, reason, "", "", "") for name, reason in engine["left_out"].items()]
    note = (
        f"One step, batch {result.batch_size}, all sides in turn in one process, {machine['threads']} "
        f"threads; torch {machine['torch']}, OpenVINO {engine['openvino']}; int8 by nncf {engine['nncf']}, "
        f"calibrated on {engine['calibration']}"
    )
    return Table("Against other engines", ["engine", "step", "packed", "ratio", "spread"], rows, note=note)


def _times(timing: Timing) -> tuple[str, ...]:
    low, high = timing.spread
    return (*_medians(timing), f"{ratio_text(low)} to {ratio_text(high)}")


def _medians(timing: Timing | KindTiming) -> tuple[str, str, str]:
    both = seconds_text(timing.float_seconds), seconds_text(timing.packed_seconds)
    return (*both, ratio_text(timing.ratio))


def kind_table(result: BenchResult) -> Table:
    """Time per role and kind of layer, each layer on its own."""
    rows = [
        (kind.role, kind.kind, str(kind.layers), *_medians(kind), *_share(kind)) for kind in result.kinds()
    ]
    columns = ["role", "kind", "layers", "float32", "packed", "ratio", *_share_column(result)]
    note = ". ".join(filter(None, (_attention(result), _limit(result))))
    return Table("By kind of layer", columns, rows, frozenset({0, 1}), totals=1, note=note)


def _share_column(result: BenchResult) -> list[str]:
    return ["share of limit"] if any(layer.limit for layer in result.layers) else []


def _share(timing: KindTiming | LayerTiming) -> list[str]:
    return [percent_text(timing.share_of_limit, 1.0)] if timing.share_of_limit else []


def _limit(result: BenchResult) -> str:
    """Line about the limit that layers are measured by."""
    limit = result.layers[0].limit if result.layers else 0.0
    if not limit:
        return ""
    return (
        f"Limit: {limit / 1e9:,.0f} billion products of signs per second, the kernels' inner loop alone on "
        "data in the first-level cache; a layer's share has its packing, scales and shortcut in it"
    )


def _attention(result: BenchResult) -> str:
    """Line about attention's products."""
    if not result.attention:
        return ""
    whole = KindTiming.of("attention", "", result.attention)
    kinds = " and ".join(dict.fromkeys(product.kind for product in result.attention))
    before, after, ratio = _medians(whole)
    return f"Attention's {whole.layers} products ({kinds}): {before} to {after}, {ratio}"


def layer_speed_table(result: BenchResult) -> Table:
    """Every measured shape of layer."""
    rows = []
    for layer in result.layers:
        name = layer.names[0] + (f" and {len(layer.names) - 1} more" if len(layer.names) > 1 else "")
        shapes = shape_text(layer.weight), shape_text(layer.input)
        rows.append((name, layer.role, layer.kind, *shapes, *_times(layer.timing), *_share(layer)))
    columns = ["layer", "role", "kind", "weight", "input", "float32", "packed", "ratio", "spread"]
    columns += _share_column(result)
    return Table("Layers, each on its own", columns, rows, frozenset({0, 1, 2, 3, 4}))


def slower_notes(result: BenchResult) -> list[str]:
    """A plain sentence for each whole that is slower or larger packed than float or another engine."""
    notes = []
    sides = [("float", "one step", result.step), ("float", "decoding a picture", result.decoding)]
    sides += [("float", "whole sampling", result.sampling)]
    sides += [(name, "one step", timing) for name, timing in result.engines.items()]
    for other, whole, timing in sides:
        if timing is not None and timing.ratio < 1:
            before, after, ratio = _medians(timing)
            notes.append(
                f"Packed is SLOWER than {other} here: {whole} takes {after} against {before} ({ratio})."
            )
    if result.memory is not None and result.memory["packed_bytes"] > result.memory["float_bytes"]:
        notes.append("Packed takes MORE memory than float here.")
    return notes

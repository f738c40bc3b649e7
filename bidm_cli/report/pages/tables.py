"""Tables of a report as data: the terminal and the page show the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bidm_cli.recipe.spec import BinarySpec
from bidm_cli.report.cost.cost import Cost, LayerCost
from bidm_cli.report.cost.file_sizes import FileSizes
from bidm_cli.report.cost.operations import ITEMS


@dataclass(frozen=True)
class Table:
    """Rows of texts under column names.

    Attributes:
        left: columns that hold words and are aligned to the left; the others hold numbers.
        totals: number of rows at the end that are sums.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[int] = frozenset({0})
    totals: int = 0
    note: str = ""

    def to_text(self) -> str:
        """Aligned plain text, two spaces between columns, a rule under the names and above the sums."""
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]

        def line(row: Sequence[str]) -> str:
            padded = [
                cell.ljust(width) if i in self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            return "  ".join(padded).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        body = [line(row) for row in self.rows]
        if self.totals:
            body.insert(len(body) - self.totals, rule)
        lines = [self.title, rule, line(self.columns), rule, *body]
        return "\n".join(lines + ([self.note] if self.note else []))

    def is_wide(self, column: int) -> bool:
        """True if a cell of the column is over 48 characters long."""
        return any(len(row[column]) > 48 for row in self.rows)


_BYTES = (
    (10_000, 1, "{:,.0f} B"),
    (2000 * 2**10, 2**10, "{:.1f} KiB"),
    (2000 * 2**20, 2**20, "{:.1f} MiB"),
    (math.inf, 2**30, "{:.1f} GiB"),
)
_COUNTS = (
    (1000, 1, "{:.0f}"),
    (999.95e3, 1e3, "{:.1f} K"),
    (999.95e6, 1e6, "{:.1f} M"),
    (999.95e9, 1e9, "{:.2f} G"),
    (math.inf, 1e12, "{:.2f} T"),
)
_DURATIONS = (
    (2, 1e-3, "{:.3g} ms"),
    (120, 1, "{:.1f} s"),
    (7200, 60, "{:.1f} min"),
    (2 * 86400, 3600, "{:.1f} h"),
    (math.inf, 86400, "{:.1f} days"),
)
_SECONDS = ((999.5e-6, 1e-6, "{:.3g} us"), (999.5e-3, 1e-3, "{:.3g} ms"), (math.inf, 1, "{:.3g} s"))


def unit_text(value: float, units: Sequence[tuple[float, float, str]]) -> str:
    """Format with the first of ``units`` (limit, size, format) whose limit is above the value."""
    size, form = next((size, form) for limit, size, form in units if value < limit)
    return form.format(value / size)


def bytes_text(count: float) -> str:
    """Format bytes: 1,234 B, 36.9 KiB, 1045.4 MiB."""
    return unit_text(count, _BYTES)


def count_text(count: float) -> str:
    """Format a count: 812, 3.4 K, 27.1 M, 96.02 G."""
    return unit_text(count, _COUNTS)


def seconds_text(seconds: float) -> str:
    """Format a time: 12.3 us, 4.56 ms, 1.23 s."""
    return unit_text(seconds, _SECONDS)


def duration_text(seconds: float) -> str:
    """Format a time that people wait: 58 ms, 12.3 s, 4.5 min, 3.2 h, 2.1 days."""
    return unit_text(seconds, _DURATIONS)


def ratio_text(ratio: float) -> str:
    """Format a ratio: 54.7x."""
    return f"{ratio:.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


def percent_text(part: float, whole: float) -> str:
    """Format a share; empty if the whole is 0."""
    return f"{100 * part / whole:.1f} %" if whole else ""


def spec_text(spec: BinarySpec | None) -> str:
    """Parts of a binary layer in the papers' letters: "w1a1 alpha K tau tile"."""
    if spec is None:
        return ""
    parts = [f"w1a{spec.planes}" if spec.activations == "binary" else "w1a32"]
    parts += {"channel": ["alpha"], "layer": ["alpha(layer)"], "none": []}[spec.weight_scale]
    if spec.activations == "binary":
        parts += {"learnable": ["K"], "fixed": ["K(fixed)"], "none": []}[spec.activation_scale]
        parts += ["tau"] if spec.threshold == "learnable" else []
    return " ".join(parts + ([] if spec.shortcut == "none" else [spec.shortcut]))


def shape_text(shape: Iterable[int]) -> str:
    """Format a shape: 3x64x3x3."""
    return "x".join(str(size) for size in shape)


def cost_tables(cost: Cost, sizes: FileSizes | None, layers: bool) -> list[Table]:
    """Tables of a network and its file; every layer if asked for."""
    tables = [layer_table(cost)] if layers else []
    tables.append(role_table(cost))
    tables += [breakdown_table(cost), savings_table(cost)] if cost.binary_layers else []
    return tables + ([] if sizes is None else [file_table(sizes)])


def savings_table(cost: Cost) -> Table:
    """Storage and operations of the network before and after, in both conventions."""
    with_attention = cost.macs_with_attention, cost.ops_with_attention
    compared = [
        ("storage of the network", bytes_text, cost.float_bytes, cost.packed_bytes),
        ("operations, the paper's convention", count_text, cost.macs, cost.ops),
        ("operations with attention's products", count_text, *with_attention),
    ]
    if cost.parts:
        whole = f"storage with the {' and the '.join(part.name for part in cost.parts)}"
        compared.append((whole, bytes_text, cost.whole_float_bytes, cost.whole_packed_bytes))
    rows = [
        (name, text(before), text(after), ratio_text(before / after))
        for name, text, before, after in compared
    ]
    return Table("Savings (one sample, one step)", ["", "float32", "packed", "saved"], rows)


def breakdown_table(cost: Cost) -> Table:
    """Breakdown of the binary network's operations, with the rule of each item."""
    total = cost.ops_with_attention
    rows = [
        (item.replace("_", " "), count_text(count), percent_text(count, total), ITEMS[item])
        for item, count in cost.breakdown().items()
    ]
    rows.append(("total with attention", count_text(total), percent_text(total, total), ""))
    columns = ["operations of the packed network", "count", "share", "what is counted"]
    return Table("Where the operations go", columns, rows, frozenset({0, 3}), totals=1)


def role_table(cost: Cost) -> Table:
    """Layers by role."""
    groups: dict[tuple[str, str], list[LayerCost]] = {}
    for row in cost.rows:
        groups.setdefault((row.role, row.kind), []).append(row)
    rows = [((role, kind, str(len(group))), group) for (role, kind), group in groups.items()]
    total = ("total with attention", "", str(len(cost.rows)))
    return _cost_table("By role", ("role", "kind", "count"), [*rows, (total, cost.rows)], cost, words=2)


def layer_table(cost: Cost) -> Table:
    """Every layer with role, shape, multiply-accumulates, bytes and operations, and the sums."""
    rows = [(_layer_words(row), [row]) for row in cost.rows]
    columns = ("layer", "role", "kind", "weight", "output")
    total = ("total with attention", "", "", "", "")
    return _cost_table("Layers", columns, [*rows, (total, cost.rows)], cost, words=5)


def _layer_words(row: LayerCost) -> tuple[str, ...]:
    kind = "float" if row.spec is None and row.kind == "float" else spec_text(row.spec) or row.kind
    return row.name, row.role, kind, shape_text(row.shape), shape_text(row.output[1:])


def _cost_table(
    title: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[tuple[str, ...], Sequence[LayerCost]]],
    cost: Cost,
    words: int,
) -> Table:
    """Table of first cells and sums over layers, the total last; a float network has no packed columns."""
    sums = {"MACs": (count_text, "macs"), "float32": (bytes_text, "float_bytes")}
    if cost.binary_layers:
        sums |= {"packed": (bytes_text, "packed_bytes"), "BOPs": (count_text, "bops")}
        sums |= {"float ops": (count_text, "float_ops")}
    filled = [
        (*cells, *(text(sum(getattr(layer, name) for layer in layers)) for text, name in sums.values()))
        for cells, layers in rows
    ]
    return Table(title, [*columns, *sums], filled, frozenset(range(words)), totals=1)


def file_table(sizes: FileSizes) -> Table:
    """Bytes of a packed file by part."""
    parts = {
        "denoising network": sizes.network,
        "first stage": sizes.first_stage,
        "conditioner": sizes.conditioner,
        "header and table": sizes.header,
    }
    rows = [(name, f"{size:,}", percent_text(size, sizes.total)) for name, size in parts.items() if size]
    rows.append(("whole file", f"{sizes.total:,}", ""))
    return Table("File", ["part", "bytes", "share"], rows, totals=1)

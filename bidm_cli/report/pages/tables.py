"""Tables of a report as data: the terminal and the page show the same ones.

table = layer_table(cost)
print(table.to_text())
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
    note: str = field(default="")

    def to_text(self) -> str:
        """Aligned plain text, two spaces between columns, a rule under the names and above the sums."""
        widths = [
            max(len(str(row[i])) for row in [self.columns, *self.rows]) for i in range(len(self.columns))
        ]

        def line(cells: Sequence[str]) -> str:
            parts = [
                cell.ljust(width) if i in self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(parts).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        body = [line(row) for row in self.rows]
        if self.totals:
            body.insert(len(body) - self.totals, rule)
        lines = [self.title, rule, line(self.columns), rule, *body]
        return "\n".join(lines + ([self.note] if self.note else []))


def bytes_text(count: float) -> str:
    """Format bytes in the unit that suits: 1,234 B, 36.9 KiB, 1045.4 MiB."""
    if count < 10_000:
        return f"{count:,.0f} B"
    unit = next((i for i in (1, 2) if count < 2000 * 1024**i), 3)
    return f"{count / 1024**unit:.1f} {('KiB', 'MiB', 'GiB')[unit - 1]}"


def count_text(count: float) -> str:
    """Format a count in the unit that suits: 812, 3.4 K, 27.1 M, 96.02 G."""
    if count < 1000:
        return f"{count:.0f}"
    for unit, size, digits in (("K", 1e3, 1), ("M", 1e6, 1), ("G", 1e9, 2), ("T", 1e12, 2)):
        if count < size * 999.95 or unit == "T":
            return f"{count / size:.{digits}f} {unit}"
    raise AssertionError("unreachable")


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
    parts = ["w1a1" if spec.activations == "binary" else "w1a32"]
    parts += {"channel": ["alpha"], "layer": ["alpha(layer)"], "none": []}[spec.weight_scale]
    if spec.activations == "binary":
        parts += {"learnable": ["K"], "fixed": ["K(fixed)"], "none": []}[spec.activation_scale]
        parts += ["tau"] if spec.threshold == "learnable" else []
    return " ".join(parts + ([] if spec.shortcut == "none" else [spec.shortcut]))


def shape_text(shape: Iterable[int]) -> str:
    """Format a shape: 3x64x3x3."""
    return "x".join(str(size) for size in shape)


def savings_table(cost: Cost) -> Table:
    """Storage and operations of the network before and after, in both conventions."""
    with_attention = cost.macs_with_attention, cost.ops_with_attention
    compared = [
        ("storage of the network", bytes_text, cost.float_bytes, cost.packed_bytes),
        ("operations, the paper's convention", count_text, cost.macs, cost.ops),
        ("operations with attention's products", count_text, *with_attention),
    ]
    rows: list[Sequence[str]] = [
        (name, text(before), text(after), ratio_text(before / after))
        for name, text, before, after in compared
    ]
    return Table("Savings (one sample, one step)", ["", "float32", "packed", "saved"], rows)


def breakdown_table(cost: Cost) -> Table:
    """Breakdown of the binary network's operations, with the rule of each item."""
    rules = {
        "binary (BOPs / 64)": "binary multiply-accumulates, 64 to one operation",
        "float layers": "multiply-accumulates of the layers that stay float",
        "attention products": "what is float of softmax(q k) v; only in the figures with attention",
    }
    total = cost.ops_with_attention
    rows: list[Sequence[str]] = [
        (item.replace("_", " "), count_text(count), percent_text(count, total), (rules | ITEMS)[item])
        for item, count in cost.breakdown().items()
    ]
    rows.append(("total with attention", count_text(total), percent_text(total, total), ""))
    columns = ["operations of the packed network", "count", "share", "what is counted"]
    return Table("Where the operations go", columns, rows, frozenset({0, 3}), totals=1)


def role_table(cost: Cost) -> Table:
    """Layers by role."""
    groups: dict[tuple[str, str], list[LayerCost]] = {}
    every = [*cost.layers, *cost.others, *cost.attention]
    for row in every:
        groups.setdefault((row.role, row.kind), []).append(row)
    rows: list[Sequence[str]] = [
        (role, kind, str(len(found)), *_numbers(found, cost)) for (role, kind), found in groups.items()
    ]
    rows.append(("total with attention", "", str(len(every)), *_numbers(every, cost)))
    columns = ["role", "kind", "count", *_number_columns(cost)]
    return Table("By role", columns, rows, frozenset({0, 1}), totals=1)


def layer_table(cost: Cost) -> Table:
    """Every layer with role, shape, multiply-accumulates, bytes and operations, and the sums."""
    every = [*cost.layers, *cost.others, *cost.attention]
    rows: list[Sequence[str]] = [(*_words(row), *_numbers([row], cost)) for row in every]
    rows.append(("total with attention", "", "", "", "", *_numbers(every, cost)))
    columns = ["layer", "role", "kind", "weight", "output", *_number_columns(cost)]
    return Table("Layers", columns, rows, frozenset({0, 1, 2, 3, 4}), totals=1)


def _words(row: LayerCost) -> tuple[str, ...]:
    made = "float" if row.spec is None and row.kind == "float" else spec_text(row.spec) or row.kind
    return row.name, row.role, made, shape_text(row.shape), shape_text(row.output[1:])


def _number_columns(cost: Cost) -> list[str]:
    """A float network has no second half to compare with."""
    return ["MACs", "float32", *(["packed", "BOPs", "float ops"] if cost.binary_layers else [])]


def _numbers(rows: Sequence[LayerCost], cost: Cost) -> tuple[str, ...]:
    numbers = [count_text(sum(row.macs for row in rows)), bytes_text(sum(row.float_bytes for row in rows))]
    if cost.binary_layers:
        numbers.append(bytes_text(sum(row.packed_bytes for row in rows)))
        numbers += [count_text(sum(row.bops for row in rows)), count_text(sum(row.float_ops for row in rows))]
    return tuple(numbers)


def file_table(sizes: FileSizes) -> Table:
    """Bytes of a packed file by part."""
    parts = [
        ("denoising network", sizes.network),
        ("first stage", sizes.first_stage),
        ("conditioner", sizes.conditioner),
        ("header and table", sizes.header),
    ]
    rows: list[Sequence[str]] = [
        (name, f"{size:,}", percent_text(size, sizes.total)) for name, size in parts if size
    ]
    rows.append(("whole file", f"{sizes.total:,}", ""))
    return Table("File", ["part", "bytes", "share"], rows, totals=1)

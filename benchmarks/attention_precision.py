"""Samples with bfloat16 products of attention against float32, from the same noise.

    python benchmarks/attention_precision.py faces -n 512 --files faces-w1a1.bidm faces-w1a2.bidm

Each packed file is sampled with float32 and bfloat16 products, and with float32 by torch's operations, which
round elsewhere: what differs there is what rounding alone does. "Apart": mean squared distance of the final
latents to those of the first. "Free error": to the original's from the same noise. FD to the data. Needs a
processor with a matrix unit; elsewhere bfloat16 is computed as float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import calm_openmp  # noqa: F401
from ablation_domains import DOMAINS
from ablation_score import Judge
from record import RESULTS, record

import bidm_cli
from bidm_cli.cli.threads import available_cores, use_threads
from bidm_cli.packed.precision import precision_of, use_precision
from bidm_cli.report.metrics.compare import compare

SAMPLER, STEPS = "dpm++", 20
FORMS = {"float32": ("numba", "float32"), "bfloat16": ("numba", "bfloat16"), "by torch": ("torch", "float32")}
"""(backend, precision)."""


def rows_of(path: Path, judge: Judge) -> dict[str, dict[str, float | str]]:
    """Numbers of each form of a packed file."""
    rows, first = {}, None
    for form, (backend, precision) in FORMS.items():
        model = bidm_cli.load_packed(path, backend=backend)
        use_precision(model, precision)
        drawn = judge.drawn(model, f"{path.stem}-{form.replace(' ', '-')}", SAMPLER, STEPS)
        first = drawn.latents if first is None else first
        rows[f"{path.stem}, {form}"] = {
            "precision": precision_of(model)[0],
            "apart": float((drawn.latents - first).square().mean()),
            "free_error": float((drawn.latents - judge.original.latents).square().mean()),
            "fd_data": compare(drawn.statistics, judge.reference, judge.network).values["value"],
        }
    return rows


def main() -> None:
    """Print the numbers of all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("domain", choices=DOMAINS)
    parser.add_argument("--files", nargs="+", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/precision"))
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("-n", type=int, default=512)
    parser.add_argument("--record", action="store_true", help="append the rows to attention_precision.jsonl")
    chosen = parser.parse_args()
    use_threads(chosen.threads)
    chosen.work.mkdir(parents=True, exist_ok=True)
    judge = Judge(DOMAINS[chosen.domain], chosen.n, chosen.work, SAMPLER, STEPS)
    rows = {}
    for path in chosen.files:
        rows |= rows_of(path, judge)
    for name, numbers in rows.items():
        print(name, numbers, flush=True)
    if chosen.record:
        record(RESULTS / "attention_precision.jsonl", rows, domain=chosen.domain, n=chosen.n)


if __name__ == "__main__":
    main()

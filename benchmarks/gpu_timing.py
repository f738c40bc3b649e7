"""Shared parts of gpu_layers.py and gpu_unet.py: options, CUDA graphs, events, medians, results as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from record import add_record_option, record
from torch import Tensor

from bidm_cli.packed.recording.cuda_graph import CudaRecorder

TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

BEYOND_CACHE = 256 << 20
"""Bytes of inputs that are cycled through: several times a second-level cache."""


def options_of(doc: str, name: str, **more: dict[str, Any]) -> argparse.Namespace:
    """Parse the options that both scripts take, and ``more``: keyword arguments by option."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--type", choices=TYPES, default="float16", help="of the packed side's floats")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    add_record_option(parser, name)
    for option, arguments in more.items():
        parser.add_argument(f"--{option.replace('_', '-')}", **arguments)
    return parser.parse_args()


def write_rows(options: argparse.Namespace, key: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows where the options say; text and batch name a measurement, the rest are numbers."""
    if options.json:
        options.json.write_text(json.dumps({"gpu": describe_gpu(), key: rows}, indent=1))
    if options.record:
        named = {f"{row.get('layer', 'step')}, batch {row['batch']}, {options.type}": row for row in rows}
        record(options.record, named, gpu=describe_gpu())


def require_gpu() -> None:
    """Exit with one line where the kernels cannot run."""
    from bidm_cli.packed.choose import why_not

    reason = why_not("cupy", "cuda")
    if reason:
        sys.exit(f"This needs an NVIDIA GPU with cupy: {reason}.")


def describe_gpu() -> str:
    """Name, architecture and multiprocessors of the first GPU."""
    about = torch.cuda.get_device_properties(0)
    return f"{about.name}, sm_{about.major}{about.minor}, {about.multi_processor_count} multiprocessors"


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """``run``, captured as a CUDA graph after a warm-up."""
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    return recorder(run, ()).replay  # type: ignore[arg-type]


def microseconds(replays: Sequence[Callable[[], object]], rounds: int, calls: int = 1) -> list[float]:
    """Median microseconds per call of each side, the sides in turn; a replay makes ``calls`` calls."""
    times: list[list[float]] = [[] for _ in replays]
    for replay in replays:
        replay()
    for _ in range(rounds):
        for side, replay in enumerate(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            times[side].append(1e3 * start.elapsed_time(end) / calls)
    return [statistics.median(found) for found in times]


def copies_beyond_cache(x: Tensor) -> list[Tensor]:
    """Copies of an input, enough that none is still in the cache when its turn comes again."""
    count = min(64, max(2, -(-BEYOND_CACHE // x.nbytes)))
    return [x.clone() for _ in range(count)]

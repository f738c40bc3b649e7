"""Timing on a GPU, for gpu_layers.py and gpu_unet.py: CUDA graphs, events, medians."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BEYOND_CACHE = 256 << 20
"""Bytes of inputs that are cycled through: several times a second-level cache."""


def require_gpu() -> None:
    """Exit with one line where the kernels cannot run."""
    from bidm_cli.packed.choose import why_not

    reason = why_not("cupy", "cuda")
    if reason:
        sys.exit(f"This needs an NVIDIA GPU with cupy: {reason}.")


def describe_gpu() -> str:
    about = torch.cuda.get_device_properties(0)
    return f"{about.name}, sm_{about.major}{about.minor}, {about.multi_processor_count} multiprocessors"


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def microseconds(replays: Sequence[Callable[[], None]], rounds: int, calls: int = 1) -> list[float]:
    """Median microseconds a call of each side, the sides in turn; a replay makes ``calls`` calls."""
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

"""CUDA graphs of a network's step: at small batches a GPU waits for launches more than it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bidm_cli.packed.recording.recorder import CannotRecord, Recorded
from cupy_kernels.compiler import first_line


class CudaRecorder:
    """Recorder by torch.cuda.CUDAGraph; all graphs share one pool, as only one runs at a time."""

    what = "a CUDA graph"
    runs_first = False  # it runs the step itself, as often as graphs need it

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Recorded:
        # torch.cuda works on the current device, which need not be the model's.
        with torch.cuda.device(self.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            # Before its capture a step must have run: kernels are compiled and loaded, tables are made.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=side):
                    output = run()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise CannotRecord(first_line(error)) from error
        return Recorded(graph.replay, output)

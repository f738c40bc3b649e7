"""Post-training quantization of an OpenVINO graph by nncf, as a process of its own:

    python -m bidm_cli.report.bench.quantize FOLDER INT8.xml

FOLDER holds the graph and the inputs to calibrate on. Needs the extra ``openvino``.
"""

from __future__ import annotations

import itertools
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

GRAPH, INPUTS = "graph.xml", "inputs.npz"
"""Files of the folder: the float graph, and its inputs by "batch/number"."""


def main(folder: Path, into: Path) -> None:
    """Write ``folder``'s graph in 8 bits, weights and activations."""
    warnings.simplefilter("ignore")
    # nncf's import has torch ask for CUDA, aloud.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    batches = _batches(folder / INPUTS)
    dataset = nncf.Dataset(batches)
    graph = nncf.quantize(openvino.Core().read_model(folder / GRAPH), dataset, subset_size=len(batches))
    openvino.save_model(graph, into, compress_to_fp16=False)


def _batches(path: Path) -> list[list[Any]]:
    with np.load(path) as inputs:
        names = itertools.groupby(sorted(inputs.files), lambda name: name.partition("/")[0])
        return [[inputs[name] for name in group] for _, group in names]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))

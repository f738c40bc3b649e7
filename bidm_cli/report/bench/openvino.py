"""The float network in OpenVINO, the engine that a user with a CPU would take, at its three precisions.

    engines = openvino_engines(pair.float_model, batch=1)
    engines.calls                                        # {"OpenVINO float32": a step to call, ...}

Needs the extra ``openvino`` (openvino and nncf, from PyPI). int8 is nncf's post-training quantization of
weights and activations, calibrated on a few dozen inputs of noise at random timesteps, not on samples: it is
timed here, and its pictures are nobody's. Quantization runs in a process of its own, which OpenVINO has been
seen to end (LSUN-Churches, 2026.4).
"""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.report.bench import quantize
from bidm_cli.report.bench.quantize import GRAPH, INPUTS

_LARGEST_ERROR = 0.01
"""Of OpenVINO's float32 output against torch's, relative to its largest value."""
_CALIBRATION = 24
"""Images that int8 is calibrated on."""

PRECISIONS = ("float32", "bfloat16", "int8")


class Engines(NamedTuple):
    """Steps to call by name, each having run twice, and why others are left out."""

    calls: dict[str, Callable[[], Any]]
    left_out: dict[str, str]

    def about(self) -> dict[str, Any]:
        """Versions, how int8 was calibrated, and what was left out and why, for results."""
        return {
            "openvino": version("openvino"),
            "nncf": version("nncf"),
            "calibration": f"{_CALIBRATION} images of noise at random timesteps",
            "left_out": self.left_out,
        }


def openvino_engines(
    model: DiffusionModel,
    batch: int,
    say: Callable[[str], None] = lambda line: None,
    precisions: Sequence[str] = PRECISIONS,
    kept: Path | None = None,
) -> Engines:
    """One denoising step of ``model`` for ``batch`` images, on torch's number of threads.

    bfloat16 is left out where the CPU has no arithmetic for it, and int8 where it cannot be quantized.

    ``kept``: an .xml file, the int8 graph of this model and batch; written if it is not there.

    Raises:
        BidmError: the extra is not installed, the model is not on the CPU, or OpenVINO cannot run it.
    """
    openvino = _installed()
    if model.device.type != "cpu":
        raise BidmError(f"OpenVINO is compared on the CPU, and this model is on {model.device}; give cpu")
    inputs = _inputs(model, batch)
    graph = _converted(openvino, model.unet, inputs)
    core, feed = openvino.Core(), [value.numpy() for value in inputs.values()]
    calls: dict[str, Callable[[], Any]] = {}
    left_out = {} if _has_bfloat16(core) else {"OpenVINO bfloat16": "this CPU has no arithmetic for it"}
    for name, hint in {"float32": "f32", "bfloat16": "bf16"}.items():
        if name in precisions and f"OpenVINO {name}" not in left_out:
            calls[f"OpenVINO {name}"] = _request(core, graph, feed, hint)
    if "float32" in precisions:
        _check(calls["OpenVINO float32"], model.unet, inputs)
    if "int8" in precisions:
        with tempfile.TemporaryDirectory() as folder:
            quantized = kept or Path(folder) / "int8.xml"
            if not quantized.is_file():
                say(f"OpenVINO: quantizing to int8, calibrated on {_CALIBRATION} images of noise")
                openvino.save_model(graph, Path(folder) / GRAPH, compress_to_fp16=False)
                np.savez(Path(folder) / INPUTS, **_calibration(model, feed))
                problem = _quantize(Path(folder), quantized)
                left_out |= {"OpenVINO int8": problem} if problem else {}
            if quantized.is_file():
                calls["OpenVINO int8"] = _request(core, core.read_model(quantized), feed)
    for call in calls.values():
        call(), call()
    return Engines(calls, left_out)


def _has_bfloat16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class _ByPosition(nn.Module):
    """A network whose inputs are the tensors of ``names`` in this order; the others are None."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *values: Tensor) -> Tensor:
        inputs = dict(zip(self.names, values, strict=True))
        return self.network(inputs["x"], inputs["t"], inputs.get("context"), inputs.get("y"))


def _installed() -> Any:
    """The module openvino."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import openvino

            version("nncf")
    except ImportError as error:
        raise BidmError(
            f"{error.name or 'openvino'} is not installed; to compare with OpenVINO: "
            'pip install "bidm[openvino]" (in a clone: pip install ".[openvino]")'
        ) from error
    return openvino


def _inputs(model: DiffusionModel, batch: int) -> dict[str, Tensor]:
    """Inputs of one step by name, as bidm's own step takes them."""
    generator, condition = torch.Generator().manual_seed(0), model.example(batch)
    x = condition.join(torch.randn(batch, *model.sample_shape, generator=generator))
    t = model.network_time(torch.full((batch,), model.schedule.timesteps // 2))
    inputs = {"x": x, "t": t, "context": condition.context, "y": condition.y}
    return {name: value for name, value in inputs.items() if value is not None}


def _converted(openvino: Any, network: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """OpenVINO's graph of the network, for these shapes alone."""
    module = _ByPosition(network.eval(), tuple(inputs))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the tracer's, about shapes, which are fixed here
            graph = openvino.convert_model(module, example_input=tuple(inputs.values()))
            shapes = {i: openvino.PartialShape(list(v.shape)) for i, v in enumerate(inputs.values())}
            graph.reshape(shapes)
    except Exception as error:  # of many kinds, by the graph's operations
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BidmError(f"OpenVINO cannot convert this network: {first}") from error
    return graph


def _request(core: Any, graph: Any, feed: list[Any], precision: str | None = None) -> Callable[[], Any]:
    """A step, compiled for latency on as many threads as torch has."""
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        options["INFERENCE_PRECISION_HINT"] = precision
    return functools.partial(core.compile_model(graph, "CPU", options).create_infer_request().infer, feed)


def _calibration(model: DiffusionModel, feed: list[Any]) -> dict[str, Any]:
    """Inputs of the graph, "batch/input" by their numbers: noise at random timesteps."""
    generator, inputs = torch.Generator().manual_seed(1), dict[str, Any]()
    for batch in range(-(-_CALIBRATION // len(feed[0]))):
        x = torch.randn(feed[0].shape, generator=generator)
        t = torch.randint(model.schedule.timesteps, (len(x),), generator=generator)
        values = [x.numpy(), model.network_time(t).numpy(), *feed[2:]]
        inputs |= {f"{batch:04}/{i}": value for i, value in enumerate(values)}
    return inputs


def _quantize(folder: Path, into: Path) -> str:
    """Write the graph of ``folder`` in 8 bits, weights and activations, to ``into``; a reason if it fails."""
    command = [sys.executable, "-m", quantize.__name__, str(folder), str(into)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.returncode:
        return ""
    if done.returncode < 0:
        return f"its quantization was ended by {signal.Signals(-done.returncode).name}"
    last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"its quantization failed: {last}"


@torch.no_grad()
def _check(call: Callable[[], Any], network: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Refuse to time a graph that computes something else."""
    expected = _ByPosition(network, tuple(inputs))(*inputs.values())
    found = torch.from_numpy(next(iter(call().values())).copy())
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < _LARGEST_ERROR:
        raise BidmError(f"OpenVINO's float32 output differs from torch's by {error:.2g} of the largest value")

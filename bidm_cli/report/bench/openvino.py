"""The float network in OpenVINO, the engine that a user with a CPU would take, at its three precisions.

    calls = openvino_calls(pair.float_model, batch=1)    # {"OpenVINO float32": a step to call, ...}

Needs the extra ``openvino`` (openvino and nncf, from PyPI). int8 is nncf's post-training quantization of
weights and activations, calibrated on a few dozen inputs of noise at random timesteps, not on samples: it is
timed here, and its pictures are nobody's.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError

_LARGEST_ERROR = 0.01
"""Of OpenVINO's float32 output against torch's, relative to its largest value."""
_CALIBRATION = 24
"""Images that int8 is calibrated on."""

PRECISIONS = ("float32", "bfloat16", "int8")


def openvino_calls(
    model: DiffusionModel,
    batch: int,
    say: Callable[[str], None] = lambda line: None,
    precisions: Sequence[str] = PRECISIONS,
    kept: Path | None = None,
) -> dict[str, Callable[[], Any]]:
    """One denoising step of ``model`` for ``batch`` images by name, each having run twice, on torch's number
    of threads. bfloat16 is left out where the CPU has no arithmetic for it (:func:`left_out`).

    ``kept``: an .xml file, the int8 graph of this model and batch; written if it is not there.

    Raises:
        BidmError: the extra is not installed, the model is not on the CPU, or OpenVINO cannot run it.
    """
    openvino, nncf = _installed()
    if model.device.type != "cpu":
        raise BidmError(f"OpenVINO is compared on the CPU, and this model is on {model.device}; give cpu")
    inputs = _inputs(model, batch)
    graph = _converted(openvino, model.unet, inputs)
    core, feed = openvino.Core(), [value.numpy() for value in inputs.values()]
    calls: dict[str, Callable[[], Any]] = {}
    for name, hint in {"float32": "f32", "bfloat16": "bf16"}.items():
        if name in precisions and name not in left_out():
            calls[f"OpenVINO {name}"] = _request(core, graph, feed, hint)
    if "float32" in precisions:
        _check(calls["OpenVINO float32"], model.unet, inputs)
    if "int8" in precisions:
        if kept is None or not kept.is_file():
            say(f"OpenVINO: quantizing to int8, calibrated on {_CALIBRATION} images of noise")
            graph = _quantized(nncf, graph, feed, model)
            if kept is not None:
                openvino.save_model(graph, kept, compress_to_fp16=False)
        calls["OpenVINO int8"] = _request(core, graph if kept is None else core.read_model(kept), feed)
    for call in calls.values():
        call(), call()
    return calls


def left_out() -> dict[str, str]:
    """Precisions that this CPU has no arithmetic for, with the reason; OpenVINO would compute in float32."""
    openvino, _ = _installed()
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return {}
    return {"bfloat16": "this CPU has no arithmetic for it"}


def about() -> dict[str, Any]:
    """Versions, how int8 was calibrated, and what was left out and why, for results."""
    return {
        "openvino": version("openvino"),
        "nncf": version("nncf"),
        "calibration": f"{_CALIBRATION} images of noise at random timesteps",
        "left_out": {f"OpenVINO {name}": reason for name, reason in left_out().items()},
    }


class _ByPosition(nn.Module):
    """A network whose inputs are the tensors of ``names`` in this order; the others are None."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *values: Tensor) -> Tensor:
        inputs = dict(zip(self.names, values, strict=True))
        return self.network(inputs["x"], inputs["t"], inputs.get("context"), inputs.get("y"))


def _installed() -> tuple[Any, Any]:
    torch_tools = logging.getLogger("torch.utils.cpp_extension")  # nncf's import has it ask for CUDA, aloud
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_tools.setLevel(logging.ERROR)
            import nncf
            import openvino
    except ImportError as error:
        raise BidmError(
            f"{error.name or 'openvino'} is not installed; to compare with OpenVINO: "
            'pip install "bidm[openvino]" (in a clone: pip install ".[openvino]")'
        ) from error
    nncf.set_log_level(logging.ERROR)
    return openvino, nncf


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


def _quantized(nncf: Any, graph: Any, feed: list[Any], model: DiffusionModel) -> Any:
    """``graph`` in 8 bits, weights and activations, calibrated on noise at random timesteps."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(-(-_CALIBRATION // len(feed[0]))):
        x = torch.randn(feed[0].shape, generator=generator)
        t = torch.randint(model.schedule.timesteps, (len(x),), generator=generator)
        batches.append([x.numpy(), model.network_time(t).numpy(), *feed[2:]])
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(graph, nncf.Dataset(batches), subset_size=len(batches))


@torch.no_grad()
def _check(call: Callable[[], Any], network: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Refuse to time a graph that computes something else."""
    expected = _ByPosition(network, tuple(inputs))(*inputs.values())
    found = torch.from_numpy(next(iter(call().values())).copy())
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < _LARGEST_ERROR:
        raise BidmError(f"OpenVINO's float32 output differs from torch's by {error:.2g} of the largest value")

"""Peak memory of a network, measured in a separate process.

    peak_memory({"packed": "model.bidm", "backend": "auto", "batch": 1, "device": "cpu"})

The process imports everything and compiles its kernels on a small layer first. The peak is the highest
resident size while it opens the model and denoises a few steps, over the size just before: network and
activations. The kernels are counted apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bidm_cli.errors import BidmError
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.packed.choose import choose_backend
from bidm_cli.packed.format.layer_table import LayerRecord
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.layers import PackedLayer
from bidm_cli.recipe.spec import BinarySpec
from bidm_cli.report.bench.models import with_random_weights
from bidm_cli.report.bench.step import step_call, warm_up

_SECONDS = 1800


def peak_memory(network: dict[str, Any]) -> dict[str, int]:
    """Peak memory of a packed file (keys ``packed``, ``backend``) or of a float network with random weights
    (``metadata``), for ``batch`` images on ``device``: {"bytes": ..., "kernels": ...}.

    Raises:
        BidmError: the process failed or ran out of memory.
    """
    # The package may be found through the caller's path alone (a checkout that is not installed).
    root = str(Path(__file__).resolve().parents[3])
    code = f"import sys; sys.path.insert(0, {root!r}); from {__name__} import main; main()"
    command, text = [sys.executable, "-c", code], json.dumps(network)
    try:
        process = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_SECONDS)
        measured = json.loads(process.stdout.strip().splitlines()[-1])
        return {key: int(measured[key]) for key in ("bytes", "kernels")}
    except subprocess.TimeoutExpired as error:
        raise BidmError(f"measuring peak memory took over {_SECONDS // 60} minutes") from error
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise BidmError("the process that measures peak memory failed; it may have run out of it") from error


def main() -> None:
    """Read the network's description from standard input, measure, and print the result as JSON."""
    network = json.loads(sys.stdin.read())
    packed, backend, device = network.get("packed"), network.get("backend"), network["device"]
    cuda = device.startswith("cuda")
    start = 0 if cuda else _restart_peak()
    if packed:
        compile_kernels(backend, device)
    before = 0 if cuda else _restart_peak()
    if packed:
        model: Any = load_packed(packed, device=device, backend=backend)
    else:
        model = with_random_weights(network["metadata"]).to(device)
    with torch.no_grad():
        warm_up(step_call(model, network["batch"]))
    peak = torch.cuda.max_memory_allocated() if cuda else _peak()
    print(json.dumps({"bytes": peak - before, "kernels": before - start}))


def compile_kernels(backend: str, device: str) -> None:
    """Load all kernels, and run a small convolution and a small linear layer."""
    chosen = choose_backend(backend, torch.device(device).type)
    getattr(chosen, "warm_up", lambda: None)()
    conv = LayerGeometry("conv2d", 32, 32, (3, 3), (1, 1), (1, 1, 1, 1))
    for geometry, shape in ((conv, (1, 32, 4, 4)), (LayerGeometry("linear", 32, 32), (1, 32))):
        record = LayerRecord("warm-up", "conv", geometry, BinarySpec(), bias=True)
        layer = PackedLayer(record).to(device)
        layer.bind(chosen)
        layer(torch.zeros(shape, device=device))


def peak_above(run: Callable[[], object]) -> int:
    """Highest resident size of this process during a call over that before, in bytes."""
    before = _restart_peak()
    run()
    return _peak() - before


def _restart_peak() -> int:
    """Reset the peak if the system allows it, and return the size to count from."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    """The highest resident size so far, in bytes."""
    try:
        return _status("VmHWM")
    except OSError:
        import resource

        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    """A size from /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")

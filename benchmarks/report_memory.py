"""Peak resident memory of ``bidm report`` with all of Inception's metrics on two sets of 32x32 images.

    python benchmarks/report_memory.py -n 1000              # the command itself, end to end
    python benchmarks/report_memory.py -n 50000 --random    # random features in place of Inception's pass

Inception has generated weights in the layout of pytorch-fid's file, and both sets are noise: memory alone is
measured. With ``--random`` the command still reads the images and holds the network; only its features, 2,048
and 2,023 per image, are random numbers, as 100,000 passes take hours on a CPU. Linux alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("VmHWM", "RssAnon", "RssFile")


def main() -> None:
    """Write the files, then run the command and watch it; or be that command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=1000, help="images of each set")
    parser.add_argument("--random", action="store_true", help="random features")
    parser.add_argument("--seconds", type=float, default=0.05, help="between two looks at the memory")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        run_command(arguments.child, arguments.random)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(folder / "generated.pth")
        for seed, part in enumerate(("reference", "samples")):
            write_images(folder / f"{part}.npz", arguments.n, seed)
        measure(folder, arguments.random, arguments.seconds)


def write_weights(path: Path) -> None:
    """Generate Inception's weights as pytorch-fid's file has them."""
    import pytorch_fid.inception

    torch.manual_seed(0)
    load, nn.Module.load_state_dict = nn.Module.load_state_dict, lambda *a, **k: None  # type: ignore
    pytorch_fid.inception.load_state_dict_from_url = lambda *a, **k: {}
    network = pytorch_fid.inception.fid_inception_v3()
    nn.Module.load_state_dict = load  # type: ignore[method-assign]
    torch.save(network.state_dict(), path)


def write_images(path: Path, count: int, seed: int) -> None:
    """Write ``count`` images of noise."""
    rng = np.random.default_rng(seed)
    np.savez(path, arr_0=rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def measure(folder: Path, random: bool, seconds: float) -> None:
    """Run the command in a process of its own and print its peaks in MiB."""
    asked = ["report", "--reference", folder / "reference.npz", "--samples", folder / "samples.npz"]
    asked += ["--features", "inception", "--weights", folder / "generated.pth", "--device", "cpu"]
    own = [sys.executable, __file__, *(["--random"] if random else []), "--child", *map(str, asked)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    began, peaks, shown = time.perf_counter(), dict.fromkeys(PARTS, 0), 0.0
    child = subprocess.Popen(own, cwd=folder, env=environment)
    while child.poll() is None:
        for part, size in memory(child.pid).items():
            peaks[part] = max(peaks[part], size)
        if (passed := time.perf_counter() - began) > shown + 20:
            shown = passed
            print(f"{passed:6.0f} s", *(f"{key} {size:.0f}" for key, size in memory(child.pid).items()))
        time.sleep(seconds)
    print(f"status {child.returncode}, {time.perf_counter() - began:.0f} s; largest, MiB:")
    print(", ".join(f"{part} {size:.0f}" for part, size in peaks.items()))


def memory(process: int) -> dict[str, float]:
    """Memory of a process in MiB; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines)
    return {row[0][:-1]: int(row[1]) / 1024 for row in rows if row[0][:-1] in PARTS}


def run_command(arguments: list[str], random: bool) -> None:
    """Run ``bidm`` in this process, with random features if asked for."""
    from bidm_cli.cli.main import main as bidm
    from bidm_cli.report.metrics.networks.base import FeatureNetwork

    def features(self: FeatureNetwork, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shapes = (len(images), self.dims), (len(images), self.spatial_dims)
        return tuple(rng.random(shape, np.float32) for shape in shapes)  # type: ignore[return-value]

    rng = np.random.default_rng(0)
    if random:
        FeatureNetwork.extract_all = features  # type: ignore[method-assign]
    sys.argv = ["bidm", *arguments]
    bidm()


if __name__ == "__main__":
    main()

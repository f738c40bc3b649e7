"""Cold start: seconds from `bidm sample FILE -n 1` to the picture, with an empty kernel cache and a warm one.

    python benchmarks/cold_start.py                     # prints the table
    python benchmarks/cold_start.py --threads 2 --write # and writes results/cold_start.md, and rows to .jsonl
    python benchmarks/cold_start.py --empty 0           # warm starts alone

Each run is a process of its own, in turn with `python -c "import torch"`; medians. Files: the bundled
faces-w1a2 with its 20 steps, and an LDM-4 LSUN-Bedrooms with its first stage (random weights) with 2. The
picture itself, its steps and decoding in a process that has drawn one before, is listed apart.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import calm_openmp  # noqa: F401
import torch
from cpu_unet import markdown
from first_stage import RECIPES, bedrooms, packed
from record import RESULTS, record

import bidm_cli
from bidm_cli.cli.threads import available_cores, use_threads
from bidm_cli.packed.cpu.codegen.isa import cpu_model, instruction_set
from bidm_cli.packed.recording.decoder import decoder_of
from bidm_cli.recipe import Recipe
from bidm_cli.report.pages.tables import Table, seconds_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = RESULTS / "cold_start.md"
STEPS = {"faces-w1a2": 20, "LDM-4 LSUN-Bedrooms": 2}
RECIPE = "int8 decoder"


def seconds(command: list[str], cache: Path | None = None) -> float:
    """Seconds that a process takes, with another folder for compiled kernels and choices of tiles."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if cache is not None:
        environment |= {"XDG_CACHE_HOME": str(cache), "BIDM_KERNEL_CACHE": str(cache / "kernels")}
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], env=environment, check=True, capture_output=True)
    return time.perf_counter() - began


def start(name: str, path: Path, folder: Path, cache: Path | None = None) -> float:
    """Seconds of `bidm sample` for one picture."""
    options = ["-n", "1", "--steps", str(STEPS[name]), "--out", str(folder / "pictures"), "--overwrite"]
    return seconds(["-m", "bidm_cli", "sample", str(path), *options], cache)


def picture(name: str, path: Path) -> float:
    """Seconds of one picture's steps and decoding once the model has drawn one, the shortest of three."""
    model = bidm_cli.load_packed(path)

    def draw() -> None:
        z = bidm_cli.sample(model, n=1, steps=STEPS[name], batch_size=1)
        decoder_of(model)(z)

    with torch.inference_mode():
        draw(), draw()
        times = []
        for _ in range(3):
            began = time.perf_counter()
            draw()
            times.append(time.perf_counter() - began)
    return min(times)


def measured(files: dict[str, Path], folder: Path, rounds: int, empty: int) -> dict[str, dict[str, float]]:
    """Numbers by file."""
    found: dict[str, dict[str, float]] = {name: {} for name in files}
    for name, path in files.items():
        start(name, path, folder)  # fills the cache, and the system's of files
        found[name]["picture"] = picture(name, path)
    warm: dict[str, list[float]] = {name: [] for name in files}
    imports = []
    for _ in range(rounds):
        imports.append(seconds(["-c", "import torch"]))
        for name, path in files.items():
            warm[name].append(start(name, path, folder))
    for name, path in files.items():
        found[name] |= {"import torch": median(imports), "warm": median(warm[name])}
        found[name]["warm above import torch"] = found[name]["warm"] - found[name]["import torch"]
        rest = found[name]["warm above import torch"] - found[name]["picture"]
        found[name]["warm above import torch and picture"] = rest
        times, kernels = [], 0
        for i in range(empty):
            cache = folder / f"cache-{STEPS[name]}-{i}"
            times.append(start(name, path, folder, cache))
            kernels = len(list((cache / "kernels").iterdir()))
        if times:
            found[name] |= {"empty": median(times), "kernels": kernels}
    return found


def table(found: dict[str, dict[str, float]]) -> Table:
    """One row per file."""
    keys = [key for key in next(iter(found.values())) if key != "kernels"]
    rows = []
    for name, numbers in found.items():
        kernels = f", {numbers['kernels']:.0f} kernels" if "kernels" in numbers else ""
        cells = [seconds_text(numbers[key]) + (kernels if key == "empty" else "") for key in keys]
        rows.append([f"{name}, {STEPS[name]} steps", *cells])
    return Table("From the command to the picture", ["file", *keys], rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--empty", type=int, default=1, help="runs with an empty cache")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--bedrooms", type=Path, help="the packed LDM-4, made here if it does not exist")
    parser.add_argument("--write", action="store_true", help=f"also write {PAGE} and its rows")
    chosen = parser.parse_args()
    use_threads(chosen.threads)
    with TemporaryDirectory(prefix="bidm-cold-") as temporary:
        folder = Path(temporary)
        large = chosen.bedrooms or folder / "bedrooms.bidm"
        if not large.is_file():
            packed(bedrooms(), Recipe.parse(RECIPES[RECIPE], RECIPE), large)
        files = {"faces-w1a2": ROOT / "bidm_cli/demo/faces-w1a2.bidm", "LDM-4 LSUN-Bedrooms": large}
        found = measured(files, folder, chosen.rounds, chosen.empty)
    print(table(found).to_text())
    if chosen.write:
        machine = (
            f"{datetime.date.today()}: {cpu_model()} ({instruction_set()}), cores: {os.cpu_count()}, "
            f"threads: {chosen.threads}, torch {torch.__version__}; medians of {chosen.rounds} warm starts "
            f"and {chosen.empty} with an empty cache."
        )
        command = shlex.join(["python", *sys.argv])
        PAGE.write_text(markdown("Cold start", machine, command, [table(found)]), encoding="utf-8")
        record(PAGE.with_suffix(".jsonl"), found, threads=chosen.threads)


if __name__ == "__main__":
    main()

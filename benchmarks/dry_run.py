"""Time and memory that ``bidm compress --dry-run`` says, against those that the run then takes.

    python benchmarks/dry_run.py                                        # digits, faces, a 64x64-latent LDM-4
    python benchmarks/dry_run.py --only digits --processes 2 --steps 25 --rounds 3

Dry run and run are whole commands in processes of their own, in turn; the medians of all rounds are
compared. Of the run: the mean step without the first ones, which allocate, and the highest resident size of a
process over all of it (of two processes, the larger one), packing included. Of the dry run: the time in all
by the number of steps, with the encoding of images that these are the first to draw. Resident sizes are those
of Linux (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import add_record_option, record
from train_step import DEMO, ROOT, Network, ldm4

# Runs the command of its arguments, and writes down when each step ended.
RUNNER = """
import json, os, sys, time
import bidm_cli.distill.trainer as trainer
from bidm_cli.cli.main import main
ends, one_step = [], trainer.Trainer._one_step
def timed(self, take):
    one_step(self, take)
    ends.append(time.perf_counter())
trainer.Trainer._one_step = timed
try:
    main()
finally:
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    with open(f"times-{os.environ.get('RANK', 0)}.json", "w") as file:
        json.dump({"ends": ends, "bytes": peak * 1024}, file)
"""
# The same in several processes.
STARTER = """
import sys
from bidm_cli.parallel.launch import launch
sys.exit(launch(int(sys.argv[1]), [sys.executable, "-c", *sys.argv[2:]], ""))
"""
WARM_UP = 3
UNITS = {
    "B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30,
    "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0,
}  # fmt: skip


def digits(folder: Path) -> tuple[Network, str]:
    """The bundled digits, images 1x8x8, with their own recipe."""
    del folder
    return Network(DEMO / "digits.pth", DEMO / "digits.npz", 32), str(DEMO / "digits-w1a1.yaml")


def faces(folder: Path) -> tuple[Network, str]:
    """The bundled LDM-4 of faces, latents 3x8x8, with its own recipe."""
    del folder
    return Network(DEMO / "ldm4_peeps.ckpt", DEMO / "faces.npz", 32), str(DEMO / "faces-w1a1.yaml")


def wide(folder: Path) -> tuple[Network, str]:
    """The LDM-4 for latents 3x64x64 of benchmarks/train_step.py, with the paper's recipe."""
    return ldm4(folder), "bidm"


NETWORKS = {"digits": digits, "faces": faces, "ldm4-64": wide}


def run(program: list[str], folder: Path, threads: int) -> str:
    """Standard output of Python with these arguments; ends the script if it fails."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, *program], env={**os.environ, **variables}, cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{program[-10:]}: {done.stderr[-2000:]}")
    return done.stdout


def said(text: str, steps: int) -> tuple[float, float]:
    """(seconds per step, bytes of a process) in the text of a dry run for so many steps."""
    seconds = re.search(r"per step, ([\d.]+) (\w+) in all", text)
    memory = re.search(r"memory +about ([\d.,]+) (\w+)", text)
    assert seconds and memory, text
    values = [float(found[1].replace(",", "")) * UNITS[found[2]] for found in (seconds, memory)]
    return values[0] / steps, values[1]


def taken(command: list[str], folder: Path, options: Any) -> tuple[float, float]:
    """(seconds per step, bytes of a process) of a run."""
    program = ["-c", RUNNER, *command, "--no-trajectory"]
    program += ["--run-dir", str(folder / "run"), "-o", str(folder / "x.bidm")]
    if options.processes > 1:
        program = ["-c", STARTER, str(options.processes), *program[1:]]
    run(program, folder, options.threads)
    found = [json.loads(file.read_text()) for file in folder.glob("times-*.json")]
    assert len(found) == options.processes
    ends = found[0]["ends"]
    seconds = (ends[-1] - ends[WARM_UP - 1]) / (len(ends) - WARM_UP)
    return seconds, max(one["bytes"] for one in found)


def compare(name: str, options: Any) -> dict[str, Any]:
    """Medians of dry runs and runs, in turn, and their ratios."""
    numbers: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            network, recipe = NETWORKS[name](folder)
            command = ["compress", str(network.checkpoint), "--recipe", recipe, "--data", str(network.data)]
            steps = options.steps + WARM_UP
            command += ["--batch-size", str(network.batch), "--device", "cpu", "--steps", str(steps)]
            plan = ["-m", "bidm_cli", *command, "--dry-run", "--processes", str(options.processes)]
            text = run([*plan, "--threads", str(options.threads)], folder, options.threads)
            for side, found in (("said", said(text, steps)), ("taken", taken(command, folder, options))):
                for what, value in zip(("seconds", "bytes"), found, strict=True):
                    numbers.setdefault(f"{side}_{what}", []).append(value)
    medians: dict[str, Any] = {key: statistics.median(values) for key, values in numbers.items()}
    for what in ("seconds", "bytes"):
        medians[f"{what}_ratio"] = medians[f"said_{what}"] / medians[f"taken_{what}"]
    print(
        f"{name}, processes: {options.processes}: said {medians['said_seconds']:.3g} s per step, taken "
        f"{medians['taken_seconds']:.3g} ({medians['seconds_ratio']:.2f}); said "
        f"{medians['said_bytes'] / 2**20:.0f} MiB, taken {medians['taken_bytes'] / 2**20:.0f} "
        f"({medians['bytes_ratio']:.2f})",
        flush=True,
    )
    return {**medians, "rounds": options.rounds, "steps": options.steps}


def main() -> None:
    """Compare what the options ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=NETWORKS, action="append")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="steps of a run that count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    add_record_option(parser, "dry_run")
    options = parser.parse_args()
    for name in options.only or NETWORKS:
        found = compare(name, options)
        if options.record:
            many = f"{options.processes} processes, " if options.processes > 1 else ""
            record(options.record, {f"{name}, {many}{options.threads} threads": found})


if __name__ == "__main__":
    main()

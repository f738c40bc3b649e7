"""Compare two checkouts of bidm on this machine: packed files, exports and samples have to be equal.

    python benchmarks/compare_checkouts.py OLD NEW
    python benchmarks/compare_checkouts.py OLD NEW --only digits --only dit --benchmark

OLD and NEW are folders that hold ``bidm_cli``. Each model's commands run in a process of their own with
PYTHONPATH set to the checkout, in a folder outside both. OLD's results are kept under --work for the next
comparison, by commit, commands, threads and library versions; of a checkout with uncommitted changes nothing
is kept. Tensors, arrays and pixels are compared bit for bit, JSON, YAML and CSV value by value; exit codes
have to agree. Where messages on standard error differ, both are printed, but do not count.
Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compared_commands import commands_for, models_of
from compared_contents import contents, difference

Plan = dict[str, tuple[str, ...]]
"""Commands of each model."""

RUNNER = Path(__file__).resolve().with_name("compared_runner.py")


@dataclass(frozen=True)
class Side:
    """A checkout and the options that both sides share."""

    checkout: Path
    work: Path
    threads: int

    def run(self, commands: tuple[str, ...], folder: Path) -> dict[str, dict[str, Any]]:
        """Results of bidm commands that run in ``folder`` with the checkout's modules."""
        folder.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.checkout),
            "PYTHONPYCACHEPREFIX": str(self.work / "pycache"),
            "BIDM_KERNEL_CACHE": str(self.work / "kernels"),
            "NUMBA_CACHE_DIR": str(self.work / "numba"),  # of checkouts before that
            "OMP_NUM_THREADS": str(self.threads),
            "CUDA_VISIBLE_DEVICES": "",
            "BIDM_TUNE": "0",
        }
        settings: dict[str, Any] = {"input": json.dumps(commands), "cwd": folder, "env": environment}
        ran = subprocess.run([sys.executable, RUNNER], **settings, capture_output=True, text=True)
        if ran.stdout.strip() != str(self.checkout / "bidm_cli" / "__init__.py") or ran.returncode:
            raise SystemExit(f"{self.checkout}: ran {ran.stdout.strip() or 'nothing'}\n{ran.stderr}")
        return json.loads((folder / "commands.json").read_text())

    def run_models(self, folder: Path, plan: Plan, parallel: int) -> None:
        """Run every model's commands, ``parallel`` models at a time; results in ``folder/MODEL``."""
        began = time.monotonic()
        with ThreadPoolExecutor(parallel) as pool:
            list(pool.map(lambda name: self.run(plan[name], folder / name), plan))
        print(f"{self.checkout}: ran {len(plan)} models, {time.monotonic() - began:.0f} s", flush=True)

    def kept(self, plan: Plan) -> dict[str, Path]:
        """Paths for each model's kept results; none if the checkout has changes or is no repository."""
        git = ["git", "-C", str(self.checkout)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        if commit.returncode or changes.returncode or changes.stdout:
            return {}
        libraries = map(version, ("torch", "numba", "numpy", "safetensors"))
        about = [RUNNER.read_text(), self.threads, sys.version, *libraries]
        keys = {name: json.dumps([*about, commands]).encode() for name, commands in plan.items()}
        root = self.work / commit.stdout[:12]
        return {name: root / f"{name}-{hashlib.sha256(key).hexdigest()[:8]}" for name, key in keys.items()}


def run_old(side: Side, folder: Path, plan: Plan, parallel: int) -> dict[str, Path]:
    """Paths of OLD's results by model: kept ones, and new runs of the missing ones."""
    kept = side.kept(plan)
    missing = [name for name in plan if name not in kept or not kept[name].exists()]
    side.run_models(folder, {name: plan[name] for name in missing}, parallel)
    for name, place in kept.items():
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            (folder / name).rename(place)
    return {name: kept.get(name, folder / name) for name in plan}


def compare_commands(name: str, old: Path, new: Path) -> int:
    """Print differing exit codes and messages, and what both refuse; the number of differing codes."""
    logs = [json.loads((folder / "commands.json").read_text()) for folder in (old, new)]
    bad = 0
    for command, before in logs[0].items():
        after = logs[1][command]
        if before["code"] != after["code"]:
            bad += 1
            print(
                f"DIFFERS  {name}: {command}: exit code {before['code']}, then {after['code']}\n"
                f"   old: {before['message']}\n   new: {after['message']}"
            )
        elif before["message"] != after["message"]:
            print(f"note     {name}: {command}\n   old: {before['message']}\n   new: {after['message']}")
        elif before["code"] and "refused" not in command and "nonesuch" not in command:
            print(f"note     {name}: both refuse {command}: {before['message']}")
    print(f"{'DIFFERS' if bad else 'equal  '}  {name}: exit codes of {len(logs[0])} commands")
    return bad


def compare(name: str, old: Path, new: Path) -> int:
    """Print one line for each file or folder of ``old`` and ``new``; the number of differences."""
    bad = 0
    things = {path.name for folder in (old, new) for path in folder.iterdir()}
    for thing in sorted(things - {"commands.json"}):
        values = contents(old / thing), contents(new / thing)
        found = difference(*values)
        bad += found is not None
        print(f"{'DIFFERS' if found else 'equal  '}  {name}/{thing}: {found or f'{len(values[0])} values'}")
    return bad


def benchmark(old: Side, new: Side, packed: list[tuple[Path, Path]], folder: Path, rounds: int = 3) -> None:
    """Print both sides' medians for a step and for sampling, measured in turns."""
    for paths in packed:
        times: dict[str, tuple[list[float], list[float]]] = {"step": ([], []), "sampling": ([], [])}
        for _ in range(rounds):
            for i, side in enumerate((old, new)):
                options = f"--no-layers --no-memory --threads {side.threads} --json bench.json"
                side.run((f"bench {paths[i]} {options}",), folder)
                numbers = json.loads((folder / "bench.json").read_text())
                for kind, both in times.items():
                    both[i].append(numbers[kind]["packed_seconds"])
        for kind, both in times.items():
            before, after = (1000 * statistics.median(seconds) for seconds in both)
            name, ratio = paths[1].parent.name, after / before
            print(f"time     {name} {kind}: old {before:.2f} ms, new {after:.2f} ms ({ratio:.2f})")


def compare_sides(old: Side, new: Side, folder: Path, plan: Plan, options: argparse.Namespace) -> int:
    """Run both sides in ``folder``, print what differs and how much; the number of differences."""
    for side, place in ((old, folder / "old"), (new, folder / "new")):
        side.run((), place)  # writes the recipes
        print(f"{side.checkout}: runs its own bidm_cli", flush=True)
    bad = compare("recipes", folder / "old", folder / "new")
    before = run_old(old, folder / "old", plan, options.parallel)
    new.run_models(folder / "new", plan, options.parallel)
    for name, place in before.items():
        bad += compare_commands(name, place, folder / "new" / name)
        bad += compare(name, place, folder / "new" / name)
    if options.benchmark:
        pairs = [(place / "w1a1.bidm", folder / "new" / name / "w1a1.bidm") for name, place in before.items()]
        benchmark(old, new, pairs, folder / "bench")
    return bad


def main() -> int:
    """Run both sides, print what differs."""
    parser = argparse.ArgumentParser(description="Compare what two checkouts of bidm write on this machine.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--shared", type=Path, help="folder with checkpoints/ (default: beside NEW)")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bidm-compare"), help="results and caches")
    parser.add_argument("--only", action="append", help="digits or a checkpoint's folder; repeatable")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each command")
    parser.add_argument("--jobs", dest="parallel", type=int, default=2, help="models at a time")
    parser.add_argument("--benchmark", action="store_true", help="also time both sides with bidm bench")
    options = parser.parse_args()
    old, new, work = options.old.resolve(), options.new.resolve(), options.work.resolve()
    models = models_of((options.shared or new.parent / "shared").resolve())
    plan = {
        name: commands_for(name, path) for name, path in models.items() if name in (options.only or models)
    }
    if not plan:
        parser.error(f"no model of --only; there are {', '.join(models)}")
    work.mkdir(parents=True, exist_ok=True)
    sides = Side(old, work, options.threads), Side(new, work, options.threads)
    with tempfile.TemporaryDirectory(dir=work, prefix="run-") as temporary:
        bad = compare_sides(*sides, Path(temporary), plan, options)
    print(f"{bad} differences" if bad else "equal everywhere")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

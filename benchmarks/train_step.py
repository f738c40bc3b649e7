"""Seconds and peak memory of a training step: this checkout, an older one, the published method done plainly.

    git worktree add /tmp/old ddae7db
    python benchmarks/train_step.py --old /tmp/old                      # faces and a 64x64-latent LDM-4
    python benchmarks/train_step.py --old /tmp/old --only faces --recipe w1a1 --steps 5

Each side trains in processes of its own, in turn, with its own recipe of that name (``reference`` if it
has no ``bidm``), equal batches and data; the median step of all rounds counts, without the first steps, which
allocate. Plain is this checkout with SPD as loops over patches and nothing prefetched. Peak memory is the
highest resident size of the process over that before training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from record import add_record_option, record

from bidm_cli.networks.registry import build

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "bidm_cli" / "demo"

# Runs in either checkout: compress and Trainer._one_step are in both.
RUNNER = """
import json, resource, sys, time
request = json.loads(sys.stdin.read())
import torch
import bidm_cli
import bidm_cli.distill.trainer as trainer
from bidm_cli.recipe import Recipe

class Done(Exception):
    pass

ends, one_step = [], trainer.Trainer._one_step
def timed(self, *arguments):
    result = one_step(self, *arguments)
    ends.append(time.perf_counter())
    if len(ends) > request["steps"] + request["warm_up"]:
        raise Done
    return result
trainer.Trainer._one_step = timed
if request["plain"]:
    import bidm_cli.distill.prefetch as prefetch
    from bidm_cli.distill import spd
    def maps(feature, patches):
        n, c, height, width = feature.shape
        h, w = height // patches, width // patches
        found = []
        for row in range(patches):
            for column in range(patches):
                patch = feature[:, :, row * h : (row + 1) * h, column * w : (column + 1) * w]
                product = patch @ patch.transpose(-1, -2)
                norm = torch.linalg.vector_norm(product, dim=(1, 2, 3), keepdim=True)
                found.append(product / norm.clamp_min(1e-12))
        return torch.stack(found, dim=1)
    spd.attention_maps = maps
    threads = torch.get_num_threads
    def alone(self, make, first, end, device):
        self._make, self._next, self._end, self._threads = make, first, end, threads()
        self._pool = self._begun = None
    prefetch.Prefetcher.__init__ = alone
model = bidm_cli.load_checkpoint(request["checkpoint"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    more = {"data": request["data"], "batch_size": request["batch"], "run_dir": request["folder"] + "/run"}
    bidm_cli.compress(model, Recipe.load(request["recipe"]), request["folder"] + "/x.bidm", **more)
except Done:
    pass
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
steps = [b - a for a, b in zip(ends, ends[1:])][request["warm_up"] - 1 :]
print(json.dumps({"seconds": steps, "bytes": (peak - before) * 1024}))
"""


@dataclass(frozen=True)
class Network:
    """A checkpoint, data for it, and the batch to train with."""

    checkpoint: Path
    data: Path
    batch: int


def faces(folder: Path) -> Network:
    """The bundled LDM-4 of faces on latents 3x8x8: images would be encoded when they are first drawn."""
    return Network(DEMO / "ldm4_peeps.ckpt", _latents(folder / "faces.npy", 64, 8), 16)


def ldm4(folder: Path) -> Network:
    """An LDM-4 for latents 3x64x64 with a third of the public one's width and random weights."""
    settings = {
        "image_size": 64, "in_channels": 3, "out_channels": 3, "model_channels": 64,
        "attention_resolutions": [8, 4, 2], "num_res_blocks": 2, "channel_mult": [1, 2, 3, 4],
        "num_head_channels": 32,
    }  # fmt: skip
    params = {
        "linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 64, "channels": 3,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": settings},
    }  # fmt: skip
    config = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}
    torch.manual_seed(0)
    arguments = {name: value for name, value in settings.items() if name != "image_size"}
    unet = build({"kind": "ldm_unet", "args": arguments})
    state = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    checkpoint = folder / "ldm4.ckpt"
    torch.save({"state_dict": state}, checkpoint)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return Network(checkpoint, _latents(folder / "latents.npy", 16, 64), 2)


def _latents(path: Path, count: int, side: int) -> Path:
    """File of noise that is taken for latents [count, 3, side, side]."""
    np.save(path, np.random.default_rng(0).standard_normal((count, 3, side, side), dtype=np.float32))
    return path


OLD_NAMES = {"bidm": "reference"}
"""The paper's recipe in older checkouts."""
NETWORKS = {"faces": faces, "ldm4-64": ldm4}


def measure(side: Path, network: Network, recipe: str, plain: bool, options: Any) -> dict[str, Any]:
    """Seconds of each step, and bytes at the peak, of one process."""
    if not (side / "recipes" / f"{recipe}.yaml").is_file():
        recipe = OLD_NAMES.get(recipe, recipe)
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "checkpoint": str(network.checkpoint), "data": str(network.data), "batch": network.batch,
            "recipe": recipe, "plain": plain, "steps": options.steps, "warm_up": 2, "folder": folder,
        }  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(side), "OMP_NUM_THREADS": str(options.threads)}
        done = subprocess.run(
            [sys.executable, "-c", RUNNER], input=json.dumps(request), env=environment, cwd=folder,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"{side}, {network.checkpoint.name}, {recipe}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(name: str, network: Network, recipe: str, options: Any) -> dict[str, Any]:
    """Medians of all sides, each measured in every round."""
    sides = {"now": (ROOT, False)}
    if options.old is not None:
        sides["old"] = (options.old, False)
    if recipe == "bidm":
        sides["plain"] = (ROOT, True)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, list[int]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, (checkout, plain) in sides.items():
            found = measure(checkout, network, recipe, plain, options)
            seconds[side] += found["seconds"]
            peaks[side].append(found["bytes"])
    numbers: dict[str, Any] = {"batch": network.batch, "steps": len(seconds["now"])}
    for side in sides:
        numbers[f"{side}_seconds"] = statistics.median(seconds[side])
        numbers[f"{side}_peak_bytes"] = int(statistics.median(peaks[side]))
        numbers[f"{side}_ratio"] = numbers[f"{side}_seconds"] / numbers["now_seconds"]
    texts = (
        f"{side} {numbers[f'{side}_seconds']:.3f} s ({numbers[f'{side}_ratio']:.2f}), "
        f"{numbers[f'{side}_peak_bytes'] / 2**20:.0f} MiB"
        for side in sides
    )
    print(f"{name}, {recipe}, batch {network.batch}: {'; '.join(texts)}", flush=True)
    return numbers


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--old", type=Path, help="a checkout of an older commit, such as ddae7db")
    parser.add_argument("--only", choices=NETWORKS, action="append")
    parser.add_argument("--recipe", choices=["bidm", "w1a1"], action="append")
    parser.add_argument("--steps", type=int, default=10, help="steps that count, in each process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_record_option(parser, "train_step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or NETWORKS:
            network = NETWORKS[name](Path(folder))
            for recipe in options.recipe or ["bidm", "w1a1"]:
                found = compare(name, network, recipe, options)
                if options.record:
                    record(options.record, {f"{name}, {recipe}, {options.threads} threads": found})


if __name__ == "__main__":
    main()

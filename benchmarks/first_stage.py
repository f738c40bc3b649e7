"""The whole file and the whole picture of a full-size LDM-4: denoising network and first stage.

    python benchmarks/first_stage.py                       # prints the tables
    python benchmarks/first_stage.py --threads 2 --write   # and writes results/first_stage.md and .jsonl

LDM-4 LSUN-Bedrooms with its VQ-f4 first stage, original layout, random weights, which neither bytes nor times
depend on. Float is torch in float32 in the better of its memory formats. All decoders alternate in one run,
as do the two steps; medians. A whole picture is its steps and one decoding. Peak memory of a decoding is of a
process of its own, above what it held before.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import calm_openmp  # noqa: F401
import torch
from cpu_unet import markdown
from random_models import model_of, published
from record import RESULTS, record

from bidm_cli.binary.first_stage import binary_decoder
from bidm_cli.binary.surgery import binarize
from bidm_cli.cli.threads import available_cores, use_threads
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.networks.registry import build
from bidm_cli.packed.cpu.codegen.isa import instruction_set
from bidm_cli.packed.format.container import write_packed
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.model import PackedModel
from bidm_cli.packed.recording.decoder import decoder_of
from bidm_cli.recipe import Recipe
from bidm_cli.report.bench.memory import compile_kernels, peak_above
from bidm_cli.report.bench.step import step_call, time_in_turn, warm_up
from bidm_cli.report.pages.tables import Table, bytes_text, ratio_text, seconds_text

PAGE = RESULTS / "first_stage.md"
RULES = """
name: {name}
layers:
  - {{role: [stem, head, time_embedding], keep: float}}
  - {{role: [conv, skip, resample], binarize: {{shortcut: tile, planes: {planes}}}}}
  - {{role: "*", binarize: {{activation_scale: none, shortcut: none, planes: {planes}}}}}
store: {{float: float16}}
first_stage:
  weights: {weights}
"""
BINARY = """
  layers:
    - {role: [stem, head], keep: float}
    - {name: "decoder.up.0.*", keep: float}
    - {role: [conv, skip, resample], binarize: {shortcut: tile, planes: 2}}
    - {role: "*", binarize: {activation_scale: none, shortcut: none, planes: 2}}
"""
RECIPES = {
    "int8 decoder": RULES.format(name="w1a1", planes=1, weights="int8"),
    "binary decoder, last level float16": RULES.format(name="w1a1", planes=1, weights="float16") + BINARY,
}
"""By the form of the first stage; the network has one plane."""


def bedrooms() -> DiffusionModel:
    """LDM-4 LSUN-Bedrooms with its first stage, random weights."""
    model = model_of(published.LDM_UNETS["LSUN-Bedrooms"][0], 64)
    architecture = published.FIRST_STAGES["VQ-f4"][0]
    model.architecture["first_stage"] = architecture
    model.first_stage = build(architecture).eval().requires_grad_(False)
    return model


def packed(model: DiffusionModel, recipe: Recipe, path: Path) -> PackedModel:
    """Binarize and pack without training: right in size and speed, not in its images."""
    student = copy.copy(model)
    student.unet = copy.deepcopy(model.unet)
    binarize(student.unet, recipe, model.schedule.timesteps)
    decoder = binary_decoder(model.first_stage, recipe)
    if decoder is not None:
        student.first_stage = decoder.network
    write_packed(path, *pack_model(student, recipe.to_json()))
    return load_packed(path)


def float_bytes(model: DiffusionModel) -> int:
    """Bytes of network and first stage in float32."""
    parts = (model.unet, model.first_stage)
    return 4 * sum(value.numel() for part in parts for value in part.state_dict().values())  # type: ignore[union-attr]


def files_table(model: DiffusionModel, paths: dict[str, Path]) -> Table:
    """Whole files against network and first stage in float32."""
    whole = float_bytes(model)
    rows = [["float32", bytes_text(whole), ""]]
    for name, path in paths.items():
        size = path.stat().st_size
        rows.append([name, bytes_text(size), ratio_text(whole / size)])
    return Table("The whole file", ["first stage", "bytes", "smaller"], rows)


@torch.inference_mode()
def seconds_of(
    model: DiffusionModel, found: dict[str, PackedModel], rounds: int
) -> dict[str, dict[str, float]]:
    """Median seconds of one decoding and one step, by name; "float32" among them."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, *model.sample_shape, generator=generator)
    other = copy.copy(model)
    other.first_stage = copy.deepcopy(model.first_stage).to(memory_format=torch.channels_last)  # type: ignore[union-attr]
    floats = {"float32": model, "float32, channels last": other}
    decoders = {name: partial(decoder_of(m), z) for name, m in {**floats, **found}.items()}
    network = next(iter(found.values()))
    other.unet = copy.deepcopy(model.unet).to(memory_format=torch.channels_last)
    steps = {name: step_call(m, 1) for name, m in {**floats, "packed": network}.items()}
    for call in (*decoders.values(), *steps.values()):
        warm_up(call)
    measured = [
        {name: median(times) for name, times in time_in_turn(calls, rounds).items()}
        for calls in (decoders, steps)
    ]
    for times in measured:
        times["float32"] = min(times["float32"], times.pop("float32, channels last"))
    return dict(zip(("decoding", "step"), measured, strict=True))


def pictures_table(
    times: dict[str, dict[str, float]], memory: dict[str, int], lengths: tuple[int, ...]
) -> Table:
    """One decoding, and whole pictures of so many steps."""
    rows = []
    for name, decoding in times["decoding"].items():
        step = times["step"]["float32" if name == "float32" else "packed"]
        row = [name, seconds_text(decoding), ratio_text(times["decoding"]["float32"] / decoding)]
        for length in lengths:
            before = length * times["step"]["float32"] + times["decoding"]["float32"]
            row += [seconds_text(length * step + decoding), ratio_text(before / (length * step + decoding))]
        rows.append([*row, bytes_text(memory[name])])
    columns = ["first stage", "decoding", "faster"]
    for length in lengths:
        columns += [f"picture of {length} steps", "faster"]
    before, after = (seconds_text(times["step"][name]) for name in ("float32", "packed"))
    note = f"One step: float32 {before}, packed {after}."
    return Table("One 256x256 picture", [*columns, "peak memory of decoding"], rows, note=note)


def peak_of(path: Path | None) -> int:
    """Peak memory of decoding pictures one after the other, above the model, in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", "float32" if path is None else str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help=f"also write {PAGE} and its rows")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    use_threads(chosen.threads)
    if chosen.peak_of:
        print(json.dumps(_peak_in_this_process(chosen.peak_of)))
        return
    model = bedrooms()
    with TemporaryDirectory(prefix="bidm-bench-") as folder:
        paths = {name: Path(folder) / f"{i}.bidm" for i, name in enumerate(RECIPES)}
        found = {name: packed(model, Recipe.parse(RECIPES[name], name), path) for name, path in paths.items()}
        memory = {"float32": peak_of(None)} | {name: peak_of(path) for name, path in paths.items()}
        times = seconds_of(model, found, chosen.rounds)
        tables = [files_table(model, paths), pictures_table(times, memory, (20, 100))]
        sizes = {
            name: {"bytes": path.stat().st_size, "float_bytes": float_bytes(model)}
            for name, path in paths.items()
        }
    for table in tables:
        print(table.to_text())
    if chosen.write:
        machine = f"{instruction_set()}, {chosen.threads} threads, torch {torch.__version__}."
        command = "python benchmarks/first_stage.py --write"
        PAGE.write_text(
            markdown("The whole file and the whole picture", machine, command, tables), encoding="utf-8"
        )
        record(RESULTS / "first_stage.jsonl", {**sizes, **times}, threads=chosen.threads)


def _peak_in_this_process(what: str) -> int:
    def decoded(model: DiffusionModel) -> None:
        with torch.inference_mode():
            decode = decoder_of(model)
            for _ in range(4):
                decode(torch.randn(1, *model.sample_shape))

    if what == "float32":
        model = bedrooms()
        model.unet = torch.nn.Identity()
        return peak_above(lambda: decoded(model))
    compile_kernels("auto", "cpu")
    packed_model = load_packed(what)
    return peak_above(lambda: decoded(packed_model))


if __name__ == "__main__":
    main()

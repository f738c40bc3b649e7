"""``bidm bench``: packed against float, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bidm_cli.cli import options as shared
from bidm_cli.cli.threads import threads_option
from bidm_cli.cli.wording import echo

if TYPE_CHECKING:
    from bidm_cli.diffusion.model import DiffusionModel
    from bidm_cli.recipe import Recipe
    from bidm_cli.report.bench.result import BenchResult

bench_options = shared.grouped(
    "options",
    "bidm_cli.report.bench.timing:BenchOptions",
    shared.int_option("--batch-size", 1, "Images in a step and in the sampling.", 1),
    shared.int_option("--steps", 0, "Sampler steps of the whole sampling; 0 leaves it out.", 10),
    shared.int_option("--rounds", 1, "Measurements per side; medians are compared.", 7),
    click.option(
        "--against",
        type=click.Choice(["openvino"]),
        help="Also time the original's step in OpenVINO: float32, bfloat16 where the CPU has it, int8.",
    ),
    click.option("--layers/--no-layers", default=True, help="Also time each layer on its own."),
    click.option("--memory/--no-memory", default=True, help="Measure peak memory, in one process per side."),
)


@click.command("bench")
@shared.model_argument
@shared.path_option("--teacher", help="The original, timed in place of a copy with random weights.")
@shared.checkpoint_options
@click.option("--recipe", "recipe_name", help="Recipe (a name or a file) for a MODEL that is not packed.")
@shared.backend_option
@shared.device_option("cpu", "cpu, cuda, cuda:1, ...")
@bench_options
@shared.json_option
@threads_option
def command(
    model: Path,
    teacher: Path | None,
    loading: shared.CheckpointOptions,
    recipe_name: str | None,
    backend: str,
    device: str,
    options: Any,
    json_path: Path | None,
) -> None:
    """Time MODEL packed against float: each layer, one step, whole sampling, and peak memory.

    MODEL is a packed file, or an original checkpoint or bare architecture config with --recipe. Both sides
    alternate within one run; the packed side includes the packing of activations. Timings do not depend on
    the weights' values: without --teacher a packed file's original is rebuilt with random ones.

    \b
      bidm bench digits.bidm
      bidm bench digits.bidm --against openvino
      bidm bench lsun_bedrooms/config.yaml --recipe w1a1 --json bench.json
    """
    from bidm_cli.cli.models import open_model
    from bidm_cli.recipe import Recipe

    device = shared.choose_device(device)
    recipe = None if recipe_name is None else Recipe.load(recipe_name)
    opened = open_model(model, device=device, backend=backend, **({} if teacher else loading.kwargs()))
    original = None if teacher is None else open_model(teacher, device=device, **loading.kwargs())
    result = measure(opened, original, device, recipe, backend, options)
    _show(result)
    shared.write_json_if(json_path, {"model": str(model), **result.to_json()})


def measure(
    model: DiffusionModel,
    original: DiffusionModel | None,
    device: str,
    recipe: Recipe | None = None,
    backend: str = "auto",
    options: Any = None,
) -> BenchResult:
    """Timings of a packed model against its original; each measurement is announced on standard error."""
    from bidm_cli.cli.models import compiling
    from bidm_cli.report.bench.models import paired
    from bidm_cli.report.bench.timing import BenchOptions, bench

    with paired(model, original, recipe, device=device, backend=backend) as pair:
        pair.packed.warm_up(compiling)
        return bench(pair, options or BenchOptions(), say=lambda line: echo(f"... {line}", err=True))


def _show(result: BenchResult) -> None:
    from bidm_cli.report.bench.tables import (
        engine_table,
        kind_table,
        layer_speed_table,
        slower_notes,
        speed_table,
    )

    if result.layers:
        echo(layer_speed_table(result).to_text() + "\n")
        echo(kind_table(result).to_text() + "\n")
    echo(speed_table(result).to_text())
    if result.engines:
        echo("\n" + engine_table(result).to_text())
    for note in slower_notes(result):
        echo(note)

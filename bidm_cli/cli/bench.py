"""``bidm bench``: packed against float, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bidm_cli.cli.checkpoint_options import CheckpointOptions, checkpoint_options
from bidm_cli.cli.options import (
    backend_option,
    device_option,
    grouped,
    int_option,
    json_option,
    model_argument,
    path_option,
    write_json_if,
)
from bidm_cli.cli.threads import threads_option
from bidm_cli.cli.warm_up import compiling


def _bench_options(**values: Any) -> Any:
    from bidm_cli.report.bench.timing import BenchOptions

    return BenchOptions(**values)


bench_options = grouped(
    "options",
    _bench_options,
    int_option("--batch-size", 1, "Images in a step and in the sampling.", 1),
    int_option("--steps", 0, "Steps of the whole sampling; 0 leaves it out.", 10),
    int_option("--rounds", 1, "Measurements of each side; medians are compared.", 7),
    click.option("--layers/--no-layers", default=True, help="Time each layer on its own, too."),
    click.option(
        "--memory/--no-memory", default=True, help="Measure peak memory, in a process for each side."
    ),
)


@click.command("bench")
@model_argument
@path_option("--teacher", help="The original, to time instead of a copy.")
@checkpoint_options()
@click.option("--recipe", "recipe_name", help="What to make of an original network; a recipe's name or file.")
@backend_option
@device_option("cpu", "cpu, cuda, cuda:1, ...")
@bench_options
@json_option
@threads_option
def command(
    model: Path,
    teacher: Path | None,
    loading: CheckpointOptions,
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
      bidm bench lsun_bedrooms/config.yaml --recipe w1a1 --json bench.json
    """
    from bidm_cli.cli.devices import choose_device
    from bidm_cli.cli.models import open_model
    from bidm_cli.recipe import Recipe
    from bidm_cli.report.bench.models import paired
    from bidm_cli.report.bench.timing import bench

    device = choose_device(device)
    recipe = None if recipe_name is None else Recipe.load(recipe_name)
    opened = open_model(model, device=device, backend=backend, **({} if teacher else loading.kwargs()))
    original = None if teacher is None else open_model(teacher, device=device, **loading.kwargs())
    with paired(opened, original, recipe, device=device, backend=backend) as pair:
        pair.packed.warm_up(compiling)
        result = bench(pair, options, say=lambda line: click.echo(f"... {line}", err=True))
    _show(result)
    write_json_if(json_path, {"model": str(model), **result.to_json()})


def _show(result: Any) -> None:
    from bidm_cli.report.bench.tables import kind_table, layer_speed_table, slower_notes, speed_table

    if result.layers:
        click.echo(layer_speed_table(result).to_text() + "\n")
        click.echo(kind_table(result).to_text() + "\n")
    click.echo(speed_table(result).to_text())
    for note in slower_notes(result):
        click.echo(note)

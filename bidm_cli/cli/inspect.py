"""``bidm inspect``: what a file is, and what a recipe would make of it."""

from __future__ import annotations

from pathlib import Path

import click

from bidm_cli.cli.checkpoint_options import Reading, reading_options
from bidm_cli.cli.threads import threads_option


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--config", type=click.Path(path_type=Path), help="The checkpoint's own config, if not beside it."
)
@reading_options
@click.option("--recipe", "recipe_name", help="Show what this recipe (a name or a file) would make of it.")
@click.option("--layers", is_flag=True, help="List every layer.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write everything here.")
@threads_option
def command(
    model: Path,
    config: Path | None,
    reading: Reading,
    recipe_name: str | None,
    layers: bool,
    json_path: Path | None,
) -> None:
    """Say what MODEL is: family and evidence, parameters, schedule, first stage, layers, operations.

    MODEL is an original checkpoint, a packed file, or a bare architecture config (an LDM config.yaml, a ddim
    .yml, a JSON of constructor arguments), which needs no weights. With --recipe: what would become of each
    layer, and what it would save. Nothing is trained or written.

    What a file does not say is assumed, and the evidence says so with the option that overrides it.

    \b
      bidm inspect model.ckpt
      bidm inspect config.yaml --recipe w1a1 --layers
    """
    from bidm_cli.checkpoints.first_stages.file import StageFile
    from bidm_cli.cli.models import open_any
    from bidm_cli.recipe import Recipe
    from bidm_cli.report.inspection import Inspection
    from bidm_cli.report.pages.render import write_json

    recipe = None if recipe_name is None else Recipe.load(recipe_name)
    opened = open_any(model, config, "torch", reading)
    if isinstance(opened, StageFile):
        click.echo(opened.to_text())
        if json_path is not None:
            write_json(json_path, opened.to_json())
        return
    inspection = Inspection.of(opened, model, recipe)
    click.echo(inspection.to_text(layers))
    if json_path is not None:
        write_json(json_path, inspection.to_json())

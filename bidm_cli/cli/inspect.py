"""``bidm inspect``: contents of a file, and the result of a recipe on it."""

from __future__ import annotations

from pathlib import Path

import click

from bidm_cli.cli import options as shared
from bidm_cli.cli.threads import threads_option
from bidm_cli.cli.wording import echo


@click.command("inspect")
@shared.model_argument
@shared.checkpoint_options
@shared.strict_option
@click.option("--recipe", "recipe_name", help="Show what this recipe (a name or a file) would make of MODEL.")
@shared.layers_option
@shared.json_option
@threads_option
def command(
    model: Path,
    loading: shared.CheckpointOptions,
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

    recipe = None if recipe_name is None else Recipe.load(recipe_name)
    opened = open_any(model, backend="torch", **loading.kwargs())
    if isinstance(opened, StageFile):
        echo(opened.to_text())
        shared.write_json_if(json_path, opened.to_json())
    else:
        inspection = Inspection.of(opened, model, recipe)
        echo(inspection.to_text(layers))
        shared.write_json_if(json_path, inspection.to_json())

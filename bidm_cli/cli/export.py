"""``bidm export``: a packed file as a float checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from bidm_cli.cli import options as shared
from bidm_cli.cli.wording import echo


@click.command("export")
@shared.model_argument
@shared.path_option("-o", "--out", required=True, help="Checkpoint to write.")
@click.option("--overwrite", is_flag=True, help="Replace what is there under the names to write.")
def command(model: Path, out: Path, overwrite: bool) -> None:
    """Turn the packed file MODEL back into a float checkpoint in the original key layout.

    Packed layers get the weights alpha * sign(W). Thresholds, activation scales, shortcuts and connections
    have no place in the original layout and are left out. A configuration is written beside the checkpoint;
    for a diffusers model OUT is a folder. What is there already is replaced only if asked for.

    \b
      bidm export digits.bidm -o digits-float.pth
      bidm inspect digits-float.pth
    """
    from bidm_cli.checkpoints.evidence import caveat_lines
    from bidm_cli.checkpoints.export import WEIGHTS_ONLY, export_checkpoint, first_stage_line
    from bidm_cli.packed.format.read import load_packed

    # The torch backend: nothing is run, and no kernel has to be compiled.
    packed = load_packed(model, backend="torch")
    config = export_checkpoint(packed, out, overwrite)
    size = sum(file.stat().st_size for file in (out.rglob("*") if out.is_dir() else [out]))
    echo(f"{out} ({size:,} bytes), configuration {config}")
    for line in caveat_lines(packed):
        echo(line)
    echo(WEIGHTS_ONLY)
    if line := first_stage_line(packed):
        echo(line)

"""Run directories: ``runs/<checkpoint>-<recipe>-<number>`` with recipe, log, checkpoint and result.

runs/digits-w1a1-1/
  recipe.yaml       the resolved recipe
  model.json        what is distilled from (:mod:`bidm_cli.distill.fingerprint`)
  log.csv           losses
  events.*          the same for TensorBoard, where the extra ``tensorboard`` is installed
  checkpoint.pt     the state to resume from
  result.json       written when the packed file is there
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically
from bidm_cli.recipe import Recipe

ROOT = Path("runs")


def choose_run_dir(stem: str, recipe: str, given: Path | None, resume: bool) -> Path:
    """The folder of this run: the given one, the newest of this name to resume, or the next free number.

    Raises:
        BidmError: nothing to resume, or a given folder that holds another run.
    """
    if given is not None:
        started = (given / "recipe.yaml").is_file()
        if started and not resume:
            raise BidmError(f"{given} already holds a run; add --resume to continue it, or choose another")
        return given
    numbered = {}
    for folder in ROOT.glob(f"{stem}-{recipe}-*"):
        number = folder.name.rpartition("-")[2]
        if number.isdigit():
            numbered[int(number)] = folder
    latest = max(numbered, default=0)
    if resume:
        if not latest:
            raise BidmError(f"no run {ROOT}/{stem}-{recipe}-* to resume; leave out --resume")
        return numbered[latest]
    return ROOT / f"{stem}-{recipe}-{latest + 1}"


def write_recipe(run_dir: Path, recipe: Recipe, replace: bool = True) -> None:
    """Write recipe.yaml; without ``replace`` only where there is none, as a run may yet be refused."""
    if replace or not (run_dir / "recipe.yaml").is_file():
        with write_atomically(run_dir / "recipe.yaml") as temporary:
            temporary.write_text(recipe.to_yaml())


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Write result.json, whole or not at all."""
    with write_atomically(run_dir / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")

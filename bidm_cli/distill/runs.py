"""Run directories: ``runs/<checkpoint>-<recipe>-<number>`` with recipe, log, checkpoint and result.

runs/digits-w1a1-1/
  recipe.yaml       the resolved recipe
  model.json        what is distilled from (:mod:`bidm_cli.distill.fingerprint`)
  data.json         what is distilled on (the same)
  log.csv           losses
  events.*          the same for TensorBoard, where the extra ``tensorboard`` is installed
  checkpoint.pt     the state to resume from (:mod:`bidm_cli.distill.state_files`)
  checkpoint.before.pt  the state before it
  .lock             while a process writes to the folder
  result.json       written when the packed file is there
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bidm_cli.distill.state_files import BEFORE, NEWEST
from bidm_cli.errors import BidmError
from bidm_cli.files import remove_leftovers, write_atomically
from bidm_cli.locks import FolderInUse, folder_lock
from bidm_cli.recipe import Recipe

RUNS = Path("runs")
RECIPE = "recipe.yaml"
_OF_A_RUN = (RECIPE, "model.json", "data.json", "log.csv", NEWEST, BEFORE, "result.json")
_RECORDS = (RECIPE, "model.json", "data.json", "conditions.sha256")


@contextlib.contextmanager
def locked_run_dir(
    stem: str, recipe: str, run_dir: Path | None, resume: bool, say: Callable[[str], None]
) -> Iterator[Path]:
    """Folder of this run (:func:`choose_run_dir`), to which no other process writes in the block.

    Raises:
        BidmError: as :func:`choose_run_dir`; another run writes to the folder, or nothing can be.
    """
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        while folder is None:
            folder = choose_run_dir(stem, recipe, run_dir, resume)
            try:
                stack.enter_context(folder_lock(folder, "choose another `run_dir`", say))
            except FolderInUse:
                if run_dir is not None or resume:
                    raise
                folder = None  # begun by another process at this moment: the next number
        remove_leftovers(folder)
        yield folder


def choose_run_dir(stem: str, recipe: str, run_dir: Path | None, resume: bool) -> Path:
    """Folder of this run: ``run_dir``, else the newest of this name to resume, or the next free number.

    Raises:
        BidmError: nothing to resume, or a ``run_dir`` that holds another run.
    """
    if run_dir is not None:
        if (run_dir / RECIPE).is_file() and not resume:
            raise BidmError(f"{run_dir} already holds a run; add `resume` to continue it, or choose another")
        _check_foreign(run_dir)
        return run_dir
    numbers = (folder.name.rpartition("-")[2] for folder in RUNS.glob(f"{stem}-{recipe}-*"))
    latest = max((int(number) for number in numbers if number.isdigit()), default=0)
    if resume and not latest:
        raise BidmError(f"no run {RUNS}/{stem}-{recipe}-* to resume; leave out `resume`")
    return RUNS / f"{stem}-{recipe}-{latest if resume else latest + 1}"


def _check_foreign(run_dir: Path) -> None:
    """Raise BidmError if a run in ``run_dir`` would replace files of something else, such as the original's
    checkpoint.pt.
    """
    present = [name for name in _OF_A_RUN if (run_dir / name).exists()]
    if not present or RECIPE in present:
        return
    try:
        if "weights" in json.loads((run_dir / "model.json").read_text(encoding="utf-8")):
            return
    except (OSError, ValueError, TypeError):
        pass
    raise BidmError(
        f"{run_dir} holds {present[0]} and no run of bidm, which would replace that file; choose another "
        "`run_dir`"
    )


@contextlib.contextmanager
def removed_if_refused(run_dir: Path) -> Iterator[None]:
    """On a BidmError before anything was trained or drawn, remove the records that a new run wrote.

    What was there before stays; so does a folder with samples or a state, which can be resumed.
    """
    existed = run_dir.is_dir()
    before = {path.name for path in run_dir.iterdir()} if existed else set()
    try:
        yield
    except BidmError:
        new = {path.name for path in run_dir.iterdir()} - before if run_dir.is_dir() else set()
        if all(name in _RECORDS or name.startswith("events.") for name in new):
            for name in new:
                (run_dir / name).unlink(missing_ok=True)
            if not existed and run_dir.is_dir():
                run_dir.rmdir()
        raise


def write_recipe(run_dir: Path, recipe: Recipe, replace: bool = True) -> None:
    """Write recipe.yaml; without ``replace`` only where there is none, as a run may yet be refused."""
    if replace or not (run_dir / RECIPE).is_file():
        with write_atomically(run_dir / RECIPE) as temporary:
            temporary.write_text(recipe.to_yaml(), encoding="utf-8")


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """Write result.json, whole or not at all."""
    with write_atomically(run_dir / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")


def packed_path(path: Path) -> Path:
    """Packed file of the run directory ``path``, or ``path`` if it is none; BidmError if it is gone."""
    result = path / "result.json"
    if not path.is_dir() or not result.is_file():
        if path.is_dir() and (path / RECIPE).is_file():
            raise BidmError(f"the run {path} is not finished; continue it with bidm compress ... `resume`")
        return path
    try:
        packed = Path(json.loads(result.read_text(encoding="utf-8"))["packed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BidmError(f"{result} cannot be read ({error}); name the packed file instead") from error
    if not packed.is_file():
        raise BidmError(f"the run {path} wrote {packed}, which is gone; name the packed file instead")
    return packed


def newest_run(root: Path = RUNS) -> Path:
    """Run directory whose result is the newest; BidmError if there is none."""
    results = sorted(root.glob("*/result.json"), key=lambda path: (path.stat().st_mtime, str(path)))
    if not results:
        raise BidmError(
            f"no finished run under ./{root}; name a model: bidm report MODEL.bidm (bidm compress makes one)"
        )
    return results[-1].parent

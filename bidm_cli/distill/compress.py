"""Compression: binarize a checkpoint's network, distil it against the original, pack it into one file.

compress(load_checkpoint("model.ckpt"), Recipe.load("w1a1"), out="model.bidm", data="images/")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bidm_cli.data.condition_files import ConditionSource
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.compression import Compression, CompressResult, Networks
from bidm_cli.distill.options import CompressOptions
from bidm_cli.distill.runs import locked_run_dir
from bidm_cli.errors import BidmError
from bidm_cli.files import check_writable
from bidm_cli.interrupts import explained
from bidm_cli.keywords import with_keywords
from bidm_cli.packed.format.container import is_packed
from bidm_cli.parallel.processes import Processes, device_of, joined
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Recipe
from bidm_cli.sampling.options import check_sampler


def compress(
    model: DiffusionModel,
    recipe: Recipe,
    out: str | Path,
    *,
    options: CompressOptions = CompressOptions(),
    conditions: ConditionSource = ConditionSource(),
    reporter: Reporter | None = None,
    **keywords: Any,
) -> CompressResult:
    """Compress ``model`` as ``recipe`` says and write the packed file ``out``.

    Args:
        options, conditions: records whose fields may also be given as keywords: ``data``, ``steps``,
            ``data_labels``, ``data_range``, ``bad_images``, ``latents_cache``, ``batch_size``, ``lr``,
            ``amp``, ``accumulate``, ``checkpoint_activations``, ``device``, ``seed``, ``run_dir``,
            ``resume``, ``skip_nan``, ``decoder_steps``, ``trajectory_points``; ``context``, ... .
            Training draws from the conditions; a ``context`` in the .npz of ``data`` goes with its samples.
            The unconditional context is packed.

    Under torchrun each process trains on its share of every batch; all return when the file is there.

    Raises:
        BidmError: anything in recipe, data, output or run folder that cannot work; nothing is half-written.
        Interrupted: a signal came; the run is continued with ``resume``.
    """
    options, conditions = with_keywords(keywords, options, conditions)
    out = Path(out)
    check_output(out)
    recipe = options.applied_to(recipe)
    try:
        check_sampler(recipe.sampler.name, recipe.sampler.eta)
    except BidmError as error:
        raise BidmError(f"{recipe.where('sampler.eta')}: {error}") from error
    reporter = reporter or Reporter()
    with joined(options.device) as processes:
        options = replace(options, device=device_of(options.device))
        with (
            _folder_of(model, recipe, options, reporter, processes) as folder,
            explained(lambda: _how_to_go_on(folder)),
        ):
            networks = Networks.of(model, recipe, options, conditions)
            reporter = reporter if processes.is_first else Reporter(say=processes.notes.append)
            return Compression(networks, recipe, out, folder, options, reporter, processes).run()


@contextlib.contextmanager
def _folder_of(
    model: DiffusionModel,
    recipe: Recipe,
    options: CompressOptions,
    reporter: Reporter,
    processes: Processes,
) -> Iterator[Path]:
    """The run's folder, which the first process chooses and locks."""
    if not processes.is_first:
        yield Path(processes.from_first(None))
        return
    source = getattr(model, "source", None)
    stem = Path(source).stem if source else "model"
    run_dir = Path(options.run_dir) if options.run_dir else None
    with locked_run_dir(stem, recipe.name, run_dir, options.resume, reporter.say) as folder:
        processes.from_first(str(folder))
        yield folder


def _how_to_go_on(folder: Path) -> str:
    """Message of an interrupted run, empty before anything was written that could be continued."""
    if not (folder / "recipe.yaml").is_file():
        return ""
    return f"stopped; what is done is in {folder}; continue with `resume`"


def check_output(out: Path) -> None:
    """Raise BidmError if ``out`` is a folder, a file that bidm did not write, or in a read-only folder."""
    if out.is_dir():
        raise BidmError(f"{out} is a folder; name the packed file to write, such as {out / 'model.bidm'}")
    if out.exists() and not is_packed(out):
        raise BidmError(f"{out} exists and is not a packed file; choose another name with -o")
    check_writable(out)

"""``bidm compress``: binarize, distil against the original, pack."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from bidm_cli.cli import options as shared
from bidm_cli.cli.processes import asked_processes, processes_option
from bidm_cli.cli.prompts import TextOptions, embed_prompts, text_options
from bidm_cli.cli.threads import threads_option
from bidm_cli.cli.wording import echo
from bidm_cli.errors import BidmError

if TYPE_CHECKING:
    from bidm_cli.data.condition_files import ConditionSource
    from bidm_cli.diffusion.model import DiffusionModel
    from bidm_cli.distill.compression import CompressResult, PlannedRun
    from bidm_cli.distill.log import LogRow
    from bidm_cli.distill.options import CompressOptions
    from bidm_cli.progress import Reporter
    from bidm_cli.recipe import Recipe

compress_options = shared.grouped(
    "options",
    "bidm_cli.distill.options:CompressOptions",
    shared.path_option(
        "--data",
        help="Training images: a folder, zip, tar (several: train-{0000..0146}.tar) or .npz; or latents, an "
        ".npz or .npy of floats.",
    ),
    click.option(
        "--synthetic", is_flag=True, help="Train on samples of the original; no data needed.  [default]"
    ),
    shared.option(
        "--labels",
        "data_labels",
        metavar="HOW|FILE",
        help="Class labels of --data: folders (in sorted order), names (file names up to the first "
        "underscore), imagenet (folders named by wnids), or a file: names or folders and numbers as .json, "
        ".yaml or .csv, numbers as .npy.  [default: as the data have them]",
    ),
    shared.option(
        "--data-range",
        type=click.Choice(["auto", "as-is"]),
        default="auto",
        help="Float arrays for pixel models: brought from 0 to 1 or 0 to 255 to [-1, 1], or as they are.",
    ),
    shared.option(
        "--bad-images",
        type=click.Choice(["leave-out", "refuse"]),
        default="leave-out",
        help="Files that cannot be used: damaged, empty, too large.",
    ),
    click.option(
        "--no-latents-cache",
        "latents_cache",
        flag_value=False,
        default=True,
        help="Latent models: do not keep the encoded images in the user's cache folder for further runs.",
    ),
    shared.int_option("--steps", 0, "Training steps; overrides the recipe."),
    shared.int_option(
        "--decoder-steps", 0, "Training steps of a binary first stage's decoder; overrides the recipe."
    ),
    shared.int_option("--batch-size", 1, "Images per training step; overrides the recipe."),
    click.option(
        "--lr", type=click.FloatRange(min=0, min_open=True), help="Learning rate; overrides the recipe."
    ),
    click.option(
        "--amp",
        type=click.Choice(["auto", "off", "bfloat16", "float16"]),
        help="Mixed precision of training; overrides the recipe.",
    ),
    shared.int_option(
        "--accumulate",
        1,
        "Micro-batches in which a process computes its part of a batch; overrides the recipe.",
    ),
    click.option(
        "--checkpoint-activations/--keep-activations",
        default=None,
        help="Compute the inside of blocks again for gradients: less memory, a third more time; overrides "
        "the recipe.",
    ),
    shared.device_option(),
    shared.int_option("--seed", 0, "The same seed gives the same bytes.", 0),
    shared.path_option("--run-dir", help="Folder of the run.  [default: runs/<checkpoint>-<recipe>-<n>]"),
    shared.int_option(
        "--trajectory-points", 1, "Points of the schedule for the trajectory error at the end.", 20
    ),
    shared.int_option(
        "--skip-nan", 0, "Steps in a row that may be left out because their loss is not finite.", 0
    ),
    click.option(
        "--resume", is_flag=True, help="Continue the newest run of this name, or the one in --run-dir."
    ),
)


@click.command("compress")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@shared.option("--recipe", "recipe_name", default="w1a1", help="Name or file of a recipe.")
@shared.path_option("-o", "--out", help="Packed file to write.  [default: <checkpoint>.bidm]")
@shared.checkpoint_options
@shared.no_ema_option
@shared.strict_option
@shared.path_option("--prompts", help="Text models: a file of prompts, one per line, to train on.")
@text_options
@shared.condition_options
@compress_options
@click.option("--no-trajectory", is_flag=True, help="Leave the trajectory error out.")
@click.option("--dry-run", is_flag=True, help="Show layers, sizes, memory and time; train nothing.")
@threads_option
@processes_option("continue with `resume`")
def command(
    checkpoint: Path,
    recipe_name: str,
    out: Path | None,
    loading: shared.CheckpointOptions,
    prompts: Path | None,
    text: TextOptions,
    conditions: ConditionSource,
    options: CompressOptions,
    synthetic: bool,
    no_trajectory: bool,
    dry_run: bool,
) -> None:
    """Compress CHECKPOINT as a recipe says and write one packed file.

    The network's layers become binary (1-bit weights and activations), are distilled against the original
    network, and packed with everything that sampling needs. Interrupted runs continue with --resume.

    \b
      bidm compress model.ckpt --recipe w1a1 --data images/
      bidm compress model.ckpt --recipe my.yaml --synthetic --steps 20000
      bidm compress sd.ckpt --context prompts.safetensors --unconditional-context empty.npy
    """
    from bidm_cli.checkpoints.open import load_checkpoint
    from bidm_cli.distill.compress import compress
    from bidm_cli.recipe import Recipe

    if options.data is not None and synthetic:
        raise click.UsageError("--data and --synthetic exclude each other")
    if no_trajectory:
        options = replace(options, trajectory_points=0)
    recipe = Recipe.load(recipe_name)
    out = out or Path(f"{checkpoint.stem if checkpoint.suffix else checkpoint.name}.bidm")
    model = load_checkpoint(checkpoint, **loading.kwargs())
    options = replace(options, device=shared.choose_device(str(options.device)))
    if dry_run:
        _plan(model, options.applied_to(recipe), checkpoint, options, conditions)
        return
    conditions = embed_prompts(conditions, _lines(prompts), None, checkpoint, text)
    bars = Bars()
    result = compress(model, recipe, out, options=options, conditions=conditions, reporter=bars.reporter())
    bars.bar.close()
    _print_result(result)


def _plan(
    model: DiffusionModel,
    recipe: Recipe,
    checkpoint: Path,
    options: CompressOptions,
    conditions: ConditionSource,
) -> None:
    """Print what a run would do, once for all processes."""
    from bidm_cli.parallel.processes import device_of, joined
    from bidm_cli.report.dry_run import describe

    with joined(options.device) as here:
        model, processes = model.to(device_of(options.device)), max(here.size, asked_processes())
        plan = describe(model, recipe, checkpoint, options, conditions, processes, here)
        if here.is_first:
            echo(plan)


def _lines(path: Path | None) -> list[str]:
    """Prompts of a file, one per line; empty lines are left out."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BidmError(f"{path} is not a text file in UTF-8 (--prompts)") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BidmError(f"{path} holds no prompts; write one per line")
    return prompts


def _print_result(result: CompressResult) -> None:
    binary = sum(1 for layer in result.layers if layer.spec is not None)
    echo(f"{binary} of {len(result.layers)} layers are binary; {result.seconds:.0f} s")
    if result.skipped:
        echo(f"{result.skipped} training steps were left out: their loss or gradient was not finite")
    error = result.trajectory
    if error is not None:
        echo(
            f"trajectory error {error['mean']:.5f} ({100 * (error['relative'] or 0):.2f} % of the teacher's "
            f"mean square), {error['n']} images, {error['steps']} steps"
        )
    if result.first_stage is not None:
        echo(_first_stage_line(result.first_stage))
    echo(f"{result.path}: {result.path.stat().st_size:,} bytes; log and state in {result.run_dir}")
    echo(f"Next: bidm sample {result.path} -n 64, bidm report {result.path}")


def _first_stage_line(stage: dict[str, Any]) -> str:
    """One line on the kept parts of the first stage, the error of its weights and that of its pictures."""
    from bidm_cli.report.inspection import stage_form_text

    errors: dict[str, float] = stage.get("errors", {})
    rounded = ""
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        mean = sum(errors.values()) / len(errors)
        rounded = (
            f" ({len(errors)} weights, error {mean:.2%} on average, at most {errors[worst]:.2%}: {worst})"
        )
    psnr = "the same pictures as"
    if stage["psnr"] is not None:
        psnr = f"{stage['psnr']:.1f} dB PSNR, {stage['ssim']:.4f} SSIM to"
    form = stage_form_text(stage)
    return f"first stage: {form}{rounded}, {psnr} the original decoder on {stage['n']} latents"


class Bars:
    """One tqdm bar per stage on a terminal; elsewhere a line for about every tenth of it."""

    def __init__(self) -> None:
        self.bar = tqdm(disable=True)

    def reporter(self) -> Reporter:
        """Callbacks for :func:`bidm_cli.distill.compress.compress`."""
        from bidm_cli.progress import Reporter

        return Reporter(self.stage, self.advance, self.begin, self.say, self.pace, self.compiling)

    def begin(self, run: PlannedRun) -> None:
        """Show what is about to be trained."""
        from bidm_cli.report.opening import opening

        echo(opening(run))
        sys.stdout.flush()

    def pace(self, seconds: float, left: int) -> None:
        """Show the time that training will take."""
        from bidm_cli.report.pages.tables import duration_text

        whole = duration_text(seconds * left)
        self.say(f"  time         about {whole} for {left:,} more steps of {duration_text(seconds)}")

    def compiling(self, text: str) -> None:
        """Show a piece of the line that says that kernels are compiled."""
        from bidm_cli.cli.models import compiling

        self.bar.close()
        compiling(text)

    def stage(self, name: str, total: int) -> None:
        """Begin a bar."""
        self.bar.close()
        self.total, self.shown, self.started = total, 0, time.monotonic()
        self.bar = tqdm(total=total, desc=name, unit="step", disable=None, dynamic_ncols=True)

    def say(self, line: str) -> None:
        """Show a line of its own, clear of any bar."""
        self.bar.clear()
        echo(line)
        self.bar.refresh()

    def advance(self, row: LogRow | None) -> None:
        """Advance by one step; a log row shows the losses."""
        if not self.bar.disable:
            self.bar.update()
            if row is not None:
                self.bar.set_postfix_str(row.losses_text())
        elif row is not None and (tenth := row.step * 10 // max(1, self.total)) > self.shown:
            self.shown = tenth
            seconds = time.monotonic() - self.started
            echo(f"  step {row.step}/{self.total}  {row.losses_text()}  {seconds:.0f} s")
            sys.stdout.flush()

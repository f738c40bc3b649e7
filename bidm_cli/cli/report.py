"""``bidm report``: savings and losses of compression."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bidm_cli.cli import options as shared
from bidm_cli.cli.outputs import page_target, statistics_target
from bidm_cli.cli.processes import processes_option
from bidm_cli.cli.threads import threads_option
from bidm_cli.cli.wording import echo, with_options
from bidm_cli.errors import BidmError
from bidm_cli.parallel.place import own_place

if TYPE_CHECKING:
    from bidm_cli.data.condition_files import ConditionSource
    from bidm_cli.diffusion.model import DiffusionModel
    from bidm_cli.packed.model import PackedModel
    from bidm_cli.report.drawing import DrawnSet
    from bidm_cli.report.metrics.compare import Score
    from bidm_cli.report.metrics.networks.base import FeatureNetwork
    from bidm_cli.report.pages.summary import ModelReport, Report
    from bidm_cli.sampling.options import SamplingOptions


@click.command("report")
@click.argument("models", metavar="[MODEL]...", nargs=-1, type=click.Path(path_type=Path))
@shared.path_option(
    "--teacher",
    help="The original: measure the errors against it.  [default: the original among the MODELs]",
)
@shared.condition_options
@shared.checkpoint_options
@shared.strict_option
@shared.path_option("--reference", help="Real images, or statistics saved by pytorch-fid.")
@shared.path_option(
    "--samples",
    multiple=True,
    help="Images to compare and show; may be repeated, for the original's, say.",
)
@shared.option(
    "--features",
    help="Feature network: inception (FID), efficientnet-lite0 or timm:NAME (never called FID).  "
    "[default: inception; efficientnet-lite0 where FID's weights cannot be had and it is installed]",
)
@shared.path_option("--weights", help="Weights of the feature network.  [default: pytorch-fid's cache]")
@shared.path_option(
    "--save-stats",
    callback=statistics_target,
    help="Also write the reference's statistics, in pytorch-fid's layout (.npz).",
)
@shared.device_option(help="Device for features and the trajectory error.")
@shared.int_option("--draw", 1, "Draw this many images of each MODEL, same seeds, into samples/report.")
@shared.sampling_options
@shared.layers_option
@click.option("--bench", "timed", is_flag=True, help="Also time packed against float, as bidm bench does.")
@shared.json_option
@shared.path_option("--html", "html_path", callback=page_target, help="Also write a page, as one HTML file.")
@threads_option
@processes_option("the same command draws what is missing")
def command(
    models: tuple[Path, ...],
    teacher: Path | None,
    conditions: ConditionSource,
    loading: shared.CheckpointOptions,
    reference: Path | None,
    samples: tuple[Path, ...],
    features: str | None,
    weights: Path | None,
    save_stats: Path | None,
    device: str,
    draw: int | None,
    sampling: SamplingOptions,
    layers: bool,
    timed: bool,
    json_path: Path | None,
    html_path: Path | None,
) -> None:
    """Show what compressing saved and lost: storage, operations, file bytes, losses, errors, image quality.

    MODEL is a packed file, a run directory or an original checkpoint; without one the newest run under ./runs
    is shown. With --reference and --samples it has the FID of each set of samples, with the settings to quote
    beside it (n, steps, seed, ...), and needs no model; with --draw it draws what is missing itself. Several
    MODELs are compared in one table, and if one of them is an original, the errors of the others are measured
    against it. Without FID's weights it has another Frechet
    distance, or the rest alone, and says where to put them. Features are kept for the next call.

    \b
      bidm report digits.bidm --teacher digits.pth --html report.html
      bidm report --reference train.zip --samples samples/digits --samples samples/original
      bidm report a.bidm b.bidm original.ckpt --reference train.zip --draw 1000 --html report.html
    """
    from bidm_cli.report.pages.page import write_page
    from bidm_cli.report.pages.render import to_text
    from bidm_cli.report.pages.summary import Report

    if reference is not None and not samples and save_stats is None and draw is None:
        raise click.UsageError("--reference needs --samples or --draw to compare with it")
    if save_stats is not None and reference is None:
        raise click.UsageError("--save-stats needs --reference, whose statistics it writes")
    device = shared.choose_device(device)
    if own_place().rank:  # of the processes of a run one reports, all draw
        if draw is not None:
            _draw(_paths(models, needed=True)[0], draw, sampling, loading, device, conditions)
        return
    paths, notes = _paths(models, needed=reference is None)
    drawn = {} if draw is None else _draw(paths, draw, sampling, loading, device, conditions)
    found, why = (teacher, []) if teacher is not None else _teacher_among(paths)
    measuring = _Measuring(found, teacher is not None, loading, device, conditions, timed)
    notes += why
    reports = [measuring.report(path) for path in paths]
    report = Report(reports, samples=[*samples, *(one.path for one in drawn.values())], notes=notes)
    report.drawn |= drawn
    if reference is None:
        report.notes.append("FID was not asked for: give --reference IMAGES and --samples FOLDER")
    else:
        _score(report, reference, features, weights, device, save_stats)
    echo(to_text(report, layers))
    shared.write_json_if(json_path, report.to_json())
    if html_path is not None:
        for lines in (report.notes, *(lines for one in reports for lines in (one.caveats, one.notes))):
            lines[:] = map(with_options, lines)
        write_page(html_path, report)
        echo(f"\nPage: {html_path}")


def _paths(models: tuple[Path, ...], needed: bool) -> tuple[list[Path], list[str]]:
    """Files to report on, and notes; without ``models`` the newest run's, or none if none is needed."""
    from bidm_cli.distill.runs import newest_run, packed_path

    if models:
        return [packed_path(path) for path in models], []
    try:
        return [packed_path(newest_run())], []
    except BidmError as error:
        if needed:
            raise
        return [], [f"image quality alone: {error}"]


def _teacher_among(paths: list[Path]) -> tuple[Path | None, list[str]]:
    """The only original among packed files, whose errors are measured against it; and a note on that."""
    from bidm_cli.packed.format.container import is_packed

    originals = [path for path in paths if not is_packed(path)]
    if not originals or len(originals) == len(paths):
        return None, []
    if len(originals) > 1:
        return None, [f"no error was measured anew: {len(originals)} originals; name one as `teacher`"]
    return originals[0], [f"errors are measured against {originals[0]}, the original among the models"]


@dataclass(frozen=True)
class _Measuring:
    """The measurements that a report makes of each model.

    Attributes:
        teacher: the original. is_named: the user has named it; else it is left out where it does not fit.
        timed: packed against float, too.
    """

    teacher: Path | None
    is_named: bool
    loading: shared.CheckpointOptions
    device: str
    conditions: ConditionSource
    timed: bool

    def report(self, path: Path) -> ModelReport:
        """Report of one model."""
        from bidm_cli.cli.bench import measure
        from bidm_cli.packed.model import PackedModel
        from bidm_cli.report.pages.summary import measure_agreement, summarize

        model = self._open(path)
        report = summarize(model, path)
        if not isinstance(model, PackedModel):
            return report
        measure_agreement(report, model)
        original = self._original(report, model)
        if original is not None:
            self._measure_errors(report, model, original)
        if self.timed:
            report.bench = measure(model, original, self.device)
        return report

    def _open(self, path: Path) -> DiffusionModel:
        from bidm_cli.cli.models import open_model
        from bidm_cli.packed.format.container import is_packed

        is_teacher = self.teacher is not None and path.resolve() == self.teacher.resolve()
        takes_options = is_teacher or (self.teacher is None and not is_packed(path))
        options = self.loading.kwargs() if takes_options else {"strict": self.loading.strict}
        return open_model(path, device=self.device, **options)

    def _original(self, report: ModelReport, model: PackedModel) -> DiffusionModel | None:
        """The teacher, opened; None without one that fits."""
        from bidm_cli.cli.models import open_model

        if self.teacher is None:
            return None
        original = open_model(self.teacher, device=self.device, **self.loading.kwargs())
        if self.is_named or original.sample_shape == model.sample_shape:
            return original
        report.notes.append(f"no error was measured against {self.teacher}, which denoises another shape")
        return None

    def _measure_errors(self, report: ModelReport, model: PackedModel, original: DiffusionModel) -> None:
        from bidm_cli.checkpoints.evidence import caveat_lines, caveats_json
        from bidm_cli.data.condition_files import gather
        from bidm_cli.report.pages.summary import measure_first_stage, measure_trajectory

        said = zip(caveat_lines(original), caveats_json(original), strict=True)
        report.notes += [f"{self.teacher}: {line}" for line, caveat in said if caveat not in model.caveats]
        measure_trajectory(report, model, original, gather(original, self.conditions)[1])
        measure_first_stage(report, model, original)


def _draw(
    paths: list[Path],
    n: int,
    sampling: SamplingOptions,
    loading: shared.CheckpointOptions,
    device: str,
    conditions: ConditionSource,
) -> dict[Path, DrawnSet]:
    """Draw what is missing of ``n`` images per model, together with the other processes."""
    from bidm_cli.cli.models import open_model
    from bidm_cli.packed.format.container import is_packed
    from bidm_cli.parallel.processes import device_of, joined
    from bidm_cli.report.drawing import common_settings, draw_set

    if not paths:
        raise click.UsageError("--draw needs a MODEL")
    with joined(device) as processes:
        device = str(device_of(device))
        models = {
            path: open_model(path, device=device, **({} if is_packed(path) else loading.kwargs()))
            for path in paths
        }
        settings = common_settings(list(models.values()), sampling)
        return {
            path: draw_set(model, path, n, settings, conditions, processes=processes)
            for path, model in models.items()
        }


def _score(
    report: Report,
    reference: Path,
    features: str | None,
    weights: Path | None,
    device: str,
    save_stats: Path | None = None,
) -> None:
    """Add a score for each set of samples, or a note if the feature network's weights cannot be had."""
    from bidm_cli.report.metrics.features import MissingWeights, default_features, load_features

    try:
        if features is None:
            network, missing = default_features(weights, device)
        else:
            network, missing = load_features(features, weights, device), None
    except MissingWeights as error:
        report.notes.append(str(error))
        return
    if missing is None:
        report.scores += _scores(report.samples, reference, network, save_stats)
        return
    try:
        report.scores += _scores(report.samples, reference, network, save_stats)
        report.notes.append(f"{missing}. {network.metric} stands in its place; the two cannot be compared")
    except BidmError as error:  # statistics saved of Inception's features, say
        report.notes.append(f"{missing}. No {network.metric} in its place: {error}")


def _scores(
    samples: list[Path], reference: Path, network: FeatureNetwork, save_stats: Path | None
) -> list[Score]:
    """A score of each set of samples; the reference's statistics go to ``save_stats``."""
    from bidm_cli.report.metrics.base import statistics_of
    from bidm_cli.report.metrics.compare import compare
    from bidm_cli.report.metrics.saved import save_statistics

    known = statistics_of(reference, network, progress=True, cached=True)
    if save_stats is not None:
        save_statistics(save_stats, known.mean, known.covariance)
        echo(f"Statistics of {reference}, features {network.name}: {save_stats}")
    found = (statistics_of(path, network, progress=True, cached=True) for path in samples)
    return [compare(one, known, network) for one in found]

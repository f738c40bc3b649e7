"""Contents of a report: one :class:`ModelReport` per model, scores of image sets, timings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bidm_cli.checkpoints.evidence import caveat_lines
from bidm_cli.diffusion.condition import ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.files import sha256_of
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.model import PackedModel
from bidm_cli.report.bench.result import BenchResult
from bidm_cli.report.cost.cost import Cost, cost
from bidm_cli.report.cost.file_sizes import FileSizes, file_sizes
from bidm_cli.report.drawing import DrawnSet
from bidm_cli.report.first_stage import SEED, DecodedPairs, decode_both
from bidm_cli.report.metrics.compare import Score
from bidm_cli.report.sign_flips import SignFlips, count_sign_flips
from bidm_cli.sampling.noise import ImageNoise

WRITTEN = "measured when the file was written"


@dataclass
class ModelReport:
    """Cost, training, errors and timings of one model.

    Attributes:
        file_bytes, sizes: bytes of the file, and by part; the latter None for an original checkpoint.
        recipe: name of the recipe, None for an original checkpoint. recipe_values: the recipe itself.
        sample_shape: [C, H, W] of what the network denoises.
        sha256: of the packed file; empty for an original checkpoint.
        provenance, training: as the packed file has them.
        trajectory: the trajectory error (:func:`bidm_cli.distill.trajectory.trajectory_error`), or None.
        trajectory_source: origin of the trajectory error.
        first_stage: errors of the packed decoder's pictures to the original's ("psnr", "ssim", "n"), or None.
        first_stage_source: origin of these. decoded: the pictures that they were computed of now.
        agreement: sign flips between the backend in use and the float simulation.
        caveats: what was assumed about the model, left out or not readable, one line each.
        notes: remarks for the reader, one line each.
    """

    path: Path
    family: str
    cost: Cost
    file_bytes: int
    sizes: FileSizes | None = None
    recipe: str | None = None
    recipe_values: dict[str, Any] = field(default_factory=dict)
    sample_shape: tuple[int, ...] = ()
    sha256: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    trajectory: dict[str, Any] | None = None
    trajectory_source: str = ""
    first_stage: dict[str, Any] | None = None
    first_stage_source: str = ""
    decoded: DecodedPairs | None = None
    agreement: SignFlips | None = None
    bench: BenchResult | None = None
    caveats: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def losses(self) -> list[dict[str, float]]:
        """Rows of the training log that the packed file keeps: step, loss, noise_loss, ...; numbers only."""
        rows = self.training.get("rows")
        kept = [_numbers(row) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return [row for row in kept if "step" in row and "loss" in row]

    @property
    def trajectory_points(self) -> list[tuple[float, float]]:
        """(timestep, squared error) along the teacher's trajectory, where both are numbers."""
        times, errors = ((self.trajectory or {}).get(key) for key in ("timesteps", "per_step"))
        if not isinstance(times, list) or not isinstance(errors, list):
            return []
        pairs = (_numbers({"t": t, "e": e}) for t, e in zip(times, errors, strict=False))
        return [(pair["t"], pair["e"]) for pair in pairs if len(pair) == 2]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "family": self.family,
            "recipe": self.recipe,
            "cost": self.cost.to_json(),
            "operations_by_item": self.cost.breakdown(),
            "file_bytes": self.sizes and asdict(self.sizes),
            "bytes": self.file_bytes,
            "training": self.training,
            "trajectory_error": self.trajectory,
            "trajectory_error_from": self.trajectory_source,
            "first_stage": self.first_stage,
            "first_stage_from": self.first_stage_source,
            "agreement": self.agreement and self.agreement.to_json(),
            "provenance": self.provenance,
            "bench": self.bench and self.bench.to_json(),
            "layers": [row.to_json() for row in self.cost.layers],
            "other_parts": [row.to_json() for row in self.cost.others + self.cost.attention],
            "caveats": self.caveats,
            "notes": self.notes,
        }


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {key: float(v) for key, v in values.items() if isinstance(v, (int, float))}


@dataclass
class Report:
    """Contents of one ``bidm report``: one score per set of ``samples``, whose first images the page shows,
    and notes on what is missing, one line each. ``drawn`` has the sets that were drawn for it, by model.
    """

    models: list[ModelReport]
    scores: list[Score] = field(default_factory=list)
    samples: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    drawn: dict[Path, DrawnSet] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "models": [model.to_json() for model in self.models],
            "metrics": [score.to_json() for score in self.scores],
            "drawn": [
                {"model": str(model), "samples": str(one.path), "seconds_per_image": one.seconds}
                for model, one in self.drawn.items()
            ],
            "notes": self.notes,
        }


def summarize(model: DiffusionModel, path: Path) -> ModelReport:
    """Report of what the file itself holds: savings, bytes, training, trajectory error."""
    size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*"))
    caveats = caveat_lines(model)
    if not isinstance(model, PackedModel):
        shape = tuple(model.sample_shape)
        return ModelReport(path, model.family, cost(model), size, sample_shape=shape, caveats=caveats)
    training = dict(model.training)
    trajectory = training.pop("trajectory_error", None)
    recipe = str(model.recipe.get("name", "")) or None
    sizes = file_sizes(path)
    report = ModelReport(
        path,
        model.family,
        cost(model),
        size,
        sizes,
        recipe,
        model.recipe,
        tuple(model.sample_shape),
        sha256_of(path),
        model.provenance,
        training,
        caveats=caveats,
    )
    if isinstance(trajectory, dict):
        report.trajectory, report.trajectory_source = trajectory, WRITTEN
    stage = training.get("first_stage")
    if isinstance(stage, dict) and isinstance(stage.get("n"), int):
        report.first_stage, report.first_stage_source = stage, f"of the training data; {WRITTEN}"
    return report


def measure_trajectory(
    report: ModelReport,
    student: DiffusionModel,
    teacher: DiffusionModel,
    conditions: ConditionSet | None = None,
) -> None:
    """Compute the trajectory error anew, with the sampler's steps that the packed file names.

    Without ``conditions`` that the teacher needs, a note says so instead.

    Raises:
        BidmError: the teacher denoises something else, or ``conditions`` do not fit it.
    """
    from bidm_cli.distill.trajectory import trajectory_error

    conditions = conditions or ConditionSet()
    missing = []
    if teacher.context_width is not None and not teacher.embeds_labels and conditions.context is None:
        missing.append("`context`")
    if teacher.concat_channels and conditions.concat is None:
        missing.append("`condition`")
    if missing:
        report.notes.append(
            f"the trajectory error was not measured anew: give {' and '.join(missing)}, as to bidm compress"
        )
        return
    earlier = report.trajectory or {}
    steps, seed = earlier.get("steps"), earlier.get("seed")
    report.trajectory = trajectory_error(
        teacher,
        student,
        steps=steps if isinstance(steps, int) else min(100, teacher.schedule.timesteps),
        seed=seed if isinstance(seed, int) else 0,
        conditions=conditions,
    )
    source = Path(getattr(teacher, "source", "the teacher")).name
    report.trajectory_source = f"computed now against {source}"
    expected, actual = report.provenance.get("sha256"), getattr(teacher, "sha256", None)
    if expected and actual and expected != actual:
        report.notes.append(f"{source} is not the file that this model was made from (SHA-256 differs)")


def measure_first_stage(report: ModelReport, model: PackedModel, teacher: DiffusionModel) -> None:
    """Compare the decoders anew, on latents that the packed model draws; nothing without a first stage."""
    report.decoded = decode_both(model, teacher)
    if report.decoded is not None:
        report.first_stage = report.decoded.errors
        source = Path(getattr(teacher, "source", "the teacher")).name
        zeros = "" if model.context_width is None and not model.concat_channels else ", zeros as conditions"
        drawn = f"drawn by the packed model, seed {SEED}{zeros}"
        report.first_stage_source = f"{drawn}; computed now against {source}"


def measure_agreement(report: ModelReport, model: PackedModel, n: int = 4, seed: int = 0) -> None:
    """Compare the model's backend with the float simulation, bit for bit, on ``n`` noisy inputs.

    Nothing is measured if the simulation itself runs the model. Noise stands for context and conditioning
    channels.
    """
    if model.backend == "torch":
        return
    x = ImageNoise(seed, tuple(range(n)), model.sample_shape, model.device).draw()
    t = torch.linspace(model.schedule.timesteps - 1, 0, n, device=model.device).long()
    labels = None if model.num_classes is None else torch.arange(n) % model.num_classes
    condition = model.example(n, labels)
    simulated = load_packed(report.path, device=model.device, backend="torch")
    inputs = (condition.join(x), t, condition.context, condition.y)
    report.agreement = count_sign_flips(simulated, model, *inputs)

"""Opening lines of ``bidm compress``: model, binary layers, data, training and outputs, before it trains."""

from __future__ import annotations

from bidm_cli.checkpoints.evidence import caveat_lines
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.compression import PlannedRun
from bidm_cli.distill.optimizer import amp_dtype
from bidm_cli.errors import BidmError
from bidm_cli.networks.autoencoder import FirstStage
from bidm_cli.packed.format.first_stage import StageForm
from bidm_cli.recipe import Optimization, Train
from bidm_cli.report.cost.cost import cost
from bidm_cli.report.inspection import (
    classes_text,
    first_stage_text,
    schedule_text,
    stage_form_text,
    weights_text,
)
from bidm_cli.report.pages.tables import bytes_text, count_text, ratio_text, shape_text


def opening(run: PlannedRun) -> str:
    """About ten lines on a compression that is about to train, and what was assumed about its model."""
    model = run.model
    parameters = sum(parameter.numel() for parameter in model.unet.parameters())
    resumed = "continued in" if run.options.resume else "in"
    decoder = {"decoder": _training_text(run, run.recipe.first_stage.train)} if run.decoder else {}
    facts = {
        "network": f"{parameters:,} parameters, {bytes_text(4 * parameters)}; {weights_text(model)}",
        "denoises": f"{shape_text(model.sample_shape)}, {_prediction_text(run)}",
        "first stage": _first_stage_text(run),
        "classes": classes_text(model),
        "schedule": schedule_text(model.schedule),
        "binary": _binary_text(run),
        "data": run.data,
        "training": _training_text(run, run.recipe.train),
        **decoder,
        "time": "shown after the first steps; `dry_run` estimates it",
        "output": f"{run.out}; the whole recipe, log and state {resumed} {run.folder}",
    }
    lines = [f"{getattr(model, 'source', 'model')}: family {model.family}"]
    lines += [f"  {name:13}{text}" for name, text in facts.items()]
    return "\n".join(lines + caveat_lines(model))


def _prediction_text(run: PlannedRun) -> str:
    original, student = run.model.prediction, run.recipe.distill.predict
    if student in ("teacher", original):
        return f"predicts {original}"
    return f"predicts {original}; the binary network predicts {student}"


def _binary_text(run: PlannedRun) -> str:
    binary = sum(layer.spec is not None for layer in run.layers)
    scores = ", binary attention scores" if run.recipe.attention.scores == "binary" else ""
    text = f"{binary} of {len(run.layers)} layers by the recipe {run.recipe.name}{scores}"
    savings = _savings_text(run.model, run)
    return f"{text}; {savings}" if savings else text


def _savings_text(model: DiffusionModel, run: PlannedRun) -> str:
    """Storage and operations of one step before and after; empty for a network that cannot be traced."""
    try:
        found = cost(model, run.recipe)
    except BidmError:
        return ""
    storage = f"{bytes_text(found.float_bytes)} to {bytes_text(found.packed_bytes)}"
    operations = f"{count_text(found.macs)} to {count_text(found.ops)}"
    whole = f"{bytes_text(found.whole_float_bytes)} to {bytes_text(found.whole_packed_bytes)}"
    file = f"; whole file {whole} ({ratio_text(found.whole_ratio)})" if found.parts else ""
    return (
        f"storage {storage} ({ratio_text(found.storage_ratio)}), operations {operations} "
        f"({ratio_text(found.ops_ratio)}){file}"
    )


def _first_stage_text(run: PlannedRun) -> str:
    text = first_stage_text(run.model)
    if not isinstance(run.model.first_stage, FirstStage):
        return text
    form = StageForm.of(run.model, run.recipe.to_json())
    needed = " (its conditions need the encoder)" if form.keep != run.recipe.first_stage.keep else ""
    layers = [{"kind": "float" if layer.spec is None else "binary"} for layer in run.decoder]
    return f"{text}; packed: {stage_form_text({**vars(form), 'layers': layers})}{needed}"


def _training_text(run: PlannedRun, train: Optimization) -> str:
    device = run.model.device
    kind = str(amp_dtype(train.amp, device) or "float32").removeprefix("torch.")
    gradual = f"; activations binary after {train.progressive:.0%} of the steps" if train.progressive else ""
    if isinstance(train, Train) and train.timestep_power != 1:
        gradual += f"; low noise more often (timestep_power {train.timestep_power:g})"
    return (
        f"{train.steps:,} steps of {train.batch_size} by {train.optimizer}, lr {train.lr:g} (binary weights "
        f"{train.lr_binary:g}), {train.schedule}, seed {run.options.seed}, {kind} on {device}{gradual}"
    )

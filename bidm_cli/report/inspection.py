"""Description of a model for ``bidm inspect``, as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from bidm_cli.binary.surgery import plan, select_blocks
from bidm_cli.checkpoints.evidence import LABELS, caveats_json, caveats_of
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.packed.model import PackedModel
from bidm_cli.recipe import Recipe
from bidm_cli.report.cost.cost import Cost, cost
from bidm_cli.report.cost.file_sizes import FileSizes, file_sizes
from bidm_cli.report.cost.trace import float_network
from bidm_cli.report.pages.tables import (
    bytes_text,
    cost_tables,
    count_text,
    layer_table,
    ratio_text,
    shape_text,
)


@dataclass(frozen=True)
class Inspection:
    """Description of an opened model.

    Attributes:
        kind: "packed file", "checkpoint" or "bare configuration".
        recipe: applied to the network for its costs; None: as it is.
        rules: index of the recipe's rule that decides each layer, by name.
        connected: blocks that have, or would have, cross-timestep connections.
    """

    path: Path
    kind: str
    model: DiffusionModel
    cost: Cost
    recipe: Recipe | None = None
    rules: dict[str, int | None] = field(default_factory=dict)
    connected: list[str] = field(default_factory=list)
    sizes: FileSizes | None = None

    @classmethod
    def of(cls, model: DiffusionModel, path: Path, recipe: Recipe | None = None) -> Inspection:
        """Describe an opened model; with a recipe, the network that it would become.

        Raises:
            BidmError: a recipe that does not fit the network.
        """
        packed, weights = isinstance(model, PackedModel), getattr(model, "has_weights", True)
        kind = "packed file" if packed else "checkpoint" if weights else "bare configuration"
        sizes = file_sizes(path) if packed else None
        rules: dict[str, int | None] = {}
        connections = getattr(model.unet, "connections", None)
        connected = [] if connections is None else list(connections.block_names)
        if recipe is not None:
            network, tbs = float_network(model), recipe.tbs
            rules = {item.name: item.rule for item in plan(network, recipe)}
            connected = [] if tbs is None else select_blocks(network, tbs.connect, recipe.where("tbs"))
        return cls(path, kind, model, cost(model, recipe), recipe, rules, connected, sizes)

    def to_json(self) -> dict[str, Any]:
        model = self.model
        return {
            "path": str(self.path),
            "kind": self.kind,
            "family": model.family,
            "evidence": list(getattr(model, "evidence", [])),
            "caveats": caveats_json(model),
            "parameters": self.cost.parameters,
            "architecture": model.architecture,
            "sample_shape": list(model.sample_shape),
            "prediction": model.prediction,
            "schedule": _schedule_json(model.schedule),
            "convention": model.convention.to_json(model.family),
            "first_stage": _stage_json(model),
            "scale_factor": model.scale_factor,
            "conditioner": _part_json(model.architecture.get("conditioner"), model.conditioner),
            "num_classes": model.num_classes,
            "null_label": model.null_label,
            "ema": getattr(model, "ema", None),
            "has_weights": bool(getattr(model, "has_weights", True)),
            "recipe": self._recipe_json(),
            "provenance": getattr(model, "provenance", None),
            "connections": self.connected,
            "file_bytes": self.sizes and asdict(self.sizes),
            "cost": self.cost.to_json(),
            "operations_by_item": self.cost.breakdown(),
            "layers": [row.to_json() | {"rule": self.rules.get(row.name)} for row in self.cost.layers],
            "other_parts": [row.to_json() for row in self.cost.others + self.cost.attention],
            "decoder_layers": [row.to_json() for row in self.cost.decoder.layers]
            if self.cost.decoder
            else [],
        }

    def _recipe_json(self) -> dict[str, Any] | None:
        if self.recipe is not None:
            return self.recipe.to_json()
        return getattr(self.model, "recipe", None)

    def to_text(self, layers: bool = False) -> str:
        """Text for the terminal; every layer if asked for, else sums by role."""
        lines = [f"{self.path}: {self.kind}, family {self.model.family}"]
        for name, values in self._facts().items():
            lines += [f"  {name if i == 0 else '':13}{value}" for i, value in enumerate(values)]
        for table in cost_tables(self.cost, self.sizes, layers):
            lines += ["", table.to_text()]
        if layers and self.cost.decoder is not None:
            decoder = layer_table(self.cost.decoder)
            lines += ["", replace(decoder, title="Layers of the first stage's decoder").to_text()]
        if not layers:
            hint = "" if self.cost.binary_layers else "; savings: `recipe` w1a1"
            lines += ["", "Every layer: `layers`" + hint]
        return "\n".join(lines)

    def _facts(self) -> dict[str, list[str]]:
        """Names and lines of the text's head."""
        model, kind = self.model, self.model.architecture.get("unet", {}).get("kind", "network")
        layers, caveats = self.cost.layers, caveats_of(model)
        facts = {
            "evidence": [note for note in getattr(model, "evidence", []) if note not in caveats],
            **_caveat_facts(model),
            "network": [
                f"{kind}, {shape_text(model.sample_shape)}, predicts {model.prediction}",
                f"{self.cost.parameters:,} parameters, {len(layers)} convolutions and linear layers",
            ],
            "schedule": [schedule_text(model.schedule)],
            "sampling": [_convention_text(model)],
            "first stage": [first_stage_text(model), *_decoder_lines(self.cost.decoder, self.recipe)],
            "classes": [classes_text(model)],
            "weights": [weights_text(model)],
        }
        if self.cost.binary_layers:
            name = self.recipe.name if self.recipe else getattr(model, "recipe", {}).get("name", "unknown")
            verb = "would be" if self.recipe else "are"
            text = f"{name}: {self.cost.binary_layers} of {len(layers)} layers {verb} binary"
            scores = sum(row.kind == "binary scores" for row in self.cost.attention)
            facts["recipe"] = [text + (f", and the scores of {scores} attentions" if scores else "")]
        wanted = ((self._recipe_json() or {}).get("tbs") or {}).get("connect")
        if self.connected:
            facts["connections"] = [", ".join(self.connected)]
        elif wanted:
            facts["connections"] = [f"none: the network has no blocks {', '.join(wanted)}"]
        return facts


def _decoder_lines(decoder: Cost | None, recipe: Recipe | None) -> list[str]:
    """Line on what a binary decoder saves for one picture; none without one."""
    if decoder is None:
        return []
    verb = "would be" if recipe else "are"
    storage = f"{bytes_text(decoder.float_bytes)} to {bytes_text(decoder.packed_bytes)}"
    counts = f"{count_text(decoder.macs)} to {count_text(decoder.ops)}"
    return [
        f"decoder: {decoder.binary_layers} of {len(decoder.layers)} layers {verb} binary; storage {storage} "
        f"({ratio_text(decoder.storage_ratio)}), operations of a picture {counts} "
        f"({ratio_text(decoder.ops_ratio)})"
    ]


def _caveat_facts(model: DiffusionModel) -> dict[str, list[str]]:
    """Caveats by the word for their kind; a packed file's are those of its original."""
    facts: dict[str, list[str]] = {}
    for note in caveats_of(model):
        facts.setdefault(LABELS.get(note.kind, note.kind).lower(), []).append(note)
    return facts


def _schedule_json(schedule: NoiseSchedule) -> dict[str, Any]:
    """Description of a schedule; of an explicit one only its ends."""
    shown = {key: value for key, value in schedule.description.items() if key != "alphas_cumprod"}
    first, last = float(schedule.alphas_cumprod[0]), float(schedule.alphas_cumprod[-1])
    return {**shown, "timesteps": schedule.timesteps, "first_alpha_bar": first, "last_alpha_bar": last}


def schedule_text(schedule: NoiseSchedule) -> str:
    """Kind, timesteps and ends of a schedule in one line."""
    known = _schedule_json(schedule)
    betas = f", beta {known['start']:g} to {known['end']:g}" if "start" in known else ""
    ends = f"alpha-bar {known['first_alpha_bar']:.4g} to {known['last_alpha_bar']:.4g}"
    return f"{known.get('kind', 'unknown')}, {schedule.timesteps} timesteps{betas}, {ends}"


def _convention_text(model: DiffusionModel) -> str:
    convention = model.convention
    bounds = f" to {convention.clip_range:g}" if convention.clip_range != 1.0 else ""
    if convention.threshold_quantile is not None:
        bounds = f" by dynamic thresholding, quantile {convention.threshold_quantile:g}"
    clip = f"x0 is clipped{bounds} ({convention.clip})" if convention.clip != "none" else "x0 is not clipped"
    return f"{convention.spacing} timesteps, last alpha-bar {convention.final_alpha}, {clip}"


def _part_json(architecture: dict[str, Any] | None, module: nn.Module | None) -> dict[str, Any] | None:
    count = None if module is None else sum(p.numel() for p in module.parameters())
    return None if architecture is None else {**architecture, "parameters": count}


def _stage_json(model: DiffusionModel) -> dict[str, Any] | None:
    part = _part_json(model.architecture.get("first_stage"), model.first_stage)
    form, psnr = getattr(model, "stage_form", None), decoder_psnr(model)
    stored = {} if form is None else {"keep": form["keep"], "weights": form["weights"]}
    measured = {} if psnr is None else {"psnr": psnr}
    return None if part is None else {**part, **stored, **measured}


def first_stage_text(model: DiffusionModel) -> str:
    """Kind, parameters and scale of a model's first stage."""
    part = _part_json(model.architecture.get("first_stage"), model.first_stage)
    if part is None:
        return "none: its decoder is another file" if model.is_latent else "none: the network works on pixels"
    count = "" if part["parameters"] is None else f", {part['parameters']:,} parameters"
    form, psnr = getattr(model, "stage_form", None), decoder_psnr(model)
    stored = "" if form is None else f", {stage_form_text(form)}"
    error = "" if psnr is None else f" ({psnr:g} dB to the original decoder)"
    return f"{part['kind']}{count}{stored}{error}, scale factor {model.scale_factor:g}"


def stage_form_text(form: dict[str, Any]) -> str:
    """Parts of a first stage that a file keeps, and the form of their weights: "decoder alone, int8".

    With the decoder's layer table, if any layer of it is binary: "decoder alone, 24 of 27 layers
    binary, int8".
    """
    kept = "decoder alone" if form["keep"] == "decoder" else "encoder and decoder"
    kinds = [record["kind"] for record in form.get("layers", ())]
    binary = f", {kinds.count('binary')} of {len(kinds)} layers binary" if kinds else ""
    return f"{kept}{binary}, {form['weights']}"


def decoder_psnr(model: DiffusionModel) -> float | None:
    """PSNR in dB of a packed file's decoder to the original's, as it was measured; None where it was not."""
    measured = (getattr(model, "training", None) or {}).get("first_stage")
    psnr = measured.get("psnr") if isinstance(measured, dict) else None
    return psnr if isinstance(psnr, (int, float)) else None


def classes_text(model: DiffusionModel) -> str:
    """Number of classes and null label of a model, and its other conditions."""
    others = _conditions(model)
    if model.num_classes is None:
        return f"none; {', '.join(others)}" if others else "none: unconditional"
    what = "" if model.augmentation is None else " levels of noise on the small image (`labels`)"
    null = "" if model.null_label is None else f", {model.null_label} stands for none (guidance)"
    return "; ".join([f"{model.num_classes}{what}{null}", *others])


def _conditions(model: DiffusionModel) -> list[str]:
    """Conditions of the network besides classes, and the options that take them."""
    found = []
    if model.context_width is not None and not model.embeds_labels:
        found.append(f"embeddings [L, {model.context_width}] (`context`)")
    if model.vector_width is not None:
        found.append(f"vectors [{model.vector_width}] (y of denoise; not for sampling)")
    if model.concat_channels:
        shape = (model.concat_channels, *model.sample_shape[1:])
        found.append(f"channels {list(shape)} (`condition`)")
    return found


def weights_text(model: DiffusionModel) -> str:
    """Source of a model's weights: averaged, as trained, or packed from a file."""
    if isinstance(model, PackedModel):
        source = model.provenance.get("source") or "unknown"
        return f"packed from {source}, {model.provenance.get('steps', 0)} training steps"
    if not getattr(model, "has_weights", True):
        return "none in a bare configuration"
    return "EMA (averaged)" if getattr(model, "ema", False) else "as trained, as far as the file says"

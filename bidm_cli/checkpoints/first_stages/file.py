"""First stages (autoencoders) in files of their own, and joining one to a model that came without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.detect import FIRST_STAGE, detect, family_named, sibling_config
from bidm_cli.checkpoints.evidence import assumed, caveats
from bidm_cli.checkpoints.families.diffusers import files
from bidm_cli.checkpoints.families.diffusers.config import first_stage_from_config
from bidm_cli.checkpoints.first_stages import compvis
from bidm_cli.checkpoints.first_stages.compvis import Architecture
from bidm_cli.checkpoints.reading.state import load_strictly, shapes_of, with_prefix
from bidm_cli.checkpoints.reading.unpickle import existing_file, read_file
from bidm_cli.errors import BidmError

_IN_LDM = "first_stage_model."


@dataclass(frozen=True)
class StageFile:
    """A first stage from a file; ``scale`` is what latents are multiplied by, if a configuration says it."""

    source: Path
    architecture: Architecture
    network: nn.Module
    scale: float | None
    evidence: list[str]

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return compvis.latent_channels(self.architecture)

    @property
    def reduction(self) -> int:
        """Downsampling factor f: the image's side over that of the latents."""
        return compvis.reduction(self.architecture)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    def to_json(self) -> dict[str, Any]:
        """Report of ``bidm inspect``, as JSON."""
        return {
            "path": str(self.source),
            "kind": "first stage",
            "family": "first stage",
            "evidence": self.evidence,
            "architecture": self.architecture,
            "parameters": self.parameters,
            "latent_channels": self.channels,
            "reduction": self.reduction,
            "scale_factor": self.scale,
        }

    def to_text(self) -> str:
        """Report of ``bidm inspect``."""
        kind = "VQ" if "n_embed" in self.architecture["args"] else "KL"
        scale = "not said in the file" if self.scale is None else f"{self.scale:g}"
        lines = [
            f"{self.source}: a first stage (autoencoder) alone, {kind}-f{self.reduction}",
            f"  parameters   {self.parameters:,}",
            f"  latents      {self.channels} channels, sides 1/{self.reduction} of the image's",
            f"  scale        {scale}",
            *(f"  {'evidence' if i == 0 else '':13}{note}" for i, note in enumerate(self.evidence)),
            "  use          bidm sample CHECKPOINT `first_stage` " + str(self.source),
        ]
        return "\n".join(lines)


def load_first_stage(path: str | Path) -> StageFile:
    """A first stage from a CompVis file, a diffusers folder or file, or out of a whole LDM checkpoint.

    Raises:
        BidmError: no such file, no first stage in it, or weights that do not fit.
    """
    path = Path(path)
    found = _component(path)
    if found is not None:
        return _diffusers(path, found)
    path = existing_file(path)
    contents = read_file(path)
    detected = detect(contents, path)
    if detected.family not in (FIRST_STAGE.family, "ldm"):
        extra = "; put its config.json beside it" if detected.family == "diffusers" else ""
        raise BidmError(f"{path} is no first stage (autoencoder) but of the family {detected.family}{extra}")
    weights = detected.weights[0].tensors
    if detected.family == "ldm":
        weights = with_prefix(weights, _IN_LDM)
        if not weights:
            raise BidmError(f"{path} is a latent diffusion checkpoint without a first stage")
    return _compvis(path, weights, detected.evidence)


def join_first_stage(checkpoint: Checkpoint, stage: StageFile) -> Checkpoint:
    """Give ``checkpoint`` the first stage of its latents, and its scale; returns it.

    The scale is the stage's configuration's, else the family's (DiT and U-ViT: Stable Diffusion's 0.18215),
    else what the checkpoint had.

    Raises:
        BidmError: latents of another number of channels.
    """
    channels = checkpoint.sample_shape[0]
    if stage.channels != channels:
        raise BidmError(
            f"{stage.source} decodes latents of {stage.channels} channels, the model gives {channels}; "
            "another first stage belongs to it"
        )
    scale, reason = checkpoint.scale_factor, "as the checkpoint says"
    note: Callable[[str], str] = str
    if stage.scale is not None:
        scale, reason = stage.scale, "from the first stage's config.json"
    elif (usual := family_named(checkpoint.family).latent_scale) is not None:
        scale, reason, note = usual, f"assumed, as all of {checkpoint.family}", assumed
    obsolete = ("first stage:", "no first stage", "latents are", "the network works on")
    checkpoint.evidence = [note for note in checkpoint.evidence if not note.startswith(obsolete)] + [
        f"first stage: joined, {stage.source}; {'; '.join(stage.evidence)}",
        *caveats(stage.evidence),
        note(f"latents are scaled by {scale:g} ({reason}; override with `settings` scale_factor=S)"),
    ]
    checkpoint.first_stage, checkpoint.scale_factor = stage.network, scale
    checkpoint.architecture = {**checkpoint.architecture, "first_stage": stage.architecture}
    return checkpoint


def _component(path: Path) -> files.Component | None:
    """diffusers' configuration of the first stage that ``path`` (a folder, or a file in it) names."""
    folder = path if path.is_dir() else path.parent
    found = files.component(folder, ("vqvae", "vae") if path.is_dir() else (), files.FIRST_STAGES)
    if found is None and path.is_dir():
        raise BidmError(f"{path} has no first stage: no vae/ or vqvae/, and no config.json of one")
    return found


def _diffusers(path: Path, found: files.Component) -> StageFile:
    architecture, scale, reason = first_stage_from_config(found.config)
    weights = files.read_weights(path if path.is_file() else files.weights_file(found.folder))
    network = load_strictly(architecture, weights, "first stage", origin=f"from {found.config.where}")
    notes = [f"{found.class_name} by {found.config.where}", f"scale {scale:g} ({reason})"]
    return StageFile(path, architecture, network.requires_grad_(False), scale, notes)


def _compvis(path: Path, weights: Mapping[str, Tensor], evidence: list[str]) -> StageFile:
    kept = {name: value for name, value in weights.items() if not compvis.is_left_over(name)}
    config = sibling_config(path, FIRST_STAGE.family, evidence)
    architecture: Architecture | None = None
    if config is not None:
        architecture = compvis.first_stage_from_config(config.root.section("model"))
    architecture = architecture or compvis.infer_first_stage(shapes_of(kept))
    origin = "inferred from names and shapes" if config is None else f"from {config.path}"
    network = load_strictly(architecture, kept, "first stage", origin=origin)
    notes = [*evidence, f"{compvis.one_line(architecture)}; architecture {origin}"]
    return StageFile(path, architecture, network.requires_grad_(False), None, notes)

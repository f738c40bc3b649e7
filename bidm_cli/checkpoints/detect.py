"""Which family a file belongs to, by the names of its tensors.

detected = detect(read_file(path), path)
detected.family, detected.evidence
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bidm_cli.checkpoints.reading.pickle_names import printable
from bidm_cli.checkpoints.reading.state import Weights, state_dicts, with_prefix
from bidm_cli.errors import BidmError

_MOST_PREFIXES = 8


@dataclass(frozen=True)
class Signature:
    """A family's mark: names that all of its state dicts have.

    ``alternatives`` are complete sets of names; one of them has to be there.
    """

    family: str
    described: str
    alternatives: tuple[tuple[str, ...], ...]

    def matched(self, names: Mapping[str, Any]) -> tuple[int, int, str]:
        """(names present, names asked for, an example) of the alternative that fits best."""
        best = (0, 1, "")
        for alternative in self.alternatives:
            present = [name for name in alternative if name in names]
            if present and len(present) / len(alternative) > best[0] / best[1]:
                best = (len(present), len(alternative), present[0])
        return best


_OPENAI = (
    "time_embed.0.weight",
    "input_blocks.0.0.weight",
    "middle_block.0.in_layers.0.weight",
    "out.2.weight",
)
_DDPM = ("temb.dense.0.weight", "conv_in.weight", "mid.block_1.norm1.weight", "conv_out.weight")

# The first complete match counts, so a wrapper's names come before those of what it wraps.
SIGNATURES = (
    Signature(
        "ldm",
        "latent diffusion (CompVis)",
        (
            tuple(f"model.diffusion_model.{name}" for name in _OPENAI),
            tuple(f"model.diffusion_model.{name}" for name in _DDPM),
            tuple("model_ema.diffusion_model" + name.replace(".", "") for name in _OPENAI),
        ),
    ),
    Signature("ddpm", "DDPM (ermongroup/ddim, pesser/pytorch_diffusion)", (_DDPM,)),
    Signature("openai", "OpenAI improved-diffusion or guided-diffusion", (_OPENAI,)),
    Signature(
        "diffusers",
        "a diffusers network",
        (
            ("time_embedding.linear_1.weight", "down_blocks.0.resnets.0.norm1.weight", "conv_in.weight"),
            ("encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.conv_in.weight"),
        ),
    ),
    Signature(
        "lucidrains",
        "lucidrains/denoising-diffusion-pytorch",
        (
            ("model.init_conv.weight", "model.time_mlp.1.weight", "model.final_conv.weight"),
            ("denoise_fn.init_conv.weight", "denoise_fn.time_mlp.1.weight", "denoise_fn.final_conv.weight"),
            ("ema_model.model.init_conv.weight", "ema_model.model.final_conv.weight"),
            ("init_conv.weight", "time_mlp.1.weight", "mid_attn.to_out.weight", "final_conv.weight"),
        ),
    ),
    Signature(
        "w86763777", "w86763777/pytorch-ddpm", (("time_embedding.timembedding.0.weight", "head.weight"),)
    ),
    Signature(
        "dit", "DiT", (("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "final_layer.linear.weight"),)
    ),
    Signature(
        "uvit", "U-ViT", (("patch_embed.proj.weight", "mid_block.norm1.weight", "decoder_pred.weight"),)
    ),
    Signature(
        "score-sde",
        "score_sde_pytorch (DDPM, DDPM++, NCSN++)",
        (
            ("all_modules.0.weight", "all_modules.2.weight", "all_modules.3.GroupNorm_0.weight"),
            ("all_modules.0.W", "all_modules.1.weight", "all_modules.4.GroupNorm_0.weight"),
        ),
    ),
    Signature(
        "first stage",
        "a first stage (autoencoder) alone",
        (("encoder.conv_in.weight", "decoder.conv_in.weight", "post_quant_conv.weight"),),
    ),
)


@dataclass(frozen=True)
class Detected:
    """What a file was found to be.

    Attributes:
        weights: its state dicts that have the family's names, in file order.
        evidence: why.
        contents: the whole file's, for what a family keeps beside its weights (settings, versions).
        settings: what the user gives by name, for what a family cannot do without.
    """

    family: str
    weights: list[Weights]
    evidence: list[str]
    contents: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def detect(contents: Any, path: Path, family: str | None = None) -> Detected:
    """The family of a file's contents.

    Args:
        family: take it for this one, whatever its names say.

    Raises:
        BidmError: nothing known; says what the file has at its top and which family comes nearest.
    """
    found = state_dicts(contents)
    if family is not None:
        return _forced(contents, path, found, family)
    for signature in SIGNATURES:
        fitting = [weights for weights in found if _complete(signature, weights)]
        if fitting:
            _, _, example = signature.matched(fitting[0].tensors)
            places = ", ".join(weights.where or "the whole file" for weights in fitting)
            evidence = f"family {signature.family}, {signature.described}: keys such as {example} in {places}"
            return Detected(signature.family, fitting, [evidence], contents)
    for signature in SIGNATURES:
        fitting = [inner for weights in found for inner in _below_prefixes(signature, weights)]
        if fitting:
            places = ", ".join(weights.where for weights in fitting)
            evidence = f"family {signature.family}, {signature.described}: its names below {places}"
            return Detected(signature.family, fitting, [evidence], contents)
    raise BidmError(f"{path}: {_unknown(contents, found)}")


def _forced(contents: Any, path: Path, found: list[Weights], family: str) -> Detected:
    """The file as the user says; the state dicts with the family's names, else the largest one."""
    if not found:
        raise BidmError(f"{path}: no tensors by name in this file ({_top_level(contents)})")
    signature = next((signature for signature in SIGNATURES if signature.family == family), None)
    fitting: list[Weights] = []
    if signature is not None:
        fitting = [weights for weights in found if _complete(signature, weights)]
        fitting = fitting or [inner for weights in found for inner in _below_prefixes(signature, weights)]
    if not fitting:
        # Names of another family that shares the network, or none that bidm knows; loading will tell.
        with contextlib.suppress(BidmError):
            fitting = detect(contents, path).weights
    fitting = fitting or [max(found, key=lambda weights: len(weights.tensors))]
    evidence = f"family {family}, {described(family)}: as asked for (--family)"
    return Detected(family, fitting, [evidence], contents)


def _below_prefixes(signature: Signature, weights: Weights) -> list[Weights]:
    """The state dicts of this family that trainers keep under a prefix of their own, such as ``net.``."""
    for alternative in signature.alternatives:
        mark = "." + alternative[0]
        prefixes = [name[: -len(mark) + 1] for name in weights.tensors if name.endswith(mark)]
        inner = [
            Weights(f"{weights.where}.{prefix}".strip("."), with_prefix(weights.tensors, prefix))
            for prefix in prefixes[:_MOST_PREFIXES]
        ]
        if fitting := [part for part in inner if _complete(signature, part)]:
            return fitting
    return []


def described(family: str) -> str:
    """A family in words."""
    return next((s.described for s in SIGNATURES if s.family == family), family)


def _complete(signature: Signature, weights: Weights) -> bool:
    present, wanted, _ = signature.matched(weights.tensors)
    return present == wanted


def _unknown(contents: Any, found: list[Weights]) -> str:
    if _is_optimizer(contents):
        return "an optimizer's state, not a network; give the model's (or better the EMA) file instead"
    if not found:
        return f"no tensors by name in this file ({_top_level(contents)})"
    scores = [
        (present / wanted, signature, example)
        for signature in SIGNATURES
        for weights in found
        for present, wanted, example in [signature.matched(weights.tensors)]
        if present
    ]
    nearest = "it resembles none of the known families"
    if scores:
        share, signature, example = max(scores, key=lambda score: score[0])
        nearest = (
            f"nearest is {signature.family}, {signature.described} ({share:.0%} of its marks: {example})"
        )
    names = list(max(found, key=lambda weights: len(weights.tensors)).tensors)
    return (
        f"not a checkpoint that bidm knows: {_top_level(contents)}, tensors such as {_few(names)}; "
        f"{nearest}. If you know what it is, say so with --family NAME"
    )


def _is_optimizer(contents: Any) -> bool:
    return isinstance(contents, Mapping) and {"state", "param_groups"} <= set(map(str, contents))


def _top_level(contents: Any) -> str:
    if isinstance(contents, Mapping):
        return f"top-level keys {_few([str(key) for key in contents])}"
    if isinstance(contents, (list, tuple)):
        return f"a list of {len(contents)}"
    return f"a {type(contents).__name__}"


def _few(names: list[str]) -> str:
    shown = ", ".join(printable(name, 60) for name in names[:6])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 6 else shown

"""Models that look like a family's by the names of their tensors, and are none: refused by name.

SiT has DiT's names; flow matching and consistency models are trained with the U-Nets of diffusion. Their
weights load, and what is sampled is noise. A file's name, the training options in it, a configuration or some
of its tensors show them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bidm_cli.checkpoints.reading.pickle_names import Stub, printable
from bidm_cli.errors import BidmError


@dataclass(frozen=True)
class Neighbour:
    """A kind of model that bidm does not have.

    Attributes:
        name: in words. why: what is different.
        named: in the name of a file. said: in a setting, "name: value". has: in the names of tensors.
    """

    name: str
    why: str
    named: str = "(?!)"
    said: str = "(?!)"
    has: str = "(?!)"


_FLOW = "its network gives the velocity of a flow, not noise, x0 or v of a noise schedule"
_SIGMAS = "its network sees a noise level (sigma), not a step of a schedule of betas"
NEIGHBOURS = (
    Neighbour(
        "SiT (stochastic interpolants)",
        _FLOW,
        named=r"(?<![A-Za-z])SiT(?![a-z])",
        said=r"[:=] ?SiT-|^path_type: (?i:linear|gvp|vp)$",
        has=r"^projectors\.0\.",
    ),
    Neighbour(
        "a rectified flow",
        _FLOW,
        named=r"(?i:rectified[-_ ]?flow|(?<![a-z])reflow|instaflow)",
        said=r"(?i:rectified[-_ ]?flow|(?<![a-z])reflow|instaflow)",
    ),
    Neighbour(
        "a flow matching model",
        _FLOW,
        named=r"(?i:flow[-_ ]?match|(?<![a-z])(ot|i|sb)?[-_]?cfm(?![a-z]))",
        said=r"(?i:flow_?match|^(\w+: )?(ot|i|sb)?cfm$|^use_flow_sigmas: true|^prediction_type: flow"
        r"|^skewed_timesteps: true|^ode_method: )",
    ),
    Neighbour(
        "LightningDiT",
        "a flow, in a transformer of other layers",
        named=r"(?i:lightningdit)",
        said=r"(?i:lightningdit)",
        has=r"^blocks\.0\.(mlp\.w12|attn\.q_norm|norm1)\.weight$",
    ),
    Neighbour("PixArt", "a transformer on text", has=r"^(y_embedder\.y_proj\.fc1|t_block\.1)\.weight$"),
    Neighbour(
        "MaskDiT or MDT", "a transformer with a decoder of its own", has=r"^(decoder_blocks\.0|mask_token$)"
    ),
    Neighbour("UniDiffuser", "a transformer on images and text at once", has=r"^clip_img_embed\."),
    Neighbour(
        "a consistency model",
        _SIGMAS,
        named=r"^(cd|ct)[-_](imagenet|bedroom|cat)|(?i:consistency)",
        said=r"(?i:^training_mode: (consistency|progdist)|consistency[-_ ]?(model|distill|train))",
    ),
    Neighbour(
        "a model of EDM (Karras et al. 2022)",
        _SIGMAS,
        named=r"^edm[-_](imagenet|bedroom|cat|cifar|ffhq|afhq)",
        said=r"EDM(Precond|Loss|Scaling|Weighting|Sampling|Discretization)"
        r"|^timestep_type: continuous$|^P_mean: ",
        has=r"^(edm_mean|edm_std|edm_vpred\.sigma_max)$",
    ),
)
_MOST_WORDS = 4000
_DEEPEST = 6
_OPTIONS = ("args", "hyper_parameters", "config", "cfg", "hparams", "opt", "options")


def neighbour_of(
    name: str, settings: Iterable[str] = (), tensors: Iterable[str] = ()
) -> tuple[Neighbour, str] | None:
    """(neighbour that a model is, place that says so), by its file's name, settings and tensors' names."""
    settings, tensors = list(settings), list(tensors)
    for neighbour in NEIGHBOURS:
        if re.search(neighbour.named, name):
            return neighbour, f"the file's name, {printable(name, 80)}"
        for pattern, words, place in (
            (neighbour.said, settings, "the setting"),
            (neighbour.has, tensors, "the weights"),
        ):
            found = next((word for word in words if re.search(pattern, word)), None)
            if found is not None:
                return neighbour, f"{place} {printable(found, 80)}"
    return None


def refusal(found: tuple[Neighbour, str], family: str) -> BidmError:
    """The error for a neighbour of ``family``, which says how to load it all the same."""
    neighbour, place = found
    return BidmError(
        f"this is {neighbour.name} by {place}: {neighbour.why}, which bidm has not; if it is a model of "
        f"diffusion all the same, say so with `family` {family}"
    )


def options_in(contents: Any) -> Iterator[str]:
    """Training options that a file keeps beside its weights, as "name: value"."""
    if isinstance(contents, Mapping):
        for name in _OPTIONS:
            yield from settings_of(contents.get(name))


def settings_of(values: Any) -> Iterator[str]:
    """Settings that are set, as "name: value" at any depth; paths of files are passed over."""
    left = _MOST_WORDS
    stack: list[tuple[Any, int]] = [(values, 0)]
    while stack and left > 0:
        value, depth = stack.pop()
        value = value.state if isinstance(value, Stub) else value
        if not isinstance(value, Mapping) or depth > _DEEPEST:
            continue
        for key, inner in value.items():
            left -= 1
            if isinstance(inner, str) and not re.search(r"^[/~.]|[/\\].*[/\\]", inner):
                yield f"{key}: {inner[:200]}"
            elif isinstance(inner, (bool, int, float)) and inner:
                yield f"{key}: {str(inner).lower()}"
            elif isinstance(inner, (Mapping, Stub)):
                stack.append((inner, depth + 1))

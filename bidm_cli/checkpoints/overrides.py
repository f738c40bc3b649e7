"""Settings that the user gives by name, in place of what a file, its configuration or a rule says.

    load_checkpoint("model.pt", settings={"num_heads": 8, "prediction": "v", "beta_schedule": "cosine"})

They are ``settings={"num_heads": 8, "prediction": "v"}``. Names are the arguments of the network
(:mod:`bidm_cli.networks`), the fields of its sampling convention, and those in :data:`MODEL_SETTINGS`.
``spacing`` brings along what follows from it (:class:`SamplingConvention`), unless that is set, too.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from itertools import chain
from typing import Any, Literal, get_args, get_type_hints

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.evidence import settled
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.checkpoints.reading.schedules import check_schedule
from bidm_cli.checkpoints.reading.state import load_strictly, on_meta
from bidm_cli.checkpoints.value_range import set_value_range
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import network_class

Settings = Mapping[str, Any]
PREDICTIONS: dict[str, Literal["epsilon", "x0", "v"]] = {
    "epsilon": "epsilon", "eps": "epsilon", "x0": "x0", "sample": "x0", "xstart": "x0",
    "v": "v", "v_prediction": "v", "velocity": "v",
}  # fmt: skip
"""Values of the setting ``prediction``, and their meanings."""
_LINEAR = ("linear", "scaled_linear")
_KINDS = (*_LINEAR, "cosine", "sigmoid")
_SCHEDULE = ("beta_schedule", "timesteps", "beta_start", "beta_end")
_BEFORE_LOADING = ("version",)
_HEADS = ("num_heads", "num_head_channels")


def parse_settings(items: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """``["num_heads=8", "prediction=v"]`` as a dict; values are JSON where they can be read as that.

    Raises:
        BidmError: an item without a name or "=".
    """
    settings: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name.strip():
            raise BidmError(f"`settings` {item!r} is not NAME=VALUE, such as `settings` num_heads=8")
        try:
            value = json.loads(text)
        except ValueError:
            value = {"True": True, "False": False, "None": None}.get(text.strip(), text.strip())
        settings[name.strip()] = value
    return settings


def apply_settings(checkpoint: Checkpoint, settings: Settings) -> Checkpoint:
    """Change ``checkpoint`` as ``settings`` say, and note each in its evidence; returns it.

    Arguments of the network rebuild it around the same weights, which have to fit.

    Raises:
        BidmError: an unknown name (the known ones are listed), a value that makes no sense, or weights that
            do not fit.
    """
    options = Section(settings, "`settings`")
    network = list(inspect.signature(network_class(checkpoint.architecture["unet"]["kind"])).parameters)
    convention = {item.name for item in fields(SamplingConvention)}
    known = [*MODEL_SETTINGS, *_SCHEDULE, *sorted(convention), *network]
    for name in settings:
        if name not in known and name not in _BEFORE_LOADING:
            close = difflib.get_close_matches(name, known, n=1)
            guess = f"; did you mean {close[0]}?" if close else "."
            raise BidmError(f"`settings` knows no {name!r} for this model{guess} It knows {', '.join(known)}")
    arguments = {name: value for name, value in settings.items() if name in network}
    if arguments:
        _rebuild(checkpoint, arguments, network)
    # The spacing first: it brings settings of its own, which others may change.
    for name in sorted(settings, key=lambda name: name != "spacing"):
        if name in MODEL_SETTINGS:
            MODEL_SETTINGS[name](checkpoint, options)
        elif name in convention:
            _set_convention(checkpoint, name, options)
    if any(name in settings for name in _SCHEDULE):
        checkpoint.schedule = _schedule(checkpoint.schedule, options)
    said = ", ".join(f"{name} = {value}" for name, value in settings.items())
    checkpoint.evidence = settled(checkpoint.evidence, settings)
    checkpoint.evidence.append(f"set by hand, in place of what is said above: {said}")
    return checkpoint


def _rebuild(checkpoint: Checkpoint, arguments: dict[str, Any], known: list[str]) -> None:
    """Build the network with other ``arguments``, of the ``known`` ones, and the same weights."""
    architecture = checkpoint.architecture["unet"]
    merged = {**architecture["args"], **arguments}
    others = [name for name in _HEADS if name not in arguments]
    if len(others) == 1 and set(_HEADS) <= set(known):
        # Either of the two says it all; the other one would go first.
        merged[others[0]] = -1
    changed = {**architecture, "args": merged}
    network = on_meta(changed)
    if checkpoint.has_weights:
        # Not its state_dict(), which would convert half-precision weights.
        stored = dict(chain(checkpoint.unet.named_parameters(), checkpoint.unet.named_buffers()))
        weights = {name: stored[name].detach() for name in on_meta(architecture).state_dict()}
        network = load_strictly(changed, weights, "network", origin="with what `settings` says")
    checkpoint.unet = network
    checkpoint.architecture = {**checkpoint.architecture, "unet": changed}


def _set_convention(checkpoint: Checkpoint, name: str, options: Section) -> None:
    value = options.values[name]
    hint = get_type_hints(SamplingConvention)[name]
    allowed = get_args(hint) or (hint,)
    words = [item for item in allowed if isinstance(item, str)]
    if words and value not in words:
        raise options.wrong(name, " or ".join(words), value)
    if bool in allowed:
        value = options.flag(name)
    elif float in allowed and value is not None:
        value = options.number(name)
        if not 0 < value <= (1 if name == "threshold_quantile" else math.inf):
            raise options.wrong(name, "a number above 0, a quantile at most 1", value)
    elif not words and value is not None:
        value = options.integer(name)
    if name == "spacing":
        checkpoint.convention = checkpoint.convention.with_spacing(value)
    else:
        checkpoint.convention = replace(checkpoint.convention, **{name: value})


def _schedule(now: NoiseSchedule, options: Section) -> NoiseSchedule:
    """The schedule with what is set, the rest as it was (or as DDPM's)."""
    described = now.description
    kind = options.text("beta_schedule", described["kind"])
    if kind not in _KINDS:
        raise options.wrong("beta_schedule", " or ".join(_KINDS), kind)
    timesteps = options.integer("timesteps", now.timesteps)
    ends = (described["start"], described["end"]) if described["kind"] in _LINEAR else (1e-4, 0.02)
    start, end = options.number("beta_start", ends[0]), options.number("beta_end", ends[1])
    check_schedule("`settings`", start, end, timesteps)
    betas = {"start": start, "end": end} if kind in _LINEAR else {}
    return NoiseSchedule.from_description({"kind": kind, "timesteps": timesteps, **betas})


def _set_size(checkpoint: Checkpoint, options: Section) -> None:
    checkpoint.sample_shape = (checkpoint.sample_shape[0], *options.sides("image_size"))


def _set_learn_sigma(checkpoint: Checkpoint, options: Section) -> None:
    """Set if the network predicts a variance besides the noise: half of what comes out, or none."""
    arguments = checkpoint.architecture["unet"]["args"]
    outputs = int(next(arguments[k] for k in ("out_channels", "out_dim", "in_chans") if k in arguments))
    learned = options.flag("learn_sigma")
    if learned and outputs % 2:
        raise options.wrong("learn_sigma", f"false: {outputs} channels come out", True)
    channels = outputs // 2 if learned else outputs
    variance = "learned_range" if learned else checkpoint.convention.variance
    if not learned and variance == "learned_range":
        variance = "large"
    checkpoint.convention = replace(checkpoint.convention, variance=variance)
    checkpoint.sample_shape = (channels, *checkpoint.sample_shape[1:])


def _set_prediction(checkpoint: Checkpoint, options: Section) -> None:
    checkpoint.prediction = options.choice("prediction", PREDICTIONS, wanted="epsilon, x0 or v")


def _set_scale(checkpoint: Checkpoint, options: Section) -> None:
    scale = options.number("scale_factor")
    if scale == 0:
        raise options.wrong("scale_factor", "a number other than 0", scale)
    checkpoint.scale_factor = scale


def _set_rescaled(checkpoint: Checkpoint, options: Section) -> None:
    """Set if images are in [-1, 1] for the network (ddim's word), or in [0, 1]."""
    set_value_range(checkpoint, None if options.flag("rescaled") else "unit")


def _set_null_label(checkpoint: Checkpoint, options: Section) -> None:
    is_none = options.values["null_label"] in (None, "none")
    label = None if is_none else options.integer("null_label")
    if label is not None and not 0 <= label < (checkpoint.num_classes or 0):
        raise options.wrong("null_label", f"none, or a label below {checkpoint.num_classes or 0}", label)
    checkpoint.null_label = label


def _set_latent(checkpoint: Checkpoint, options: Section) -> None:
    """Set if the network denoises latents, where the first stage is not at hand to say so."""
    if not options.flag("latent") and checkpoint.is_latent and not checkpoint.latent:
        raise options.wrong("latent", "true: its first stage or its channels say so", False)
    checkpoint.latent = options.flag("latent")


def _set_rescale(checkpoint: Checkpoint, options: Section) -> None:
    timesteps = options.integer("timesteps", checkpoint.schedule.timesteps)
    checkpoint.time_scale = 1000 / timesteps if options.flag("rescale_timesteps") else 1.0


MODEL_SETTINGS: dict[str, Callable[[Checkpoint, Section], None]] = {
    "image_size": _set_size,
    "prediction": _set_prediction,
    "learn_sigma": _set_learn_sigma,
    "scale_factor": _set_scale,
    "null_label": _set_null_label,
    "latent": _set_latent,
    "rescale_timesteps": _set_rescale,
    "rescaled": _set_rescaled,
}
"""Settings of the model rather than of its network, by name."""

"""Settings that the user gives by name, in place of what a file, its configuration or a rule says.

    load_checkpoint("model.pt", settings={"num_heads": 8, "prediction": "v", "beta_schedule": "cosine"})

On the command line they are ``--set num_heads=8 --set prediction=v``. Names are the arguments of the network
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
from typing import Any, get_args, get_type_hints

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.reading.config import Section
from bidm_cli.checkpoints.reading.schedules import check_schedule
from bidm_cli.checkpoints.reading.state import load_strictly, on_meta
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import network_class

Settings = Mapping[str, Any]
PREDICTIONS = {"eps": "epsilon", "sample": "x0", "xstart": "x0", "v_prediction": "v", "velocity": "v"}
PREDICTIONS |= {name: name for name in ("epsilon", "x0", "v")}
"""Values of ``--set prediction``, and what they mean."""
_KINDS = ("linear", "scaled_linear", "cosine", "sigmoid")
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
            raise BidmError(f"--set {item!r} is not NAME=VALUE, such as --set num_heads=8")
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
    given = Section(settings, "--set")
    network = _network_names(checkpoint)
    convention = {item.name for item in fields(SamplingConvention)}
    known = [*MODEL_SETTINGS, *_SCHEDULE, *sorted(convention), *network]
    for name in settings:
        if name not in known and name not in _BEFORE_LOADING:
            raise BidmError(_unknown(name, known))
    arguments = {name: value for name, value in settings.items() if name in network}
    if arguments:
        _rebuild(checkpoint, arguments)
    # The spacing first: it brings settings of its own, which others may change.
    for name in sorted(settings, key=lambda name: name != "spacing"):
        if name in MODEL_SETTINGS:
            MODEL_SETTINGS[name](checkpoint, given)
        elif name in convention:
            _set_convention(checkpoint, name, given)
    if any(name in settings for name in _SCHEDULE):
        checkpoint.schedule = _schedule(checkpoint.schedule, given)
    said = ", ".join(f"{name} = {value}" for name, value in settings.items())
    checkpoint.evidence.append(f"set by hand, in place of what is said above: {said}")
    return checkpoint


def _network_names(checkpoint: Checkpoint) -> list[str]:
    """Arguments of the network's class."""
    return list(inspect.signature(network_class(checkpoint.architecture["unet"]["kind"])).parameters)


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    guess = f"; did you mean {close[0]}?" if close else "."
    return f"--set knows no {name!r} for this model{guess} It knows {', '.join(known)}"


def _rebuild(checkpoint: Checkpoint, arguments: dict[str, Any]) -> None:
    """The network with other arguments and the same weights."""
    architecture = checkpoint.architecture["unet"]
    merged = {**architecture["args"], **arguments}
    if len(set(_HEADS) & arguments.keys()) == 1 and all(
        name in _network_names(checkpoint) for name in _HEADS
    ):
        # Either of the two says it all; the other one would go first.
        other = next(name for name in _HEADS if name not in arguments)
        merged[other] = -1
    changed = {**architecture, "args": merged}
    network = on_meta(changed)
    if checkpoint.has_weights:
        # Not its state_dict(), which would convert half-precision weights.
        stored = dict(chain(checkpoint.unet.named_parameters(), checkpoint.unet.named_buffers()))
        weights = {name: stored[name].detach() for name in on_meta(architecture).state_dict()}
        network = load_strictly(changed, weights, "network", origin="with what --set says")
    checkpoint.unet = network
    checkpoint.architecture = {**checkpoint.architecture, "unet": changed}


def _set_convention(checkpoint: Checkpoint, name: str, given: Section) -> None:
    value = given.values[name]
    hint = get_type_hints(SamplingConvention)[name]
    allowed = get_args(hint) or (hint,)
    words = [item for item in allowed if isinstance(item, str)]
    if words and value not in words:
        raise given.wrong(name, " or ".join(words), value)
    if bool in allowed:
        value = given.flag(name)
    elif float in allowed and value is not None:
        value = given.number(name)
        if not 0 < value <= (1 if name == "threshold_quantile" else math.inf):
            raise given.wrong(name, "a number above 0, a quantile at most 1", value)
    elif not words and value is not None:
        value = given.integer(name)
    if name == "spacing":
        checkpoint.convention = checkpoint.convention.with_spacing(value)
    else:
        checkpoint.convention = replace(checkpoint.convention, **{name: value})


def _schedule(now: NoiseSchedule, given: Section) -> NoiseSchedule:
    """The schedule with what is given, the rest as it was (or as DDPM's)."""
    described = now.description
    kind = given.text("beta_schedule", described["kind"])
    if kind not in _KINDS:
        raise given.wrong("beta_schedule", " or ".join(_KINDS), kind)
    timesteps = given.integer("timesteps", now.timesteps)
    plain = described["kind"] in ("linear", "scaled_linear")
    ends = [
        given.number(name, described[old] if plain else default)
        for name, old, default in (("beta_start", "start", 1e-4), ("beta_end", "end", 0.02))
    ]
    check_schedule("--set", ends[0], ends[1], timesteps)
    if kind in ("cosine", "sigmoid"):
        return NoiseSchedule.from_description({"kind": kind, "timesteps": timesteps})
    numbers = {"timesteps": timesteps, "start": ends[0], "end": ends[1]}
    return NoiseSchedule.from_description({"kind": kind, **numbers})


def _set_size(checkpoint: Checkpoint, given: Section) -> None:
    checkpoint.sample_shape = (checkpoint.sample_shape[0], *given.sides("image_size"))


def _set_learn_sigma(checkpoint: Checkpoint, given: Section) -> None:
    """Set if the network predicts a variance besides the noise: half of what comes out, or none."""
    arguments = checkpoint.architecture["unet"]["args"]
    outputs = int(next(arguments[k] for k in ("out_channels", "out_dim", "in_chans") if k in arguments))
    learned = given.flag("learn_sigma")
    if learned and outputs % 2:
        raise given.wrong("learn_sigma", f"false: {outputs} channels come out", True)
    channels = outputs // 2 if learned else outputs
    variance = "learned_range" if learned else checkpoint.convention.variance
    if not learned and variance == "learned_range":
        variance = "large"
    checkpoint.convention = replace(checkpoint.convention, variance=variance)
    checkpoint.sample_shape = (channels, *checkpoint.sample_shape[1:])


def _set_prediction(checkpoint: Checkpoint, given: Section) -> None:
    word = given.text("prediction")
    if word not in PREDICTIONS:
        raise given.wrong("prediction", "epsilon, x0 or v", word)
    checkpoint.prediction = PREDICTIONS[word]  # type: ignore[assignment]


def _set_scale(checkpoint: Checkpoint, given: Section) -> None:
    scale = given.number("scale_factor")
    if scale == 0:
        raise given.wrong("scale_factor", "a number other than 0", scale)
    checkpoint.scale_factor = scale


def _set_null_label(checkpoint: Checkpoint, given: Section) -> None:
    label = None if given.values["null_label"] is None else given.integer("null_label")
    if label is not None and not 0 <= label < (checkpoint.num_classes or 0):
        raise given.wrong("null_label", f"none, or a label below {checkpoint.num_classes or 0}", label)
    checkpoint.null_label = label


def _set_rescale(checkpoint: Checkpoint, given: Section) -> None:
    timesteps = given.integer("timesteps", checkpoint.schedule.timesteps)
    checkpoint.time_scale = 1000 / timesteps if given.flag("rescale_timesteps") else 1.0


MODEL_SETTINGS: dict[str, Callable[[Checkpoint, Section], None]] = {
    "image_size": _set_size,
    "prediction": _set_prediction,
    "learn_sigma": _set_learn_sigma,
    "scale_factor": _set_scale,
    "null_label": _set_null_label,
    "rescale_timesteps": _set_rescale,
}
"""Settings of the model rather than of its network, by name."""

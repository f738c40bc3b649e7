"""The sections of a recipe as records; their fields are the keys of the YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bidm_cli.recipe.spec import BinarySpec


@dataclass(frozen=True)
class Rule:
    """One entry of ``layers``: which layers, and what they become.

    Attributes:
        roles: roles it takes ("*" takes all); empty means any.
        names: fnmatch patterns over the network's own names; empty means any.
        binarize: the binary layer's parts, or None to keep the layer float.
        line: where it stands in the file, 0 if it did not come from one.
    """

    roles: tuple[str, ...]
    names: tuple[str, ...]
    binarize: BinarySpec | None
    line: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Attention:
    """``attention``: what becomes of the products of attention, which have no weights and so match no rule.

    Attributes:
        scores: "float", or "binary" for products of the signs of q and k (see
            :mod:`bidm_cli.binary.attention`). Softmax and values are float in either case.
    """

    scores: Literal["float", "binary"] = "float"


@dataclass(frozen=True)
class Connections:
    """``tbs``: where cross-timestep connections go, and how they are trained.

    Attributes:
        connect: "decoder[-8:]" (a stage and a slice of its blocks), fnmatch patterns over block names, or a
            list of these. A network without such a stage goes without, with a warning.
        initial: where beta starts. limit: it is kept in [0, limit] (see
            :meth:`bidm_cli.binary.connections.CrossTimestepConnections.project`).
        buckets: rows of its table over the timesteps.
        plain: share of training samples without a step before, as the sampler's first step has none. It
            anchors the plain pass that h_prev comes from.
        stride: timesteps between h_prev and h_t in training; "sampler" takes the sampler's own.
        pair: how the two training inputs come about. "ddim": x_t' noised from x0, x_t by one sampler step
            from it with the teacher's noise; "same_noise" and "independent" noise both from x0.
    """

    connect: tuple[str, ...] = ("decoder[-8:]",)
    initial: float = 0.3
    limit: float = 0.5
    plain: float = 0.25
    buckets: int = 100
    stride: int | Literal["sampler"] = "sampler"
    pair: Literal["ddim", "same_noise", "independent"] = "ddim"


@dataclass(frozen=True)
class Distill:
    """``distill``: the loss on features, its weight, and the target of the output.

    Attributes:
        loss: "spd" (Space Patched Distillation), "mse" on features, or "none".
        patches: p, the map is cut into p x p patches. weight: lambda.
        features: "blocks" for all of the network's blocks, or patterns as in ``tbs.connect``.
        target: "teacher" (its predicted noise) or "noise" (the noise that was added).
    """

    loss: Literal["spd", "mse", "none"] = "spd"
    patches: int = 4
    weight: float = 0.01
    features: tuple[str, ...] = ("blocks",)
    target: Literal["teacher", "noise"] = "teacher"


@dataclass(frozen=True)
class Train:
    """``train``: optimisation. ``lr_binary`` is the rate of latent binary weights, ``lr`` of all others."""

    steps: int = 200000
    batch_size: int = 4
    optimizer: str = "adamw"
    lr: float = 2.0e-5
    lr_binary: float = 2.0e-5
    weight_decay: float = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 500
    ema: float = 0.9999
    clip: float = 1.0
    amp: Literal["auto", "off", "bfloat16", "float16"] = "auto"
    synthetic_images: int = 4096
    synthetic_steps: int = 50


@dataclass(frozen=True)
class Sampler:
    """``sampler``: what the student is trained for and sampled with by default."""

    name: Literal["ddim", "ddpm", "dpm++"] = "ddim"
    steps: int = 100
    eta: float = 0.0


@dataclass(frozen=True)
class Store:
    """``store``: float type of everything that is not a bit."""

    float: Literal["float16", "float32"] = "float16"

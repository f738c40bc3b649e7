"""Sections of a recipe as records; fields are the keys of the YAML file, with bounds on every number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from bidm_cli.recipe.bounds import Bounds
from bidm_cli.recipe.spec import BinarySpec
from bidm_cli.registry import SAMPLERS

Share = Annotated[float, Bounds(0, 1)]
Rate = Annotated[float, Bounds(0, 10)]
Steps = Annotated[int, Bounds(1, 10**5)]
"""Steps of a sampler or timesteps of a schedule; where the schedule has fewer, all of them."""


@dataclass(frozen=True)
class Rule:
    """Entry of ``layers``: a choice of layers, and their binary form or none.

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
    """``attention``: form of the products of attention, which have no weights and so match no rule.

    ``scores`` "binary": products of the signs of q and k (see :mod:`bidm_cli.binary.attention`). Softmax and
    values are float in either case. ``products``: precision of the factors of float products when sampling,
    on processors that have faster arithmetic for it; elsewhere, and in training, they are float32.
    """

    scores: Literal["float", "binary"] = "float"
    products: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Connections:
    """``tbs``: places and training of cross-timestep connections.

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
    initial: Share = 0.3
    limit: Share = 0.5
    plain: Share = 0.25
    buckets: Steps = 100
    stride: Annotated[int | Literal["sampler"], Bounds(1, 10**5)] = "sampler"
    pair: Literal["ddim", "same_noise", "independent"] = "ddim"


@dataclass(frozen=True)
class Distill:
    """``distill``: the loss on features, its weight, and the target of the output.

    Attributes:
        loss: "spd" (Space Patched Distillation), "mse" on features, or "none".
        patches: p, the map is cut into p x p patches. weight: lambda.
        features: "blocks" for all of the network's blocks, or patterns as in ``tbs.connect``.
        target: "teacher" (its predicted noise) or "noise" (the noise that was added).
        predict: what the student's output means: "epsilon", "x0" or "v" (arXiv 2202.00512), or "teacher" for
            what the teacher's means. Losses are in :mod:`bidm_cli.distill.prediction_loss`.
    """

    loss: Literal["spd", "mse", "none"] = "spd"
    patches: Annotated[int, Bounds(1, 1024)] = 4
    weight: Annotated[float, Bounds(0, 10**6)] = 0.01
    features: tuple[str, ...] = ("blocks",)
    target: Literal["teacher", "noise"] = "teacher"
    predict: Literal["teacher", "epsilon", "x0", "v"] = "teacher"


@dataclass(frozen=True)
class Optimization:
    """Keys that ``train`` and ``first_stage.train`` share, with the defaults of ``train``.

    Attributes:
        lr: rate of everything but latent binary weights, which have ``lr_binary``.
        clip: largest norm of the gradient; 0 is no limit.
        progressive: share of the steps over which activations become binary: a layer sees
            l b + (1 - l) I, with l growing from 0 to 1. Weights are binary from the first step.
        accumulate: micro-batches that each process computes its part of a batch in, one after the other.
        checkpoint_activations: keep the inputs of blocks alone and compute the rest again for gradients.

    The last two change the memory that a step takes and its time, not its result (but for the order of sums).
    """

    steps: Annotated[int, Bounds(0, 10**9)] = 200000
    batch_size: Annotated[int, Bounds(1, 10**6)] = 4
    optimizer: str = "adamw"
    lr: Rate = 2.0e-5
    lr_binary: Rate = 2.0e-5
    weight_decay: Rate = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Annotated[int, Bounds(0, 10**9)] = 500
    ema: Share = 0.9999
    clip: Annotated[float, Bounds(0, 10**6)] = 1.0
    amp: Literal["auto", "off", "bfloat16", "float16"] = "auto"
    progressive: Share = 0.0
    accumulate: Annotated[int, Bounds(1, 10**6)] = 1
    checkpoint_activations: bool = False

    WITHOUT_EFFECT = ("accumulate", "checkpoint_activations")
    """Keys that do not change the result, which a resumed run may change."""


@dataclass(frozen=True)
class Train(Optimization):
    """``train``: optimisation of the denoising network, and the samples to train on without data.

    Attributes:
        timestep_power: p, training sees t with density p (1 - t / T)^(p - 1): above 1, low noise more
            often.
    """

    synthetic_images: Annotated[int, Bounds(1, 10**8)] = 4096
    synthetic_steps: Steps = 50
    timestep_power: Annotated[float, Bounds(0.1, 10)] = 1.0


@dataclass(frozen=True)
class StageTrain(Optimization):
    """``first_stage.train``: distillation of a binary decoder from the original one, on the same latents.

    The loss is the mean |difference| of pixels, plus ``gradients`` times that of the differences between
    neighbouring pixels, plus ``squares`` times the mean squared difference.

    Attributes:
        noise: standard deviation of what is added to latents, which have one of about 1, so that the decoder
            sees more than the encoder's.
    """

    steps: Annotated[int, Bounds(0, 10**9)] = 1000
    batch_size: Annotated[int, Bounds(1, 10**6)] = 32
    lr: Rate = 4.0e-3
    lr_binary: Rate = 4.0e-3
    warmup: Annotated[int, Bounds(0, 10**9)] = 50
    ema: Share = 0.999
    progressive: Share = 0.4
    gradients: Annotated[float, Bounds(0, 10**6)] = 0.5
    squares: Annotated[float, Bounds(0, 10**6)] = 1.0
    noise: Annotated[float, Bounds(0, 10)] = 0.05


@dataclass(frozen=True)
class Sampler:
    """``sampler``: sampler of a packed file where no other is asked for.

    ``name`` is registered (:mod:`bidm_cli.registry`), training takes the stride between carried features from
    ``steps``, and ``eta`` is DDIM's share of fresh noise.
    """

    name: Annotated[str, SAMPLERS] = "ddim"
    steps: Steps = 100
    eta: Share = 0.0


@dataclass(frozen=True)
class FirstStage:
    """``first_stage``: what a packed file keeps of a latent model's first stage.

    Attributes:
        keep: "decoder", or "both"; an encoder that the model's conditions need is kept in any case.
        weights: of convolutions and linear layers; "int8" has a scale per output channel, "int6" one per 64
            inputs. Small weights, norms and biases are ``store.float`` then, codebooks float32. A float type
            holds for all of the first stage.
        layers: rules as the recipe's own, over the decoder's layers and ``post_quant_conv``; none leave the
            decoder as it is. train: distillation of a decoder that has binary layers by them.
    """

    keep: Literal["decoder", "both"] = "decoder"
    weights: Literal["int8", "int6", "float16", "float32"] = "int8"
    layers: tuple[Rule, ...] = ()
    train: StageTrain = field(default_factory=StageTrain)

    def __post_init__(self) -> None:
        if not self.layers and self.train != StageTrain():
            raise ValueError("'train' distils a decoder with binary layers; add 'layers', or leave it out")

    @property
    def is_binary(self) -> bool:
        """True if a rule makes layers of the decoder binary."""
        return any(rule.binarize is not None for rule in self.layers)


@dataclass(frozen=True)
class Store:
    """``store``: float type of everything that is not a bit."""

    float: Literal["float16", "float32"] = "float16"

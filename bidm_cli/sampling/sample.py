"""Sampling: a plan of the settled options, and the loop over its steps.

latents = sample(model, n=16, steps=50, seed=1)     # [16, C, H, W], before decoding
images = model.decode(latents)                      # in [-1, 1]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bidm_cli.data.condition_files import ConditionSource, gather
from bidm_cli.diffusion.condition import Condition, ConditionSet, shape_text
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.keywords import with_keywords
from bidm_cli.networks.value_range import ValueRange
from bidm_cli.recipe.spec import BinarySpec
from bidm_cli.registry import SAMPLERS
from bidm_cli.sampling.fixed_batch import FixedBatch, fixed_batch_size, split_in_batches
from bidm_cli.sampling.guidance import GuidedDenoiser
from bidm_cli.sampling.noise import ImageNoise
from bidm_cli.sampling.options import SamplingOptions
from bidm_cli.sampling.prediction import Clip, Clipping, estimate
from bidm_cli.sampling.timesteps import Step, ancestral_convention, sampling_steps


def sample(
    model: DiffusionModel,
    n: int | None = None,
    steps: int | None = None,
    *,
    x_t: Tensor | None = None,
    labels: Tensor | Sequence[int] | int | None = None,
    noises: Sequence[Tensor] | None = None,
    first: int = 0,
    progress: bool = False,
    options: SamplingOptions = SamplingOptions(),
    conditions: ConditionSource = ConditionSource(),
    **keywords: Any,
) -> Tensor:
    """Images ``first`` .. ``first + n - 1`` of a seed: [n, C, H, W], latents or pixels before decoding.

    Spacing, clipping and the last alpha follow the model's own convention. Each image depends only on the
    seed and its number; :mod:`bidm_cli.sampling.fixed_batch` says how far that goes.

    Args:
        n: number of images; default: as many as ``x_t``, ``labels``, context or condition has, else 1.
        x_t: start noise [n, C, H, W] instead of the seed's.
        labels: one for all images, or [n].
        noises: the noise of each step, [n, C, H, W], instead of the seed's.
        progress: show a bar (only on a terminal).
        options, conditions: records whose fields may also be given as keywords: ``sampler``, ``eta``,
            ``seed``, ``guidance``, ``batch_size``, ``clip``, ``skip``; ``context``,
            ``unconditional_context``, ``condition``, ``mask``. Fewer conditions than images start over.

    Raises:
        BidmError: settings that the model or the sampler cannot take.
    """
    keywords |= {} if steps is None else {"steps": steps}
    options, conditions = with_keywords(keywords, options, conditions)
    model, gathered = gather(model, conditions)
    plan = SamplingPlan.settle(model, options)
    classes = None if labels is None else torch.as_tensor(labels, dtype=torch.long).cpu()
    n = _count(n, x_t if x_t is not None else classes, gathered)
    classes = classes.expand(n) if classes is not None and classes.dim() == 0 else classes
    inputs = Inputs(x_t, classes, noises, first, gathered).checked(model, n, len(plan.steps))
    batches = plan.batches(first, n)
    with tqdm(total=len(batches) * len(plan.steps), unit="step", disable=None if progress else True) as bar:
        return torch.cat([plan.run(batch, inputs, bar.update) for batch in batches])


@dataclass(frozen=True)
class Inputs:
    """A caller's start noise, labels, step noises and conditions, from image ``first`` on."""

    x_t: Tensor | None = None
    labels: Tensor | None = None
    noises: Sequence[Tensor] | None = None
    first: int = 0
    conditions: ConditionSet = field(default_factory=ConditionSet)

    def condition(self, model: DiffusionModel, batch: FixedBatch) -> Condition:
        """Condition of the images of ``batch``, in its slots."""
        labels = None if self.labels is None else self.rows(self.labels, batch, model.device)
        others = self.conditions.take([number - self.first for number in batch.numbers])
        return model.make_condition(labels, others.map(batch.spread))

    def rows(self, values: Tensor, batch: FixedBatch, device: torch.device) -> Tensor:
        """Rows of ``values`` that belong to the images of ``batch``, in its slots."""
        return batch.spread(values[[number - self.first for number in batch.numbers]].to(device))

    def checked(self, model: DiffusionModel, n: int, steps: int) -> Inputs:
        """Self, if all of it fits ``n`` images of ``model`` and as many steps; else BidmError."""
        shape = (n, *model.sample_shape)
        if self.x_t is not None and tuple(self.x_t.shape) != shape:
            raise BidmError(
                f"the start noise is {shape_text(self.x_t.shape)}; this model needs {shape_text(shape)}"
            )
        if self.x_t is not None and not bool(torch.isfinite(self.x_t).all()):
            raise BidmError("the start noise holds values that are not finite")
        if self.noises is not None:
            shapes = [tuple(noise.shape) for noise in self.noises]
            if shapes != [shape] * steps:
                raise BidmError(f"noises must be {steps} tensors of {shape_text(shape)}, one per step")
        if self.labels is not None and self.labels.shape != (n,):
            raise BidmError(f"{len(self.labels)} labels for {n} images; give one, or one per image")
        model.check(self.labels, self.conditions.whole)
        return self


@dataclass(frozen=True)
class SamplingPlan:
    """Resolved options of one sampling and what follows from them; :meth:`run` draws one batch of images."""

    model: DiffusionModel
    options: SamplingOptions
    steps: list[Step]
    clip: Clip
    fixed_batch_size: int

    @classmethod
    def settle(cls, model: DiffusionModel, options: SamplingOptions = SamplingOptions()) -> SamplingPlan:
        """Plan for ``model``.

        Raises:
            BidmError: settings that the model or the sampler cannot take.
        """
        options = options.resolved(model)
        assert options.sampler is not None and options.steps is not None
        if model.device.type == "meta":
            raise BidmError("this is a configuration without weights; sampling needs a checkpoint")
        ancestral = SAMPLERS.find(options.sampler).ancestral
        convention = ancestral_convention(model.convention) if ancestral else model.convention
        schedule = model.schedule
        if convention.float32_coefficients:
            schedule = replace(schedule, alphas_cumprod=schedule.single_precision().double())
        steps = sampling_steps(schedule, convention, options.steps, options.skip, chained=ancestral)
        clip = clipping(model, options.sampler, options.clip)
        size = fixed_batch_size(model.device, model.sample_shape, options.batch_size)
        return cls(model, options, steps, clip, size)

    def batches(self, first: int, n: int) -> list[FixedBatch]:
        """Images ``first`` .. ``first + n - 1`` in the batches that :meth:`run` takes."""
        return split_in_batches(first, n, self.fixed_batch_size, padded=self.model.device.type == "cpu")

    @torch.no_grad()
    def run(
        self, batch: FixedBatch, inputs: Inputs, after_step: Callable[[], object] = lambda: None
    ) -> Tensor:
        """Images of ``batch``, [len(batch.numbers), C, H, W] float32 on the model's device.

        Raises:
            BidmError: conditions or guidance that the model cannot take.
        """
        model, device = self.model, self.model.device
        noise = ImageNoise(self.options.seed, batch.numbers, model.sample_shape, device)
        x = batch.spread(noise.draw())
        if inputs.x_t is not None:
            x = inputs.rows(inputs.x_t, batch, device).float()
        denoiser = GuidedDenoiser(model, inputs.condition(model, batch), self.options.guidance)
        kind = SAMPLERS.find(self.options.sampler or "")
        sampler = kind(self.steps, model.convention, self.options.eta or 0.0)
        limits = Clipping.of(model.convention)

        def draw() -> Tensor:
            if inputs.noises is None:
                return batch.spread(noise.draw())
            return inputs.rows(inputs.noises[index], batch, device).float()

        x_self: Tensor | None = None
        training = model.unet.training
        model.unet.eval()
        try:
            for index, step in enumerate(sampler.steps):
                output = denoiser(x, step.t, x_self)
                found = estimate(model.prediction, x, output, sampler.bars(index)[0], self.clip, limits)
                x_self = found.x0 if is_self_conditioned(model) else None
                x = sampler.advance(index, x, found, draw)
                after_step()
        finally:
            model.unet.train(training)
        return batch.collect(x)


def clipping(model: DiffusionModel, sampler: str = "ddim", clip: bool | None = None) -> Clip:
    """Clipping of x0 at each step: by default the family's convention.

    A binarized pixel model clips and takes the noise from the clipped x0: it errs most at the noisiest steps,
    where x0 divides by a small number, and without clipping some of its images explode.
    """
    if clip is False:
        return "none"
    own = model.convention.clip
    if SAMPLERS.find(sampler).ancestral:
        own = "rederive" if model.convention.clip_ancestral else "none"
    # Logits of images are pixels without bounds.
    bounded = not isinstance(model.first_stage, ValueRange) or model.first_stage.kind == "unit"
    if own == "none" and (clip or (bounded and not model.is_latent and is_binarized(model))):
        return "rederive"
    return own


def is_self_conditioned(model: DiffusionModel) -> bool:
    """True if each step's x0 is an input of the next (Analog Bits, arXiv 2208.04202).

    Binarized networks are distilled without such an estimate, so they are sampled without.
    """
    return getattr(model.unet, "self_condition", False) is True and not is_binarized(model)


def is_binarized(model: DiffusionModel) -> bool:
    """True if the model is a packed file, or any layer of its network is binary."""
    if getattr(model, "recipe", None) is not None:
        return True
    return any(isinstance(getattr(layer, "spec", None), BinarySpec) for layer in model.unet.modules())


def _count(n: int | None, rows: Tensor | None, conditions: ConditionSet) -> int:
    if n is None:
        n = max(1, len(conditions)) if rows is None or rows.dim() == 0 else len(rows)
    if n < 1:
        raise BidmError(f"{n} images asked for; use 1 or more (-n)")
    return n

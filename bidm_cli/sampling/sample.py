"""Draw images from a model: the loop over the steps, and everything that has to be settled before it.

latents = sample(model, n=16, steps=50, seed=1)     # [16, C, H, W], before decoding
images = model.decode(latents)                      # in [-1, 1]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from bidm_cli.data.condition_files import Source, gather
from bidm_cli.diffusion.condition import Condition, ConditionSet
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.recipe.spec import BinarySpec
from bidm_cli.sampling.fixed_batch import FixedBatch, fixed_batch_size, split_in_lanes
from bidm_cli.sampling.guidance import GuidedDenoiser
from bidm_cli.sampling.noise import ImageNoise
from bidm_cli.sampling.prediction import Clip, Clipping, estimate
from bidm_cli.sampling.samplers.ancestral import Ancestral
from bidm_cli.sampling.samplers.base import Sampler
from bidm_cli.sampling.samplers.ddim import DDIM
from bidm_cli.sampling.samplers.dpm_solver import DPMSolverPP
from bidm_cli.sampling.timesteps import Skip, Step, ancestral_convention, sampling_steps

SAMPLERS = ("ddim", "ddpm", "dpm++")


def sample(
    model: DiffusionModel,
    n: int | None = None,
    steps: int | None = None,
    sampler: str = "ddim",
    eta: float = 0.0,
    seed: int = 0,
    x_t: Tensor | None = None,
    labels: Tensor | Sequence[int] | int | None = None,
    guidance: float = 1.0,
    batch_size: int = 64,
    clip: bool | None = None,
    noises: Sequence[Tensor] | None = None,
    progress: bool = False,
    first: int = 0,
    skip: Skip = "uniform",
    context: Source | None = None,
    unconditional_context: Source | None = None,
    condition: Source | None = None,
    mask: Source | None = None,
) -> Tensor:
    """Images ``first`` .. ``first + n - 1`` of ``seed``: [n, C, H, W], latents or pixels before decoding.

    Spacing, clipping and the last alpha follow the model's own convention. Each image depends only on the
    seed and its number; :mod:`bidm_cli.sampling.fixed_batch` says how far that goes.

    Args:
        n: how many; default: as many as ``x_t``, ``labels``, ``context`` or ``condition`` has, else 1.
        steps: default: the packed recipe's, else 100 (at most T).
        sampler: "ddim", "ddpm" (ancestral) or "dpm++" (DPM-Solver++(2M)).
        eta: DDIM's share of fresh noise, 0 to 1.
        x_t: start noise [n, C, H, W] instead of the seed's.
        labels: one for all images, or [n].
        guidance: scale of classifier-free guidance; 1 is none.
        batch_size: images per call of the network, on a GPU; a CPU has lanes of a fixed size.
        clip: limit x0 (True), to [-1, 1] unless the model's convention says otherwise, or not (False); None:
            as the convention says, and always for binarized pixel models.
        noises: the noise of each step, [n, C, H, W], instead of the seed's.
        progress: show a bar (only on a terminal).
        skip: "uniform", or "quad" where the family has it.
        context, unconditional_context, condition, mask: tensors or files for models conditioned on other than
            classes, as :func:`bidm_cli.data.condition_files.gather` takes them; fewer rows than images
            start over.

    Raises:
        BidmError: settings that the model or the sampler cannot take.
    """
    model, rows = gather(model, context, unconditional_context, condition, mask)
    plan = SamplingPlan.settle(
        model,
        steps,
        sampler,
        eta=eta,
        seed=seed,
        guidance=guidance,
        batch_size=batch_size,
        clip=clip,
        skip=skip,
    )
    n = _count(n, x_t, labels, rows)
    inputs = Inputs(x_t, _labels_of(labels, n), noises, first, rows).checked(model, n, len(plan.steps))
    lanes = plan.lanes(first, n)
    with tqdm(total=len(lanes) * len(plan.steps), unit="step", disable=None if progress else True) as bar:
        return torch.cat([plan.run(lane, inputs, bar.update) for lane in lanes])


@dataclass(frozen=True)
class Inputs:
    """What a caller gives instead of the seed's noise, labels, and what else the images are conditioned on.

    Row 0 belongs to image ``first``; ``conditions`` start over where they end.
    """

    x_t: Tensor | None = None
    labels: Tensor | None = None
    noises: Sequence[Tensor] | None = None
    first: int = 0
    conditions: ConditionSet = field(default_factory=ConditionSet)

    def given(self, model: DiffusionModel, lane: FixedBatch) -> Condition:
        """What the images of ``lane`` are conditioned on, in its slots."""
        labels = None if self.labels is None else self.rows(self.labels, lane, model.device)
        rows = self.conditions.take([number - self.first for number in lane.numbers])
        return model.given(None if labels is None else lane.spread(labels), rows.map(lane.spread))

    def rows(self, values: Tensor, lane: FixedBatch, device: torch.device) -> Tensor:
        """The rows of ``values`` that belong to the images of ``lane``."""
        return values[[number - self.first for number in lane.numbers]].to(device)

    def checked(self, model: DiffusionModel, n: int, steps: int) -> Inputs:
        """self, if shapes, numbers, labels and conditions fit ``n`` images of ``model``.

        Raises:
            BidmError: they do not.
        """
        shape = (n, *model.sample_shape)
        if self.x_t is not None and tuple(self.x_t.shape) != shape:
            raise BidmError(f"the start noise is {_shape(self.x_t.shape)}; this model needs {_shape(shape)}")
        if self.x_t is not None and not bool(torch.isfinite(self.x_t).all()):
            raise BidmError("the start noise holds values that are not finite")
        if self.noises is not None:
            found = [tuple(noise.shape) for noise in self.noises]
            if found != [shape] * steps:
                raise BidmError(f"noises must be {steps} tensors of {_shape(shape)}, one a step")
        model.check(self.labels, self.conditions.whole)
        return self


@dataclass(frozen=True)
class SamplingPlan:
    """All settings of one sampling, checked and settled; :meth:`run` draws one lane of images."""

    model: DiffusionModel
    steps: list[Step]
    sampler: str
    eta: float
    seed: int
    guidance: float
    clip: Clip
    fixed_batch_size: int

    @classmethod
    def settle(
        cls,
        model: DiffusionModel,
        steps: int | None = None,
        sampler: str = "ddim",
        *,
        eta: float = 0.0,
        seed: int = 0,
        guidance: float = 1.0,
        batch_size: int = 64,
        clip: bool | None = None,
        skip: Skip = "uniform",
    ) -> SamplingPlan:
        """Arguments as :func:`sample`'s.

        Raises:
            BidmError: settings that the model or the sampler cannot take.
        """
        if sampler not in SAMPLERS:
            raise BidmError(f"unknown sampler {sampler!r}; use {', '.join(SAMPLERS)}")
        if not 0.0 <= eta <= 1.0 or (eta and sampler != "ddim"):
            raise BidmError(f"eta is {eta} with {sampler}; it runs from 0 to 1 and belongs to ddim")
        if batch_size < 1:
            raise BidmError(f"the batch size is {batch_size}; use 1 or more")
        if guidance != 1.0:
            model.check_guidance()
        if model.device.type == "meta":
            raise BidmError("this is a configuration without weights; sampling needs a checkpoint")
        steps = default_steps(model) if steps is None else steps
        convention = ancestral_convention(model.convention) if sampler == "ddpm" else model.convention
        return cls(
            model=model,
            steps=sampling_steps(_schedule(model), convention, steps, skip, chained=sampler == "ddpm"),
            sampler=sampler,
            eta=eta,
            seed=seed,
            guidance=guidance,
            clip=clipping(model, sampler, clip),
            fixed_batch_size=fixed_batch_size(model.device, model.sample_shape, batch_size),
        )

    def lanes(self, first: int, n: int) -> list[FixedBatch]:
        """The images ``first`` .. ``first + n - 1`` in the groups that :meth:`run` takes."""
        return split_in_lanes(first, n, self.fixed_batch_size, padded=self.model.device.type == "cpu")

    @torch.no_grad()
    def run(
        self, lane: FixedBatch, inputs: Inputs, after_step: Callable[[], object] = lambda: None
    ) -> Tensor:
        """The images of ``lane``, [len(lane.numbers), C, H, W] float32 on the model's device.

        Raises:
            BidmError: conditions or guidance that the model cannot take.
        """
        model, device = self.model, self.model.device
        noise = ImageNoise(self.seed, lane.numbers, model.sample_shape, device)
        x = noise.draw()
        if inputs.x_t is not None:
            x = inputs.rows(inputs.x_t, lane, device).float()
        x = lane.spread(x)
        denoiser = GuidedDenoiser(model, inputs.given(model, lane), self.guidance)
        rule, limits = self._rule(), Clipping.of(model.convention)

        def draw() -> Tensor:
            if inputs.noises is None:
                return lane.spread(noise.draw())
            return lane.spread(inputs.rows(inputs.noises[index], lane, device).float())

        x_self: Tensor | None = None
        with _in_eval_mode(model):
            for index, step in enumerate(rule.steps):
                output = denoiser(x, step.t, x_self)
                found = estimate(model.prediction, x, output, rule.bars(index)[0], self.clip, limits)
                x_self = found.x0 if is_self_conditioned(model) else None
                x = rule.advance(index, x, found, draw)
                after_step()
        return lane.collect(x)

    def _rule(self) -> Sampler:
        convention = self.model.convention
        precision = torch.float32 if convention.float32_coefficients else torch.float64
        if self.sampler == "ddim":
            return DDIM(self.steps, self.eta, precision)
        if self.sampler == "ddpm":
            return Ancestral(self.steps, convention.variance, convention.noise_at_end, precision)
        return DPMSolverPP(self.steps)


def _schedule(model: DiffusionModel) -> NoiseSchedule:
    if not model.convention.float32_coefficients:
        return model.schedule
    return replace(model.schedule, alphas_cumprod=model.schedule.single_precision().double())


def default_steps(model: DiffusionModel) -> int:
    """The steps a packed file's recipe asks for, else 100; never more than the schedule has."""
    recipe = getattr(model, "recipe", None) or {}
    return min(int(recipe.get("sampler", {}).get("steps", 100)), model.schedule.timesteps)


def clipping(model: DiffusionModel, sampler: str = "ddim", clip: bool | None = None) -> Clip:
    """What is done with x0 at each step.

    By default an original follows its family's convention. A binarized pixel model clips and takes the noise
    from the clipped x0: it errs most at the noisiest steps, where x0 divides by a small number, and without
    clipping some of its images explode.
    """
    if clip is False:
        return "none"
    own = model.convention.clip
    if sampler == "ddpm":
        own = "rederive" if model.convention.clip_ancestral else "none"
    # A model without a first stage may still denoise latents (DiT's decoder is another file).
    pixels = model.first_stage is None and model.sample_shape[0] in (1, 3)
    if own == "none" and (clip or (pixels and is_binarized(model))):
        return "rederive"
    return own


def is_self_conditioned(model: DiffusionModel) -> bool:
    """Whether each step's x0 is given to the next (Analog Bits, arXiv 2208.04202).

    Binarized networks are distilled without such an estimate, so they are sampled without.
    """
    return getattr(model.unet, "self_condition", False) is True and not is_binarized(model)


def is_binarized(model: DiffusionModel) -> bool:
    """Whether the model is a packed file, or any layer of its network is binary."""
    if getattr(model, "recipe", None) is not None:
        return True
    return any(isinstance(getattr(layer, "spec", None), BinarySpec) for layer in model.unet.modules())


@contextlib.contextmanager
def _in_eval_mode(model: DiffusionModel) -> Iterator[None]:
    training = model.unet.training
    model.unet.eval()
    try:
        yield
    finally:
        model.unet.train(training)


def _count(
    n: int | None, x_t: Tensor | None, labels: Tensor | Sequence[int] | int | None, rows: ConditionSet
) -> int:
    if n is None:
        given = x_t if x_t is not None else labels
        n = max(1, len(rows)) if given is None or isinstance(given, int) else len(given)
    if n < 1:
        raise BidmError(f"{n} images asked for; use 1 or more (-n)")
    return n


def _labels_of(labels: Tensor | Sequence[int] | int | None, n: int) -> Tensor | None:
    if labels is None:
        return None
    found = torch.as_tensor(labels, dtype=torch.long).cpu()
    if found.dim() == 0:
        return found.expand(n)
    if found.shape != (n,):
        raise BidmError(f"{len(found)} labels for {n} images; give one, or one an image")
    return found


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"

"""Settings of one sampling, shared by :func:`bidm_cli.sample`, the command line and ``compress``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.recipe import Sampler
from bidm_cli.registry import SAMPLERS
from bidm_cli.sampling.timesteps import Skip


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of one sampling; :meth:`resolved` fills in what is None.

    Attributes:
        steps, sampler, eta: sampler steps (at most T), a registered name ("ddim", "ddpm" (ancestral), "dpm++"
            (DPM-Solver++(2M))), DDIM's share of fresh noise, 0 to 1; default: the packed recipe's, else 100,
            "ddim" and 0.
        seed: with an image's number it decides the image.
        guidance: scale of classifier-free guidance; 1 is none.
        batch_size: images per call of the network, on a GPU; a CPU has fixed batches.
        clip: limit x0 (True), to [-1, 1] unless the model's convention says otherwise, or not (False); None:
            as the convention says, and always for binarized pixel models.
        skip: "uniform", or "quad" where the family has it.
    """

    steps: int | None = None
    sampler: str | None = None
    eta: float | None = None
    seed: int = 0
    guidance: float = 1.0
    batch_size: int = 64
    clip: bool | None = None
    skip: Skip = "uniform"

    def resolved(self, model: DiffusionModel) -> SamplingOptions:
        """Checked copy with steps, sampler and eta filled in for ``model``.

        Raises:
            BidmError: a value out of range, or guidance that the model cannot take.
        """
        recipe = _recipe_sampler(model)
        sampler = recipe.name if self.sampler is None else self.sampler
        eta = (recipe.eta if sampler == recipe.name else 0.0) if self.eta is None else self.eta
        steps = min(recipe.steps, model.schedule.timesteps) if self.steps is None else self.steps
        check_sampler(sampler, eta)
        if self.batch_size < 1:
            raise BidmError(f"the batch size is {self.batch_size}; use 1 or more")
        if self.guidance != 1.0:
            model.check_guidance()
        return replace(self, steps=steps, sampler=sampler, eta=eta)


def check_sampler(name: str, eta: float) -> None:
    """Raise BidmError unless ``name`` is registered and its sampler takes this ``eta``."""
    takes_eta = SAMPLERS.find(name).takes_eta
    if not 0.0 <= eta <= 1.0 or (eta and not takes_eta):
        raise BidmError(f"eta is {eta} with {name}; it runs from 0 to 1 and belongs to ddim")


def _recipe_sampler(model: DiffusionModel) -> Sampler:
    """``sampler`` section of a packed file's recipe; its defaults for an original checkpoint."""
    try:
        stored = {**vars(Sampler()), **(getattr(model, "recipe", None) or {}).get("sampler", {})}
        return Sampler(str(stored["name"]), int(stored["steps"]), float(stored["eta"]))
    except (TypeError, ValueError, AttributeError) as error:
        raise BidmError(f"the file's recipe has a damaged sampler ({error}); pack the model anew") from error

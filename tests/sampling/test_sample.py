import dataclasses

import pytest
import torch
from torch import nn

from bidm_cli.binary.connections import CrossTimestepConnections
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.sampling.options import SamplingOptions
from bidm_cli.sampling.prediction import estimate
from bidm_cli.sampling.sample import clipping, sample


@pytest.fixture
def connected(small):
    """The small U-Net with cross-timestep connections round its last decoder blocks."""
    names = [block.name for block in small.unet.blocks()][-2:]
    CrossTimestepConnections(names, timesteps=40, buckets=10, initial=0.3).attach(small.unet)
    return small


class Classes(nn.Module):
    """A network of one block whose output depends on the label, with 2 output channels if asked."""

    def __init__(self, outputs=1):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Conv2d(1, outputs, 3, padding=1)
        self.embedding = nn.Embedding(5, 1)
        self.embedding.weight.requires_grad_(False)

    def forward(self, x, t, context=None, y=None):
        return self.body(x + self.embedding(y)[:, :, None, None]) + t[:, None, None, None] / 40


def conditional(outputs=1, **convention):
    return DiffusionModel(
        "openai",
        Classes(outputs),
        (1, 8, 8),
        NoiseSchedule.linear(40, 1e-3, 0.2),
        SamplingConvention(**convention),
        {},
        null_label=4,
        num_classes=5,
    )


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("dpm++", 0.0)])
def test_an_image_depends_on_seed_and_number_alone(connected, sampler, eta):
    options = {"steps": 3, "sampler": sampler, "eta": eta, "seed": 7}
    whole = sample(connected, n=40, **options)
    for batch_size in (1, 7):
        assert torch.equal(sample(connected, n=40, batch_size=batch_size, **options), whole)
    for first, n in ((5, 1), (30, 4)):
        assert torch.equal(sample(connected, n=n, first=first, **options), whole[first : first + n])
    assert not torch.equal(sample(connected, n=40, **{**options, "seed": 8}), whole)
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 40


def test_features_are_carried_between_the_steps(connected):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    carried = sample(connected, steps=4, x_t=x)
    with torch.no_grad():
        connected.unet.connections.beta.zero_()
    assert (sample(connected, steps=4, x_t=x) - carried).abs().max() > 1e-3


def manual_guidance(model, x, label, scale, steps, shared):
    """Ten lines that say what guidance with connections means; ``shared``: the mistake of one memory."""
    memories = [{}, {}]
    if shared:
        memories[1] = memories[0]
    bars = model.schedule.alphas_cumprod.tolist()
    visited = list(range(0, 40, 40 // steps))
    for t, after in zip(visited[::-1], [*visited[:-1][::-1], None], strict=True):
        passes = []
        for y, memory in zip((label, 4), memories, strict=True):
            times, labels = torch.full((len(x),), t), torch.full((len(x),), y)
            passes.append(model.denoise(x, times, y=labels, carried=memory))
        e = passes[1] + scale * (passes[0] - passes[1])
        found = estimate("epsilon", x, e, bars[t])
        a = 1.0 if after is None else bars[after]
        x = a**0.5 * found.x0 + (1 - a) ** 0.5 * found.eps
    return x


@torch.no_grad()
def test_guidance_keeps_two_memories():
    model = conditional()
    CrossTimestepConnections(["body"], timesteps=40, buckets=4, initial=0.4).attach(model.unet)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    got = sample(model, steps=5, x_t=x, labels=2, guidance=3.0)
    torch.testing.assert_close(got, manual_guidance(model, x, 2, 3.0, 5, shared=False))
    assert (got - manual_guidance(model, x, 2, 3.0, 5, shared=True)).abs().max() > 1e-2


def test_guidance_of_one_is_the_conditional_pass_and_of_zero_the_unconditional():
    model = conditional()
    x = torch.randn(2, 1, 8, 8)
    plain = sample(model, steps=4, x_t=x, labels=[2, 4])
    assert not torch.equal(sample(model, steps=4, x_t=x, labels=2)[1], plain[1])
    none = sample(model, steps=4, x_t=x, labels=2, guidance=0.0)
    torch.testing.assert_close(none[1], plain[1])


def test_guidance_leaves_the_learned_variance_and_unguided_channels_alone():
    from bidm_cli.sampling.guidance import GuidedDenoiser

    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    with torch.no_grad():
        model = conditional(outputs=2)
        plain = GuidedDenoiser(model, model.make_condition(labels))(x, 5)
        guided = GuidedDenoiser(model, model.make_condition(labels), 3.0)(x, 5)
        null = GuidedDenoiser(model, model.make_condition(torch.tensor([4, 4])))(x, 5)
    torch.testing.assert_close(guided[:, :1], null[:, :1] + 3 * (plain[:, :1] - null[:, :1]))
    assert torch.equal(guided[:, 1:], plain[:, 1:])
    wide = dataclasses.replace(model, convention=SamplingConvention(guided_channels=2))
    with torch.no_grad():
        both = GuidedDenoiser(wide, wide.make_condition(labels), 3.0)(x, 5)
    assert not torch.equal(both[:, 1:], plain[:, 1:])


def test_given_noise_is_used_row_by_row(gaussian):
    model = gaussian()
    x = torch.randn(3, 1, 8, 8)
    noises = list(torch.randn(5, 3, 1, 8, 8))
    whole = sample(model, steps=5, eta=1.0, x_t=x, noises=noises)
    last = sample(model, steps=5, eta=1.0, x_t=x[2:], noises=[noise[2:] for noise in noises])
    torch.testing.assert_close(last, whole[2:])
    assert not torch.allclose(whole, sample(model, steps=5, eta=1.0, x_t=x))


def test_clipping_follows_the_family_unless_told(gaussian, small):
    assert clipping(gaussian()) == "none"
    assert clipping(gaussian(), clip=True) == "rederive"
    assert clipping(gaussian(clip="keep_eps")) == clipping(gaussian(clip="keep_eps"), clip=True) == "keep_eps"
    assert clipping(gaussian(clip="rederive"), clip=False) == "none"
    assert clipping(gaussian(clip="rederive"), "ddpm") == "none"
    assert clipping(gaussian(clip_ancestral=True), "ddpm") == "rederive"
    images = sample(gaussian(mean=0.9, deviation=0.5), n=8, steps=20, clip=True)
    assert images.abs().max() <= 1
    assert sample(gaussian(mean=0.9, deviation=0.5), n=8, steps=20).max() > 1.2


def test_binarized_pixel_models_clip(small):
    from bidm_cli.binary.surgery import binarize
    from bidm_cli.recipe import Recipe

    assert clipping(small) == "none"
    binarize(small.unet, Recipe.load("w1a1"), timesteps=40)
    assert clipping(small) == "rederive"
    assert clipping(small, "dpm++") == clipping(small, "ddpm") == "rederive"
    assert clipping(small, clip=False) == "none"
    assert clipping(dataclasses.replace(small, first_stage=nn.Identity())) == "none"
    assert clipping(dataclasses.replace(small, sample_shape=(4, 8, 8))) == "none"


def resolved(model, **options):
    found = SamplingOptions(**options).resolved(model)
    return found.sampler, found.steps, found.eta


def test_the_defaults_without_a_recipe(small, gaussian):
    assert resolved(gaussian()) == ("ddim", 100, 0.0)
    assert resolved(small) == ("ddim", 40, 0.0)


def test_the_recipes_sampler_is_the_default(small):
    small.recipe = {"sampler": {"name": "ddim", "steps": 7, "eta": 0.5}}
    assert resolved(small) == ("ddim", 7, 0.5)
    assert resolved(small, eta=0.0, steps=3) == ("ddim", 3, 0.0)
    assert resolved(small, sampler="dpm++") == ("dpm++", 7, 0.0)
    assert torch.equal(sample(small, n=2), sample(small, n=2, steps=7, eta=0.5))
    small.recipe = {"sampler": {"name": "dpm++", "steps": 5, "eta": 0.0}}
    assert torch.equal(sample(small, n=2), sample(small, n=2, steps=5, sampler="dpm++"))
    assert not torch.equal(sample(small, n=2), sample(small, n=2, sampler="ddim"))


@pytest.mark.parametrize("stored", [{"name": "euler"}, {"steps": "many"}, {"eta": None}, 3], ids=str)
def test_a_damaged_recipe_is_refused(small, stored):
    small.recipe = {"sampler": stored}
    with pytest.raises(BidmError, match=r"unknown sampler|damaged"):
        sample(small, n=1)


def test_options_as_a_record_and_as_keywords(small):
    options = SamplingOptions(steps=2, seed=3, eta=1.0)
    assert torch.equal(sample(small, 2, options=options), sample(small, n=2, steps=2, seed=3, eta=1.0))
    with pytest.raises(TypeError, match="unexpected keyword stepz"):
        sample(small, stepz=2)


def test_counts_and_devices(small):
    assert sample(small, steps=1).shape == (1, 1, 8, 8)
    assert sample(small, steps=1, x_t=torch.zeros(5, 1, 8, 8)).shape == (5, 1, 8, 8)
    assert sample(conditional(), steps=1, labels=[0, 1, 2]).shape == (3, 1, 8, 8)
    small.unet.train()
    assert sample(small, n=2, steps=1).dtype == torch.float32
    assert small.unet.training


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "euler"}, "ddim, ddpm"),
        ({"eta": 1.5}, "0 to 1"),
        ({"eta": 0.5, "sampler": "dpm++"}, "belongs to ddim"),
        ({"steps": 41}, "1 to 40"),
        ({"n": 0}, "1 or more"),
        ({"batch_size": 0}, "batch size"),
        ({"guidance": 2.0}, "null label"),
        ({"labels": 1}, "no classes"),
        ({"seed": -1}, "seed"),
        ({"x_t": torch.zeros(1, 1, 8, 7)}, "needs"),
        ({"n": 2, "x_t": torch.zeros(3, 1, 8, 8)}, "needs"),
        ({"x_t": torch.full((1, 1, 8, 8), float("nan"))}, "finite"),
        ({"noises": [torch.zeros(1, 1, 8, 8)], "steps": 2}, "one per step"),
        ({"skip": "cubic"}, "uniform or quad"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(small, options, message):
    with pytest.raises(BidmError, match=message):
        sample(small, **{"steps": 2, **options})


@pytest.mark.parametrize(
    "labels, message", [(None, "give `labels`"), (5, "0 to 4"), ([1, 2, 3], "3 labels for 2")]
)
def test_bad_labels_are_refused(labels, message):
    with pytest.raises(BidmError, match=message):
        sample(conditional(), n=2, steps=2, labels=labels)


def test_a_model_without_weights_is_refused(small):
    small.unet.to("meta")
    with pytest.raises(BidmError, match="without weights"):
        sample(small, n=1, steps=1)

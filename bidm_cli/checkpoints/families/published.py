"""Published U-Nets of OpenAI's layout, recognised by their shapes, for what weights do not tell.

Attention heads and their order, image size, schedule, scale factor and the rescaling of time are not in the
weights. A configuration always comes first; these tables second; a rule, said aloud, last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Heads = dict[str, int]
"""``num_heads`` or ``num_head_channels``, as :class:`bidm_cli.networks.ldm_unet.LDMUNet` takes them."""
_WIDTH_32, _WIDTH_64 = {"num_head_channels": 32}, {"num_head_channels": 64}
_ONE, _FOUR, _EIGHT = {"num_heads": 1}, {"num_heads": 4}, {"num_heads": 8}


@dataclass(frozen=True)
class KnownNetwork:
    """Published latent diffusion network: size of the latents, ends of LDM's "linear" schedule, scale factor
    where the file does not hold one.
    """

    name: str
    heads: Heads
    image_size: int
    betas: tuple[float, float] = (0.0015, 0.0195)
    scale_factor: float = 1.0
    prediction: Literal["epsilon", "v"] = "epsilon"


@dataclass(frozen=True)
class Assumed:
    """Settings of a network in OpenAI's files.

    Attributes:
        reason: where all this comes from, for the evidence. schedule: "cosine" or "linear".
        new_order: of the rows of ``qkv``. rescale: the network sees t * 1000 / T.
    """

    reason: str
    heads: Heads
    image_size: int
    schedule: str = "linear"
    timesteps: int = 1000
    new_order: bool = False
    rescale: bool = False


_MILD, _TEXT = (0.0015, 0.0155), ((0.00085, 0.012), 0.18215)
_SD, _SIX, _IMAGENET = (1, 2, 4, 4), (1, 1, 2, 2, 4, 4), (1, 2, 3, 4)

# model_channels, channel_mult, in_channels, context_dim
_LDM: tuple[tuple[tuple[Any, ...], KnownNetwork], ...] = (
    ((224, (1, 2, 3, 4), 3, None), KnownNetwork("LSUN-Bedrooms, FFHQ or CelebA-HQ", _WIDTH_32, 64)),
    ((192, (1, 2, 2, 4, 4), 4, None), KnownNetwork("LSUN-Churches", _EIGHT, 32, _MILD)),
    ((256, (1, 2, 4), 4, 512), KnownNetwork("ImageNet f8", _WIDTH_32, 32)),
    ((192, (1, 2, 3, 5), 3, 512), KnownNetwork("ImageNet (cin256-v2)", _ONE, 64)),
    ((192, (1, 2, 3, 5), 3, 640), KnownNetwork("text2img256", _WIDTH_32, 64)),
    ((256, (1, 2, 3, 4), 7, None), KnownNetwork("inpainting", _EIGHT, 64, (0.0015, 0.0205))),
    ((160, (1, 2, 2, 4), 6, None), KnownNetwork("super-resolution (bsr)", _WIDTH_32, 64, _MILD)),
    ((128, (1, 4, 8), 6, None), KnownNetwork("semantic synthesis", _EIGHT, 64, (0.0015, 0.0205))),
    ((320, _SD, 4, 1280), KnownNetwork("txt2img-1p4B", _EIGHT, 32, *_TEXT)),
    ((320, _SD, 4, 768), KnownNetwork("Stable Diffusion 1", _EIGHT, 64, *_TEXT)),
    ((320, _SD, 4, 1024), KnownNetwork("Stable Diffusion 2", _WIDTH_64, 64, *_TEXT)),
    ((320, _SD, 9, 768), KnownNetwork("Stable Diffusion 1's inpainting", _EIGHT, 64, *_TEXT)),
    ((320, _SD, 9, 1024), KnownNetwork("Stable Diffusion 2's inpainting", _WIDTH_64, 64, *_TEXT)),
    ((320, _SD, 5, 1024), KnownNetwork("Stable Diffusion 2's depth2img", _WIDTH_64, 64, *_TEXT)),
    (
        (256, (1, 2, 2, 4), 7, 1024),
        KnownNetwork("Stable Diffusion's x4 upscaler", _EIGHT, 128, (1e-4, 0.02), 0.08333, "v"),
    ),
)

# model_channels, channel_mult, num_res_blocks, attention_resolutions, resblock_updown, use_scale_shift_norm
_OPENAI: tuple[tuple[tuple[Any, ...], Assumed], ...] = (
    (
        (192, _IMAGENET, 3, (2, 4, 8), True, True),
        Assumed("guided-diffusion 64x64", _WIDTH_64, 64, "cosine", new_order=True),
    ),
    ((256, (1, 1, 2, 3, 4), 2, (4, 8, 16), True, True), Assumed("guided-diffusion 128x128", _FOUR, 128)),
    ((256, _SIX, 2, (8, 16, 32), True, True), Assumed("guided-diffusion 256x256 or LSUN", _WIDTH_64, 256)),
    (
        (256, (0.5, 1, *_SIX[1:]), 2, (16, 32, 64), True, True),
        Assumed("guided-diffusion 512x512", _WIDTH_64, 512),
    ),
    ((192, _SIX, 2, (8, 16, 32), True, True), Assumed("guided-diffusion's upsampler 64 to 256", _FOUR, 256)),
    (
        (192, _SIX, 2, (16, 32), True, True),
        Assumed("guided-diffusion's upsampler 128 to 512", _WIDTH_64, 512),
    ),
    (
        (128, _IMAGENET, 3, (4, 8), False, True),
        Assumed("improved-diffusion ImageNet 64x64", _FOUR, 64, "cosine", 4000, rescale=True),
    ),
    (
        (128, (1, 2, 2, 2), 3, (2, 4), False, True),
        Assumed("improved-diffusion CIFAR-10", _FOUR, 32, "cosine", 4000, rescale=True),
    ),
    (
        (192, _IMAGENET, 3, (4, 8), False, True),
        Assumed("improved-diffusion class-conditional ImageNet 64x64", _FOUR, 64, "cosine", 4000),
    ),
    ((128, _SIX, 2, (16,), False, False), Assumed("improved-diffusion LSUN", _ONE, 256)),
)


def known_network(unet: dict[str, Any]) -> KnownNetwork | None:
    """The published latent diffusion network with these arguments of :class:`LDMUNet`, if there is one."""
    shape = (
        unet["model_channels"],
        tuple(unet["channel_mult"]),
        unet["in_channels"],
        unet.get("context_dim"),
    )
    return next((known for key, known in _LDM if key == shape), None)


def assume_heads(unet: dict[str, Any], has_classes: bool) -> tuple[Heads, str]:
    """(heads, where they come from) of a latent diffusion network whose weights are all there is."""
    known = known_network(unet)
    if known is not None:
        return known.heads, f"as in {known.name}, recognised by its shapes"
    if unet.get("use_spatial_transformer"):
        if has_classes:
            return _dividing(unet, [_ONE], "assumed, as LDM's class-conditional models")
        return _dividing(unet, [_EIGHT, _ONE], "assumed, as text models")
    if unet["use_scale_shift_norm"] and unet["resblock_updown"]:
        return _dividing(unet, [_EIGHT, _WIDTH_32], "assumed, as LSUN-Churches")
    return _dividing(unet, [_WIDTH_32, _EIGHT], "assumed, as most LDM networks")


def assume(unet: dict[str, Any]) -> Assumed:
    """Settings of a network in OpenAI's files, by the arguments of :class:`LDMUNet` that the weights tell."""
    shape = [unet["model_channels"], tuple(unet["channel_mult"]), unet["num_res_blocks"]]
    shape += [tuple(sorted(set(unet["attention_resolutions"])))]
    shape += [unet["resblock_updown"], unet["use_scale_shift_norm"]]
    for key, known in _OPENAI:
        if key == tuple(shape):
            return replace(known, reason=f"as {known.reason}, recognised by its shapes")
    if unet["resblock_updown"]:
        usual = _dividing(unet, [_WIDTH_64, _FOUR], "assumed, as most guided-diffusion networks")
    else:
        usual = _dividing(unet, [_FOUR], "assumed, as most improved-diffusion networks")
    # By the number of resolutions, as the original scripts choose them: 4 for 64, ..., 7 for 512.
    size = 32 if tuple(unet["channel_mult"]) == (1, 2, 2, 2) else 2 ** (len(unet["channel_mult"]) + 2)
    return Assumed(usual[1], usual[0], size)


def _dividing(unet: dict[str, Any], usual: list[Heads], reason: str) -> tuple[Heads, str]:
    """The first of the ``usual`` heads that divide all widths with attention, else a single head."""
    for heads in usual:
        if all(width % next(iter(heads.values())) == 0 for width in attention_widths(unet)):
            return heads, reason
    return _ONE, "assumed: the widths divide by nothing more usual"


def heads_text(heads: Heads) -> str:
    """Heads in words, for the evidence."""
    ((name, number),) = heads.items()
    return f"{number} {'channels per head' if name == 'num_head_channels' else 'per layer'}"


def attention_widths(unet: dict[str, Any]) -> list[int]:
    """Channels at each place with attention, the middle included."""
    widths = [int(multiple * unet["model_channels"]) for multiple in unet["channel_mult"]]
    levels = [w for i, w in enumerate(widths) if 2**i in unet["attention_resolutions"]]
    return [*levels, widths[-1]]

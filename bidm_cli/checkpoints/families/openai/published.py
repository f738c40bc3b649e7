"""OpenAI's published networks, recognised by their shapes, for what weights do not tell.

Attention heads, their order, image size, schedule and the rescaling of time are not in the weights. A
configuration always comes first; this table second; a rule, said aloud, last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bidm_cli.checkpoints.families.openai.infer import attention_widths


@dataclass(frozen=True)
class Assumed:
    """Settings of a network that its weights do not show.

    Attributes:
        heads: ``num_heads`` or ``num_head_channels``, as :class:`LDMUNet` takes them.
        new_order: of the rows of ``qkv``.
        schedule: "cosine" or "linear", of ``timesteps`` T.
        rescale: the network sees t * 1000 / T.
        reason: where all this comes from, for the evidence.
    """

    heads: dict[str, int]
    image_size: int
    schedule: str
    timesteps: int
    new_order: bool = False
    rescale: bool = False
    reason: str = ""


@dataclass(frozen=True)
class _Known:
    name: str
    model_channels: int
    channel_mult: tuple[float, ...]
    num_res_blocks: int
    attention: tuple[int, ...]
    updown: bool
    film: bool
    assumed: Assumed

    def matches(self, unet: dict[str, Any]) -> bool:
        return (
            self.model_channels == unet["model_channels"]
            and self.channel_mult == tuple(unet["channel_mult"])
            and self.num_res_blocks == unet["num_res_blocks"]
            and set(self.attention) == set(unet["attention_resolutions"])
            and self.updown == unet["resblock_updown"]
            and self.film == unet["use_scale_shift_norm"]
        )


_WIDTH_64, _FOUR = {"num_head_channels": 64}, {"num_heads": 4}
_SIX = (1, 1, 2, 2, 4, 4)
_LINEAR_256 = Assumed(_WIDTH_64, 256, "linear", 1000)
_COSINE_64 = Assumed(_FOUR, 64, "cosine", 4000, rescale=True)

_KNOWN = (
    _Known(
        "guided-diffusion 64x64", 192, (1, 2, 3, 4), 3, (2, 4, 8), True, True,
        Assumed(_WIDTH_64, 64, "cosine", 1000, new_order=True),
    ),
    _Known(
        "guided-diffusion 128x128", 256, (1, 1, 2, 3, 4), 2, (4, 8, 16), True, True,
        Assumed(_FOUR, 128, "linear", 1000),
    ),
    _Known("guided-diffusion 256x256 or LSUN", 256, _SIX, 2, (8, 16, 32), True, True, _LINEAR_256),
    _Known(
        "guided-diffusion 512x512", 256, (0.5, 1, *_SIX[1:]), 2, (16, 32, 64), True, True,
        Assumed(_WIDTH_64, 512, "linear", 1000),
    ),
    _Known(
        "guided-diffusion's upsampler 64 to 256", 192, _SIX, 2, (8, 16, 32), True, True,
        Assumed(_FOUR, 256, "linear", 1000),
    ),
    _Known(
        "guided-diffusion's upsampler 128 to 512", 192, _SIX, 2, (16, 32), True, True,
        Assumed(_WIDTH_64, 512, "linear", 1000),
    ),
    _Known("improved-diffusion ImageNet 64x64", 128, (1, 2, 3, 4), 3, (4, 8), False, True, _COSINE_64),
    _Known(
        "improved-diffusion CIFAR-10", 128, (1, 2, 2, 2), 3, (2, 4), False, True,
        Assumed(_FOUR, 32, "cosine", 4000, rescale=True),
    ),
    _Known(
        "improved-diffusion class-conditional ImageNet 64x64", 192, (1, 2, 3, 4), 3, (4, 8), False, True,
        Assumed(_FOUR, 64, "cosine", 4000),
    ),
    _Known(
        "improved-diffusion LSUN", 128, _SIX, 2, (16,), False, False,
        Assumed({"num_heads": 1}, 256, "linear", 1000),
    ),
)  # fmt: skip


def assume(unet: dict[str, Any]) -> Assumed:
    """Settings assumed for a network whose weights are all there is.

    Args:
        unet: the arguments of :class:`LDMUNet` that the weights do tell.
    """
    for known in _KNOWN:
        if known.matches(unet):
            fields = vars(known.assumed) | {"reason": f"as {known.name}, recognised by its shapes"}
            return Assumed(**fields)
    heads, reason = _heads(unet)
    return Assumed(heads, image_size(unet), "linear", 1000, reason=reason)


def _heads(unet: dict[str, Any]) -> tuple[dict[str, int], str]:
    wanted = [_WIDTH_64, _FOUR] if unet["resblock_updown"] else [_FOUR]
    reason = "assumed, as most " + ("guided-diffusion" if unet["resblock_updown"] else "improved-diffusion")
    for heads in wanted:
        if all(width % next(iter(heads.values())) == 0 for width in attention_widths(unet)):
            return heads, f"{reason} networks"
    return {"num_heads": 1}, "assumed: the widths divide by nothing more usual"


def image_size(unet: dict[str, Any]) -> int:
    """Size by the number of resolutions, as the original scripts choose them: 4 for 64, ..., 7 for 512."""
    if tuple(unet["channel_mult"]) == (1, 2, 2, 2):
        return 32
    return int(2 ** (len(unet["channel_mult"]) + 2))

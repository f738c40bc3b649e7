"""Published latent diffusion networks, recognised by their shapes, for what weights do not tell.

Attention heads, image size, the schedule of files without buffers and the scale factor of text models are not
in the weights. A configuration always comes first; this table second; a rule, said aloud, last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bidm_cli.checkpoints.families.openai.infer import attention_widths


@dataclass(frozen=True)
class KnownNetwork:
    """Settings of a published network that its weights do not show.

    Attributes:
        heads: ``num_heads`` or ``num_head_channels``, as :class:`LDMUNet` takes them.
        image_size: of the latents. betas: start and end of LDM's "linear" schedule.
        scale_factor: where the file does not hold one.
        prediction: what the network predicts.
    """

    name: str
    model_channels: int
    channel_mult: tuple[float, ...]
    in_channels: int
    context_dim: int | None
    heads: dict[str, int]
    image_size: int
    betas: tuple[float, float] = (0.0015, 0.0195)
    scale_factor: float = 1.0
    prediction: Literal["epsilon", "v"] = "epsilon"

    def matches(self, unet: dict[str, Any]) -> bool:
        """True if ``unet``, arguments of :class:`LDMUNet`, are this network's."""
        return (
            self.model_channels == unet["model_channels"]
            and self.channel_mult == tuple(unet["channel_mult"])
            and self.in_channels == unet["in_channels"]
            and self.context_dim == unet.get("context_dim")
        )


_WIDTH_32 = {"num_head_channels": 32}
_WIDTH_64 = {"num_head_channels": 64}
_EIGHT = {"num_heads": 8}
_TEXT = (0.00085, 0.012)

KNOWN = (
    KnownNetwork("LSUN-Bedrooms, FFHQ or CelebA-HQ", 224, (1, 2, 3, 4), 3, None, _WIDTH_32, 64),
    KnownNetwork("LSUN-Churches", 192, (1, 2, 2, 4, 4), 4, None, _EIGHT, 32, (0.0015, 0.0155)),
    KnownNetwork("ImageNet f8", 256, (1, 2, 4), 4, 512, _WIDTH_32, 32),
    KnownNetwork("ImageNet (cin256-v2)", 192, (1, 2, 3, 5), 3, 512, {"num_heads": 1}, 64),
    KnownNetwork("text2img256", 192, (1, 2, 3, 5), 3, 640, _WIDTH_32, 64),
    KnownNetwork("inpainting", 256, (1, 2, 3, 4), 7, None, _EIGHT, 64, (0.0015, 0.0205)),
    KnownNetwork("super-resolution (bsr)", 160, (1, 2, 2, 4), 6, None, _WIDTH_32, 64, (0.0015, 0.0155)),
    KnownNetwork("semantic synthesis", 128, (1, 4, 8), 6, None, _EIGHT, 64, (0.0015, 0.0205)),
    KnownNetwork("txt2img-1p4B", 320, (1, 2, 4, 4), 4, 1280, _EIGHT, 32, _TEXT, 0.18215),
    KnownNetwork("Stable Diffusion 1", 320, (1, 2, 4, 4), 4, 768, _EIGHT, 64, _TEXT, 0.18215),
    KnownNetwork("Stable Diffusion 2", 320, (1, 2, 4, 4), 4, 1024, _WIDTH_64, 64, _TEXT, 0.18215),
    KnownNetwork("Stable Diffusion 1's inpainting", 320, (1, 2, 4, 4), 9, 768, _EIGHT, 64, _TEXT, 0.18215),
    KnownNetwork(
        "Stable Diffusion 2's inpainting", 320, (1, 2, 4, 4), 9, 1024, _WIDTH_64, 64, _TEXT, 0.18215
    ),
    KnownNetwork("Stable Diffusion 2's depth2img", 320, (1, 2, 4, 4), 5, 1024, _WIDTH_64, 64, _TEXT, 0.18215),
    KnownNetwork(
        "Stable Diffusion's x4 upscaler", 256, (1, 2, 2, 4), 7, 1024, _EIGHT, 128, (1e-4, 0.02), 0.08333, "v"
    ),
)


def known_network(unet: dict[str, Any]) -> KnownNetwork | None:
    """The published network with these arguments, if there is one."""
    return next((known for known in KNOWN if known.matches(unet)), None)


def assume_heads(unet: dict[str, Any], has_classes: bool) -> tuple[dict[str, int], str]:
    """(arguments, where they come from) for the attention heads of a network whose weights are all there is.

    Args:
        unet: the other arguments of :class:`LDMUNet`.
        has_classes: a class embedder comes with it.
    """
    known = known_network(unet)
    if known is not None:
        return known.heads, f"as in {known.name}, recognised by its shapes"
    if unet.get("use_spatial_transformer"):
        wanted = [{"num_heads": 1}] if has_classes else [_EIGHT, {"num_heads": 1}]
        reason = "assumed, as LDM's class-conditional models" if has_classes else "assumed, as text models"
    elif unet["use_scale_shift_norm"] and unet["resblock_updown"]:
        wanted, reason = [_EIGHT, _WIDTH_32], "assumed, as LSUN-Churches"
    else:
        wanted, reason = [_WIDTH_32, _EIGHT], "assumed, as most LDM networks"
    for heads in wanted:
        divisor = next(iter(heads.values()))
        if all(width % divisor == 0 for width in attention_widths(unet)):
            return heads, reason
    return {"num_heads": 1}, "assumed: the widths divide by nothing more usual"

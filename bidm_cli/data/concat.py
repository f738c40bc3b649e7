"""Conditioning channels joined to a network's input: low-resolution or masked images, segmentation maps.

Rules and sources, by kind:

* super-resolution: the small image in [-1, 1], as large as the latents (CompVis/latent-diffusion
  notebook_helpers.py, models/ldm/bsr_sr/config.yaml; Stability's upscaler adds noise to it,
  :mod:`bidm_cli.diffusion.augmentation`), or enlarged bilinearly to the network's size (guided-diffusion:
  guided_diffusion/unet.py, SuperResModel; scripts/super_res_sample.py).
* inpainting (LDM scripts/inpaint.py): the first stage's code of the image with a black hole, not scaled, then
  the mask in {-1, 1}.
* inpainting with text (Stability-AI/stablediffusion scripts/gradio/inpainting.py; LatentInpaintDiffusion in
  ldm/models/diffusion/ddpm.py): the mask in {0, 1}, then the scaled code of the image with a gray hole.
  Both bring masks to the latents' size by nearest neighbour; 0.5 white and more is to be filled in.
* depth (scripts/gradio/depth2img.py; LatentDepth2ImageDiffusion): a map of MiDaS's relative depths (large is
  near), bicubically brought to the latents' size, then each map stretched to [-1, 1].
* semantic synthesis (LDM ldm/modules/encoders/modules.py, SpatialRescaler): one-hot maps through the model's
  own rescaler.

Anything else, and ready-made channels, is an array [n, K, H, W].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bidm_cli.data.arrays import ARRAY_SUFFIXES, read_array
from bidm_cli.data.image_files import IMAGE_SUFFIXES
from bidm_cli.data.image_sets import fit, read_image, read_image_set, to_channels
from bidm_cli.diffusion.condition import shape_text
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build

Kind = Literal["image", "inpainting", "segmentation", "depth", "array"]

_NAMES = ("condition", "concat", "images", "arr_0")


def concat_kind(model: DiffusionModel) -> Kind:
    """Kind of the conditioning channels, by the model's own parts and the number of channels."""
    conditioner = model.architecture.get("conditioner") or {}
    if conditioner.get("kind") == "spatial_rescaler":
        return "segmentation"
    if model.first_stage is not None and model.concat_channels == model.sample_shape[0] + 1:
        return "inpainting"
    if model.is_latent and model.concat_channels == 1 and model.context_width is not None:
        return "depth"
    return "image" if model.concat_channels == 3 else "array"


def needs_encoder(model: DiffusionModel) -> bool:
    """True if conditioning channels are codes of images, or may be: those of a kind that is not known."""
    return model.concat_channels > 0 and concat_kind(model) in ("inpainting", "array")


@torch.no_grad()
def channels_from(
    model: DiffusionModel, source: str | Path | Tensor, mask: str | Path | Tensor | None, notes: list[str]
) -> Tensor:
    """Conditioning channels [n, K, H, W] from ``source``; how it was taken is added to ``notes``.

    Args:
        source: an image, a folder, zip or .npz of images, or an array: floats [n, K, H, W] or [K, H, W] are
            the channels themselves; segmentation maps are class numbers [n, h, w] or one-hot [n, K, h, w],
            depth maps of another size than the latents' floats [n, 1, h, w].
        mask: of inpainting: one image, or as many as there are images; white is to be filled in.

    Raises:
        BidmError: not what this model takes; the message says what is.
    """
    kind, channels = concat_kind(model), model.concat_channels
    if not channels:
        raise BidmError("this model takes no conditioning channels; leave out `condition`")
    if mask is not None and kind != "inpainting":
        raise BidmError("this model does not fill in images; leave out `mask`")
    array = _array(source)
    if array is not None and array.is_floating_point():
        ready = _stacked(array, 4)
        if ready.dim() == 4 and tuple(ready.shape[1:]) == (channels, *model.sample_shape[1:]):
            if mask is not None:
                raise BidmError("`condition` holds ready-made channels, mask included; leave out `mask`")
            notes.append(f"`condition`: {len(ready)} arrays of ready-made channels, {_per_image(model)}")
            return ready.float()
        if kind not in ("segmentation", "depth"):
            alternative = {"image": ", or images", "inpainting": ", or images with `mask`"}.get(kind, "")
            raise BidmError(
                f"`condition` is {shape_text(array.shape)}; this model takes channels "
                f"{shape_text(('n', channels, *model.sample_shape[1:]))}{alternative}"
            )
    if kind == "array":
        raise BidmError(
            f"what the {channels} conditioning channels of this model are is not known to bidm; give an "
            f"array {shape_text(('n', channels, *model.sample_shape[1:]))} of them (`condition`)"
        )
    if kind == "segmentation":
        made, what = _segmentation(model, source, array), "segmentation maps, rescaled by the model"
    elif kind == "depth":
        made, what = _depth(model, source, array), "depth maps, stretched to [-1, 1]"
    elif kind == "inpainting":
        made = _inpainting(model, _images(source, array, 3), mask)
        what = f"images with holes, made into {channels} channels"
    else:
        made = _low_resolution(model, _images(source, array, 3))
        what = f"low-resolution images, made into {channels} channels"
    notes.append(f"`condition`: {len(made)} {what}, {_per_image(model)}")
    return made


def image_shape(model: DiffusionModel) -> tuple[int, int, int]:
    """(channels, height, width) of the model's images.

    Raises:
        BidmError: it denoises latents, and its first stage is not at hand.
    """
    if model.is_latent and model.first_stage is None:
        raise BidmError(
            f"this model denoises latents of {model.sample_shape[0]} channels and has no first stage to make "
            "them of images; give one with `first_stage`, or an array of latents with `data`"
        )
    if model.first_stage is None:
        return model.sample_shape
    with torch.device("meta"):
        stage = build(model.architecture["first_stage"])
        decoded = stage.decode(torch.empty(1, *model.sample_shape))  # type: ignore[operator]
    return int(decoded.shape[1]), int(decoded.shape[2]), int(decoded.shape[3])


def _low_resolution(model: DiffusionModel, images: list[np.ndarray]) -> Tensor:
    height, width = model.sample_shape[1:]
    made = []
    for image in images:
        smaller = image.shape[0] <= height and image.shape[1] <= width
        if model.family == "openai" and smaller and image.shape[:2] != (height, width):
            pixels = _in_unit(image)[None]
            made.append(F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)[0])
        else:
            made.append(_in_unit(fit(image, height, width)))
    return torch.stack(made)


def _inpainting(model: DiffusionModel, images: list[np.ndarray], mask: str | Path | Tensor | None) -> Tensor:
    if mask is None:
        raise BidmError(
            "this model fills in images: give `mask` as well, white where to fill in; or ready-made channels "
            f"{shape_text(('n', model.concat_channels, *model.sample_shape[1:]))} as an array"
        )
    masks = _images(mask, _array(mask), 1)
    if len(masks) not in (1, len(images)):
        raise BidmError(f"`mask` holds {len(masks)} images, `condition` {len(images)}; give as many, or one")
    _, height, width = image_shape(model)
    with_text = model.context_width is not None
    made = []
    for i, image in enumerate(images):
        pixels = _in_unit(fit(image, height, width))
        hole = (_in_unit(fit(masks[i % len(masks)], height, width)) >= 0).float()
        # Zeroing the hole of an image in [0, 1] makes it -1; Stable Diffusion zeroes it in [-1, 1].
        filled = torch.zeros_like(pixels) if with_text else -torch.ones_like(pixels)
        masked = torch.where(hole.bool(), filled, pixels)[None].to(model.device)
        code = model.encode(masked) if with_text else model.first_stage.encode(masked)  # type: ignore
        small = F.interpolate(hole[None].to(model.device), size=code.shape[-2:])
        parts = [small, code] if with_text else [code, small * 2 - 1]
        made.append(torch.cat(parts, dim=1)[0].cpu())
    return torch.stack(made)


def _depth(model: DiffusionModel, source: str | Path | Tensor, array: Tensor | None) -> Tensor:
    if array is None or array.dtype == torch.uint8:
        maps = [torch.from_numpy(image[:, :, 0].astype(np.float32)) for image in _images(source, array, 1)]
    else:
        floats = _stacked(array, 4).float()
        if floats.dim() != 4 or floats.shape[1] != 1 or not bool(torch.isfinite(floats).all()):
            raise BidmError(f"`condition` is {shape_text(array.shape)}; depth maps are floats [n, 1, h, w]")
        maps = list(floats[:, 0])
    made = []
    for depth in maps:
        small = F.interpolate(depth[None, None], model.sample_shape[1:], mode="bicubic", align_corners=False)
        span = small.max() - small.min()
        if not span > 0:
            raise BidmError("`condition` holds a depth map of one depth everywhere, which says nothing")
        made.append(2 * (small[0] - small.min()) / span - 1)
    return torch.stack(made)


def _segmentation(model: DiffusionModel, source: str | Path | Tensor, array: Tensor | None) -> Tensor:
    rescaler, arguments = model.conditioner, model.architecture["conditioner"]["args"]
    assert rescaler is not None
    classes = int(arguments["in_channels"])
    factor = round(float(arguments["multiplier"]) ** -int(arguments["n_stages"]))
    size = tuple(side * factor for side in model.sample_shape[1:])
    made = []
    for item in _maps(source, array):
        one_hot = item if item.dim() == 3 else _one_hot(item, classes)
        if tuple(one_hot.shape) != (classes, *size):
            raise BidmError(
                f"`condition` is {shape_text(item.shape)} an image; this model takes segmentation maps "
                f"{shape_text(size)} of class numbers (gray images will do), or one-hot "
                f"{shape_text((classes, *size))}"
            )
        made.append(rescaler(one_hot.float()[None].to(model.device)).cpu())
    return torch.cat(made)


def _maps(source: str | Path | Tensor, array: Tensor | None) -> Iterator[Tensor]:
    """Maps of class numbers [h, w], or one-hot ones [classes, h, w]."""
    if array is None:
        for image in _images(source, None, None):
            if image.shape[2] != 1:
                raise BidmError(
                    "`condition`: segmentation maps are gray images whose pixels are class numbers"
                )
            yield torch.from_numpy(image[:, :, 0].astype(np.int64))
    else:
        yield from _stacked(array, 4 if array.is_floating_point() else 3)


def _one_hot(numbers: Tensor, classes: int) -> Tensor:
    if numbers.dim() != 2 or not numbers.numel():
        raise BidmError(
            f"`condition`: a segmentation map of the shape {shape_text(numbers.shape)}; it is [h, w]"
        )
    lowest, highest = int(numbers.min()), int(numbers.max())
    if lowest < 0 or highest >= classes:
        raise BidmError(
            f"`condition` holds classes {lowest} to {highest}; the model knows 0 to {classes - 1}"
        )
    return F.one_hot(numbers.long(), classes).permute(2, 0, 1)


def _array(source: str | Path | Tensor) -> Tensor | None:
    """Content of an array file or a tensor; None for images."""
    if isinstance(source, Tensor):
        return source.detach().cpu()
    path = Path(source)
    if path.suffix.lower() not in ARRAY_SUFFIXES or not path.is_file():
        return None
    return read_array(path, "`condition`", _NAMES)


def _images(source: str | Path | Tensor, array: Tensor | None, channels: int | None) -> list[np.ndarray]:
    """uint8 images [H, W, channels] from files, or from an array of them [n, H, W(, C)]."""
    if array is not None:
        if array.dtype != torch.uint8:
            raise BidmError("images in an array are uint8 [n, H, W, 3] (`condition`) or [n, H, W] (`mask`)")
        images = [_pixels(image) for image in _stacked(array, 3 if channels == 1 else 4)]
    else:
        assert not isinstance(source, Tensor)
        path = Path(source)
        single = path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
        images = [read_image(path)] if single else list(read_image_set(path))
    return images if channels is None else [to_channels(image, channels) for image in images]


def _stacked(array: Tensor, dimensions: int) -> Tensor:
    """A single item, which lacks the first of the dimensions, as a batch of one."""
    return array[None] if array.dim() == dimensions - 1 else array


def _pixels(image: Tensor) -> np.ndarray:
    pixels = image.numpy()
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise BidmError(f"an image of the shape {shape_text(pixels.shape)}; images are [H, W] or [H, W, 3]")
    return pixels


def _in_unit(image: np.ndarray) -> Tensor:
    """uint8 [H, W, C] to [C, H, W] in [-1, 1]."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1


def _per_image(model: DiffusionModel) -> str:
    return f"{shape_text((model.concat_channels, *model.sample_shape[1:]))} each"

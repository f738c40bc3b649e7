"""Packed diffusers model as the ``unet`` of a diffusers pipeline.

    unet = bidm_cli.load_packed("model.bidm").as_diffusers()
    pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler(...))
    images = pipeline(num_inference_steps=50).images

diffusers itself is not needed here: pipelines call a network, and read its configuration.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bidm_cli.diffusion.model import CarriedFeatures, DiffusionModel
from bidm_cli.errors import BidmError

CONNECTIONS = ("carried", "off")


class UNetOutput(NamedTuple):
    """Output of the network, under diffusers' name."""

    sample: Tensor


class UNetConfig(dict[str, Any]):
    """Configuration whose entries are attributes, too; names that diffusers may ask for are None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)


class DiffusersUNetAdapter(nn.Module):
    """``UNet2DModel`` or ``UNet2DConditionModel`` to diffusers, a packed model inside.

    Timesteps are the pipeline's; a connection carries features from one call to the next, and a call with a
    larger timestep or another batch than the last one begins a new sampling.

    Args:
        connections: "carried", as bidm samples, or "off": each step as if it were the first.

    Raises:
        BidmError: the model is not of the diffusers family, or ``connections`` is neither.
    """

    def __init__(self, model: DiffusionModel, connections: Literal["carried", "off"] = "carried") -> None:
        super().__init__()
        if model.family != "diffusers":
            raise BidmError(f"a diffusers pipeline takes diffusers networks; this model is {model.family}")
        if connections not in CONNECTIONS:
            raise BidmError(f"`connections` is {connections!r}; use {' or '.join(CONNECTIONS)}")
        self.model = model
        self.unet = model.unet
        self.connections = connections
        self.config = _config(model)
        self._carried: CarriedFeatures = {}
        self._last: tuple[float, torch.Size] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """float32: the type of inputs and outputs."""
        return torch.float32

    def to(self, *arguments: Any, **named: Any) -> DiffusersUNetAdapter:
        """Move the network to another device; a type other than float32 is refused.

        Raises:
            BidmError: half precision, or a backend that cannot run there.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*arguments, **named)
        if dtype not in (None, torch.float32):
            raise BidmError(f"a packed network takes float32 here, not {dtype}")
        if device is not None and device != self.device:
            self.model.to(device)
            self.reset()
        return self

    def reset(self) -> None:
        """Begin a new sampling: forget the features carried from the last call."""
        self._carried, self._last = {}, None

    @torch.no_grad()
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> UNetOutput | tuple[Tensor]:
        """Raw output for ``sample`` [N, C, H, W], in a record or a tuple, as diffusers' networks give it.

        UNet2DModel takes ``class_labels`` third, UNet2DConditionModel ``encoder_hidden_states``; pipelines
        name them.

        Raises:
            BidmError: an input that this network does not have (a ControlNet's residuals, say).
        """
        unknown = [name for name, value in others.items() if value is not None and value != {}]
        if unknown:
            raise BidmError(f"a packed network takes no {', '.join(unknown)}")
        if self.model.context_width is None and class_labels is None:
            encoder_hidden_states, class_labels = None, encoder_hidden_states
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        carried = self._carried_for(float(times.max()), sample.shape)
        output = self.model.denoise(
            sample.float(), times.expand(len(sample)), encoder_hidden_states, class_labels, carried=carried
        ).to(sample.dtype)
        return UNetOutput(output) if return_dict else (output,)

    def _carried_for(self, time: float, shape: torch.Size) -> CarriedFeatures | None:
        """Features of the call before, if this one continues its sampling; None without connections."""
        if self.connections == "off":
            return None
        if self._last is None or time >= self._last[0] or shape != self._last[1]:
            self._carried = {}
        self._last = time, shape
        return self._carried


def _config(model: DiffusionModel) -> UNetConfig:
    channels, height, width = model.sample_shape
    return UNetConfig(
        _class_name="UNet2DModel" if model.context_width is None else "UNet2DConditionModel",
        sample_size=height if height == width else (height, width),
        in_channels=channels + model.concat_channels,
        out_channels=channels,
        cross_attention_dim=model.context_width,
        num_class_embeds=model.num_classes,
        addition_embed_type=None,
        time_cond_proj_dim=None,
    )

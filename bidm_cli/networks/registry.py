"""Networks by name, so that an architecture is plain JSON: ``{"kind": "ddpm_unet", "args": {...}}``."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bidm_cli.errors import BidmError

_KINDS: dict[str, str | type[nn.Module]] = {
    "ddpm_unet": "bidm_cli.networks.ddpm_unet:DDPMUNet",
    "ldm_unet": "bidm_cli.networks.ldm_unet:LDMUNet",
    "lucidrains_unet": "bidm_cli.networks.lucidrains_unet:LucidrainsUNet",
    "dit": "bidm_cli.networks.dit:DiT",
    "uvit": "bidm_cli.networks.uvit:UViT",
    "w86_unet": "bidm_cli.networks.w86_unet:W86UNet",
    "score_unet": "bidm_cli.networks.score_unet:ScoreUNet",
    "diffusers_unet": "bidm_cli.networks.diffusers.unet:DiffusersUNet",
    "diffusers_condition_unet": "bidm_cli.networks.diffusers.condition_unet:DiffusersConditionUNet",
    "diffusers_vq": "bidm_cli.networks.diffusers.autoencoder:DiffusersVQ",
    "diffusers_kl": "bidm_cli.networks.diffusers.autoencoder:DiffusersKL",
    "vq_first_stage": "bidm_cli.networks.autoencoder:VQFirstStage",
    "kl_first_stage": "bidm_cli.networks.autoencoder:KLFirstStage",
    "value_range": "bidm_cli.networks.value_range:ValueRange",
    "class_embedder": "bidm_cli.networks.conditioners:ClassEmbedder",
    "clip_text": "bidm_cli.networks.text.clip:CLIPTextEncoder",
    "open_clip_text": "bidm_cli.networks.text.open_clip:OpenCLIPTextEncoder",
    "ldm_text": "bidm_cli.networks.text.bert:LDMTextEncoder",
    "spatial_rescaler": "bidm_cli.networks.conditioners:SpatialRescaler",
}

# Architectures come out of files that nobody vouches for; a number of blocks in the millions would keep the
# machine busy until it dies.
_LARGEST = 1 << 20
_LARGEST_OF = {"num_res_blocks": 64, "transformer_depth": 64, "layers_per_block": 64}
_LARGEST_OF |= {"depth": 256, "half_depth": 128, "n_stages": 16}
_LONGEST = 64
_MAY_NOT_BE_EMPTY = {"ch_mult", "channel_mult", "dim_mults", "block_out_channels"}
_MAY_BE_ZERO = {
    "dropout", "attention_levels", "mem_kv", "up_attention_levels", "resnet_down_levels", "resnet_up_levels",
    "encoder_attention_levels", "decoder_attention_levels", "freq_shift", "downsample_padding",
    "n_stages", "num_attention_blocks", "skip",
}  # fmt: skip
_MAY_BE_NEGATIVE = {"latents_mean"}
_MAY_BE_UNSET = {"num_heads", "num_head_channels", "num_heads_upsample"}


def register_network(kind: str, network: type[nn.Module]) -> None:
    """Add a network class under a name that architectures can say.

    A package that names ``kind`` as an entry point of the group ``bidm.networks`` need not call this.

    Raises:
        ValueError: another class has the name.
    """
    if _KINDS.setdefault(kind, network) is not network:
        raise ValueError(f"the network kind {kind!r} is registered already")


class _Uninitialised(TorchFunctionMode):
    """While open, torch's initializers leave their tensor as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Make tensors on the meta device; an embedding's values would make torch import its compiler."""
    with torch.device("meta"), _Uninitialised():
        yield


def build(architecture: dict[str, Any]) -> nn.Module:
    """A freshly initialised network, in eval mode, from ``{"kind": ..., "args": {...}}``.

    Use inside :func:`without_memory` to get the shapes alone.

    Raises:
        BidmError: unknown kind, or arguments that the network does not take.
    """
    kind = architecture.get("kind")
    made = network_class(kind)
    try:
        for argument, value in architecture["args"].items():
            _check_size(argument, value)
        network = made(**architecture["args"])
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise BidmError(f"cannot build network {kind!r} from its arguments: {error}") from error
    return network.eval()


def network_class(kind: Any) -> type[nn.Module]:
    """The class of a kind of network.

    Raises:
        BidmError: unknown kind.
    """
    if kind not in _KINDS:
        for point in entry_points(group="bidm.networks", name=str(kind)):
            register_network(point.name, point.load())
    if kind not in _KINDS:
        raise BidmError(f"unknown network kind {kind!r}; this version of bidm knows {', '.join(_KINDS)}")
    home = _KINDS[kind]
    if isinstance(home, str):
        module, _, name = home.partition(":")
        home = getattr(importlib.import_module(module), name)
    return home


def _check_size(argument: str, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        if not value and argument in _MAY_NOT_BE_EMPTY:
            raise ValueError(f"{argument} is empty")
        if len(value) > _LONGEST:
            raise ValueError(f"{argument} has {len(value)} entries; at most {_LONGEST} make sense")
        for item in value:
            _check_size(argument, item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        largest = _LARGEST_OF.get(argument, _LARGEST)
        value = abs(value) or 1 if argument in _MAY_BE_NEGATIVE else value
        unset = value == -1 and argument in _MAY_BE_UNSET
        zero = value == 0 and argument in _MAY_BE_ZERO
        if not (0 < value <= largest or unset or zero):
            raise ValueError(f"{argument} is {value}; it has to be above 0 and at most {largest}")

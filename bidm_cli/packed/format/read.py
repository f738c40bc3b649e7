"""Packed models from packed files: networks built from their description, with layers that run on bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bidm_cli.binary.refinement import Refinement
from bidm_cli.errors import BidmError
from bidm_cli.networks.autoencoder import FirstStage
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.layers import AttentionProduct
from bidm_cli.networks.registry import build, without_memory
from bidm_cli.packed.choose import choose_backend
from bidm_cli.packed.format.container import NULL_CONTEXT, read_packed
from bidm_cli.packed.format.first_stage import stored_form, stored_weights
from bidm_cli.packed.format.layer_table import (
    LayerRecord,
    read_attention,
    read_stage_table,
    read_table,
)
from bidm_cli.packed.layers import (
    PackedAttention,
    PackedBinaryAttention,
    PackedConnections,
    PackedLayer,
    packed_decoder_module,
    packed_module,
)
from bidm_cli.packed.model import PackedModel, bind_modules, has_packed_layers
from bidm_cli.packed.uses import Products


def load_packed(path: str | Path, device: str | torch.device = "cpu", backend: str = "auto") -> PackedModel:
    """Open a packed file.

    Raises:
        BidmError: as :func:`bidm_cli.packed.format.container.read_packed`; an architecture that this version
            does not know, tensors that do not fit it, or a backend that cannot run.
    """
    path = Path(path)
    choose_backend(backend, torch.device(device).type)
    metadata, tensors = read_packed(path)
    records = read_table(metadata)
    try:
        parts = {
            part: _build_part(part, tensors, metadata) for part in ("unet", "first_stage", "conditioner")
        }
        unet = parts.pop("unet")
        if unet is None:
            raise BidmError("the file describes no denoising network")
        about = {key: metadata[key] for key in ("recipe", "provenance", "training", "connections")}
        model = PackedModel.from_metadata(
            metadata,
            unet,
            path=path,
            layers=records,
            requested_backend=backend,
            caveats=_caveats(metadata),
            stage_form=stored_form(metadata),
            **parts,
            **about,
        )
        if NULL_CONTEXT in tensors:
            model.null_context = model.with_null_context(_loaded(tensors[NULL_CONTEXT])).null_context
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BidmError(
            f"{path}: its description does not make sense ({error!r}); write it anew with bidm compress"
        ) from error
    except BidmError as error:
        raise BidmError(f"{path}: {error}") from error
    model.to(device)
    return model


def read_first_stage(
    metadata: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> nn.Module | None:
    """First stage of a file's contents, as :func:`load_packed` opens it; None without one."""
    stage = _build_part("first_stage", tensors, metadata)
    if stage is not None:
        stage.to(device)
        if has_packed_layers(stage):
            bind_modules(stage, choose_backend("auto", device.type))
    return stage


def _caveats(metadata: dict[str, Any]) -> list[dict[str, str]]:
    """Records "kind" and "text" in characters that print; files without caveats lack the key."""
    records = metadata.get("caveats", [])
    if not isinstance(records, list):
        raise ValueError("caveats is no list")
    return [
        {key: "".join(filter(str.isprintable, str(record[key]))) for key in ("kind", "text")}
        for record in records
    ]


def _build_part(part: str, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> nn.Module | None:
    """One network of the file with its weights, in eval mode; None if the file has none."""
    architecture = metadata["architecture"].get(part)
    prefix = f"{part}."
    values = {name[len(prefix) :]: _loaded(t) for name, t in tensors.items() if name.startswith(prefix)}
    if architecture is None:
        if values:
            raise BidmError(f"it holds tensors of a {part} that it does not describe")
        return None
    with without_memory():
        network = build(architecture)
        if part == "unet":
            _install(network, metadata)
        if part == "first_stage":
            network = _as_stored(network, metadata)
    if part == "first_stage":
        values = stored_weights(network, values)
    _check_state(network, values, part)
    # assign: the network was built without memory, and now holds the file's tensors.
    network.load_state_dict(values, strict=True, assign=True)
    _fill_constants(network, architecture)
    return network.eval().requires_grad_(False)


def _as_stored(stage: nn.Module, metadata: dict[str, Any]) -> nn.Module:
    """A first stage with the parts that the file keeps, and packed layers in its decoder."""
    about, records = stored_form(metadata), read_stage_table(metadata)
    if not isinstance(stage, FirstStage):
        return stage
    # The encoder is no part of it: packed norms round otherwise, and latents would change.
    decoder = stage.without_encoder()
    _install_layers(decoder, records)
    _install_attention(decoder, {})
    _install_others(decoder.decoder, packed_decoder_module)
    if about is None or about["keep"] == "both":
        decoder.take_encoder(stage)
    return decoder


def _install(network: nn.Module, metadata: dict[str, Any]) -> None:
    if metadata.get("refinement") is not None:
        Refinement(**metadata["refinement"]).attach(network)
    _install_layers(network, read_table(metadata))
    _install_attention(network, metadata)
    _install_others(network)
    connections = metadata["connections"]
    if connections is not None:
        blended = PackedConnections(connections["blocks"], connections["timesteps"], connections["buckets"])
        blended.attach(network)


def _install_layers(network: nn.Module, records: list[LayerRecord]) -> None:
    layers = {name: module for name, module in network.named_modules() if name}
    for record in records:
        if record.name not in layers:
            raise BidmError(f"the network has no layer {record.name!r} of the layer table")
        if record.spec is None:
            continue
        if LayerGeometry.of(layers[record.name], record.name) != record.geometry:
            raise BidmError(
                f"the layer {record.name} has another shape in the network than in the layer table"
            )
        network.set_submodule(record.name, PackedLayer(record))


def _install_others(
    network: nn.Module, counterpart: Callable[[nn.Module], nn.Module | None] = packed_module
) -> None:
    """Packed counterparts of modules without bits."""
    for name, module in list(network.named_modules()):
        packed = counterpart(module)
        if packed is not None:
            network.set_submodule(name, packed)


def _install_attention(network: nn.Module, metadata: dict[str, Any]) -> None:
    binary = {record.name: record.heads for record in read_attention(metadata)}
    products = metadata.get("recipe", {}).get("attention", {}).get("products", "float32")
    if products not in get_args(Products):
        raise ValueError(f"attention products {products}")
    for name, module in list(network.named_modules()):
        if isinstance(module, AttentionProduct):
            parent, heads = network.get_submodule(name.rpartition(".")[0]), binary.pop(name, None)
            if heads not in (None, 1, getattr(parent, "heads", 1)):
                raise BidmError(f"the attention {name} has not the {heads} heads of its table")
            packed = PackedAttention() if heads is None else PackedBinaryAttention(heads)
            packed.products = products
            network.set_submodule(name, packed)
    if binary:
        raise BidmError(f"the network has no attention {min(binary)!r} of the table of attentions")


def _loaded(tensor: Tensor) -> Tensor:
    """Floats as float32; bits copied out of the mapped file, which may change or go away."""
    return tensor.float() if tensor.is_floating_point() else tensor.clone()


def _check_state(network: nn.Module, values: dict[str, Tensor], part: str) -> None:
    wanted = network.state_dict()
    missing, surplus = sorted(wanted.keys() - values.keys()), sorted(values.keys() - wanted.keys())
    if missing or surplus:
        raise BidmError(
            f"the {part}'s tensors do not fit its description: missing {missing[:3] or 'none'}, "
            f"not expected {surplus[:3] or 'none'}"
        )
    for name, tensor in wanted.items():
        if values[name].shape != tensor.shape:
            stored, needed = list(values[name].shape), list(tensor.shape)
            raise BidmError(f"the tensor {part}.{name} is {stored}, the network needs {needed}")


def _fill_constants(network: nn.Module, architecture: dict[str, Any]) -> None:
    """Take buffers that are computed rather than stored from a second build with real memory."""
    empty = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    real = dict(build(architecture).named_buffers()) if empty else {}
    for name in empty:
        parent_name, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent_name), child, real[name])

"""Open a packed file: the network is built from its description and runs on bits.

packed = load_packed("model.bidm", device="cpu", backend="auto")
eps = packed.denoise(x, t)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidm_cli.diffusion.augmentation import NoiseAugmentation
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.networks.geometry import LayerGeometry
from bidm_cli.networks.layers import AttentionProduct
from bidm_cli.networks.registry import build
from bidm_cli.packed.attention import PackedAttention, PackedBinaryAttention
from bidm_cli.packed.format.container import NULL_CONTEXT, network_bytes, read_packed
from bidm_cli.packed.format.layer_table import LayerRecord, read_attention, read_table
from bidm_cli.packed.fused_blocks import PackedConnections, PackedGroupNorm, fuse_blocks
from bidm_cli.packed.fused_upsampling import PackedJoin, PackedNearest
from bidm_cli.packed.layers import PackedLayer, packed_layer
from bidm_cli.packed.select import backend_for, resolve

_BACKED = (PackedLayer, PackedAttention, PackedGroupNorm, PackedConnections, PackedJoin, PackedNearest)
"""Modules that ask a backend."""


@dataclass
class PackedModel(DiffusionModel):
    """A packed file, with the surface of a checkpoint.

    Attributes:
        recipe: the resolved recipe. layers: the layer table.
        provenance: source file, its SHA-256, steps, seed, versions. training: losses and errors.
        connections: where cross-timestep connections are, or None.
        network_bytes: size of the denoising network in the file.
        requested_backend: as given; ``backend`` is what it means on the model's device.
        recorded: recorded steps (:func:`bidm_cli.packed.recording.denoiser.denoisers_of`); they hold addresses of
            this model's tensors.
    """

    path: Path = Path()
    recipe: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    connections: dict[str, Any] | None = None
    network_bytes: int = 0
    requested_backend: str = "auto"
    recorded: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Copies record anew."""
        return {**self.__dict__, "recorded": []}

    @property
    def backend(self) -> str:
        """The backend in use: "torch", "numba" or "cupy"."""
        return resolve(self.requested_backend, self.device.type)

    def use_backend(self, backend: str) -> PackedModel:
        """Run on another backend from now on; returns self.

        Raises:
            BidmError: a backend that cannot run on the model's device.
        """
        resolve(backend, self.device.type)
        self.requested_backend = backend
        for module in self.unet.modules():
            if isinstance(module, _BACKED):
                module.backend = backend
        self.recorded.clear()
        self._lay_out()
        return self

    def to(self, device: str | torch.device) -> PackedModel:
        """Move network, first stage and conditioner; returns self.

        Raises:
            BidmError: the backend asked for cannot run there.
        """
        resolve(self.requested_backend, torch.device(device).type)
        super().to(device)
        self.recorded.clear()
        self._lay_out()
        return self

    def denoise(self, *arguments: Any, **named: Any) -> Tensor:
        """See :meth:`DiffusionModel.denoise`."""
        with _without_tf32(self.device):
            return super().denoise(*arguments, **named)

    def warm_up(self, say: Callable[[str], None] = lambda text: None) -> None:
        """Compile the backend's kernels now rather than in the first step: some seconds, once a machine.

        ``say`` gets the pieces of a line about it, and nothing where nothing has to be compiled.
        """
        warm_up = getattr(backend_for(self.requested_backend, self.device.type), "warm_up", None)
        if warm_up is not None:
            warm_up(say)

    def _lay_out(self) -> None:
        """Give float convolutions the memory format that the backend's layers take and give."""
        last = self.backend in ("numba", "cupy")
        for module in self.unet.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last if last else torch.contiguous_format)


def load_packed(path: str | Path, device: str | torch.device = "cpu", backend: str = "auto") -> PackedModel:
    """Open a packed file.

    Raises:
        BidmError: anything wrong with the file (see :func:`bidm_cli.packed.format.container.read_packed`), an
            architecture this version does not know, tensors that do not fit it, or a backend that cannot run.
    """
    path = Path(path)
    resolve(backend, torch.device(device).type)
    metadata, tensors = read_packed(path)
    records = read_table(metadata)
    try:
        architecture = metadata["architecture"]
        parts = {
            part: _build_part(architecture.get(part), tensors, part, records, metadata, backend)
            for part in ("unet", "first_stage", "conditioner")
        }
        model = PackedModel(
            path=path,
            layers=records,
            unet=_required(parts["unet"]),
            first_stage=parts["first_stage"],
            conditioner=parts["conditioner"],
            network_bytes=network_bytes(tensors),
            requested_backend=backend,
            **_described(metadata),
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


@contextlib.contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """Keep all bits of float32 in a GPU's float convolutions: torch lets cuDNN drop 13, and signs flip."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _described(metadata: dict[str, Any]) -> dict[str, Any]:
    """The reverse of :meth:`DiffusionModel.metadata`, and what a packed file adds."""
    channels, height, width = (int(n) for n in metadata["sample_shape"])
    return {
        "family": str(metadata["family"]),
        "sample_shape": (channels, height, width),
        "schedule": NoiseSchedule.from_description(metadata["schedule"]),
        "convention": SamplingConvention.from_json(metadata["convention"], str(metadata["family"])),
        "scale_factor": float(metadata["scale_factor"]),
        "time_scale": float(metadata.get("time_scale", 1.0)),
        "augmentation": NoiseAugmentation.from_json(metadata.get("augmentation")),
        **{key: metadata[key] for key in ("architecture", "prediction", "null_label", "num_classes")},
        **{key: metadata[key] for key in ("recipe", "provenance", "training", "connections")},
    }


def _required(unet: nn.Module | None) -> nn.Module:
    if unet is None:
        raise BidmError("the file describes no denoising network")
    return unet


def _build_part(
    architecture: dict[str, Any] | None,
    tensors: dict[str, Tensor],
    part: str,
    records: list[LayerRecord],
    metadata: dict[str, Any],
    backend: str,
) -> nn.Module | None:
    """One network of the file with its weights, in eval mode; None if the file has none."""
    prefix = f"{part}."
    values = {name[len(prefix) :]: _loaded(t) for name, t in tensors.items() if name.startswith(prefix)}
    if architecture is None:
        if values:
            raise BidmError(f"it holds tensors of a {part} that it does not describe")
        return None
    with torch.device("meta"):
        network = build(architecture)
        if part == "unet":
            _install(network, records, metadata, backend)
    _check_state(network, values, part)
    # assign: the network is built without memory and takes over the file's tensors.
    network.load_state_dict(values, strict=True, assign=True)
    _fill_constants(network, architecture)
    return network.eval().requires_grad_(False)


def _install(network: nn.Module, records: list[LayerRecord], metadata: dict[str, Any], backend: str) -> None:
    for record in records:
        parent_name, _, child = record.name.rpartition(".")
        try:
            parent = network.get_submodule(parent_name)
            original = getattr(parent, child)
        except AttributeError as error:
            raise BidmError(f"the network has no layer {record.name!r} of the layer table") from error
        if record.spec is None:
            continue
        if LayerGeometry.of(original, record.name) != record.geometry:
            raise BidmError(
                f"the layer {record.name} has another shape in the network than in the layer table"
            )
        setattr(parent, child, packed_layer(record, backend))
    _install_attention(network, metadata, backend)
    fuse_blocks(network, backend)
    connections = metadata["connections"]
    if connections is not None:
        blended = PackedConnections(connections["blocks"], connections["timesteps"], connections["buckets"])
        blended.backend = backend
        blended.attach(network)


def _install_attention(network: nn.Module, metadata: dict[str, Any], backend: str) -> None:
    binary = {record.name: record.heads for record in read_attention(metadata)}
    for name, module in list(network.named_modules()):
        if isinstance(module, AttentionProduct):
            parent_name, _, child = name.rpartition(".")
            parent, heads = network.get_submodule(parent_name), binary.pop(name, None)
            if heads not in (None, 1, getattr(parent, "heads", 1)):
                raise BidmError(f"the attention {name} has not the {heads} heads of its table")
            packed = PackedAttention(backend) if heads is None else PackedBinaryAttention(heads, backend)
            setattr(parent, child, packed)
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
            found, needed = list(values[name].shape), list(tensor.shape)
            raise BidmError(f"the tensor {part}.{name} is {found}, the network needs {needed}")


def _fill_constants(network: nn.Module, architecture: dict[str, Any]) -> None:
    """Buffers that are computed rather than stored come from a second build with real memory."""
    empty = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if not empty:
        return
    real = dict(build(architecture).named_buffers())
    for name in empty:
        parent_name, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent_name), child, real[name])

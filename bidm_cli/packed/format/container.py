"""The ``.bidm`` file: one safetensors file with everything that sampling needs.

Its only metadata key, ``bidm``, holds canonical JSON (sorted keys, no spaces): the format version, what
:meth:`bidm_cli.diffusion.model.DiffusionModel.metadata` says, recipe, layer table, connections, provenance,
training results, and ``digest``, a SHA-256 over that JSON and all tensors. The same input gives the same
bytes. Tensors: ``unet.*`` (packed layers as :mod:`bidm_cli.packed.format.layer_table` lists them),
``first_stage.*``, ``conditioner.*``, and ``condition.null_context`` [1, L, D] if there is one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bidm_cli.diffusion.convention import LATER
from bidm_cli.errors import BidmError
from bidm_cli.files import write_atomically
from bidm_cli.packed.format.layer_table import STAGE, UNET, check_tensors
from bidm_cli.packed.format.requires import check_requires

FORMAT_VERSIONS = (1, 2, 3, 4)
"""Versions that can be read. Version 2 adds binary attention, version 3 sampling that clips otherwise than to
[-1, 1] or has a learned variance. Version 4 has the key ``requires``, a list of what a reader must know
(:mod:`bidm_cli.packed.format.requires`). A file is written as the lowest version that has what it needs."""

KEY = "bidm"
NULL_CONTEXT = "condition.null_context"
_PREFIXES = (UNET, STAGE, "conditioner.", NULL_CONTEXT)
_TYPES = (torch.uint8, torch.float16, torch.float32)


def write_packed(path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a packed file atomically.

    ``metadata`` is that of :func:`bidm_cli.packed.format.write.pack_model`; ``format_version``,
    ``network_bytes`` and ``digest`` are filled in here. Numbers that are not finite become null.

    Raises:
        BidmError: the folder cannot be written to, or table and tensors do not fit each other.
    """
    stored = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    check_tensors(metadata, stored)
    computed = {"format_version": format_version(metadata), "network_bytes": network_bytes(stored)}
    record = {**metadata, **computed}
    record["digest"] = digest(record, stored)
    # Bytes first, then an ordinary write: safetensors' own writer reports a full disk in its own type.
    content = safetensors.torch.save(stored, metadata={KEY: canonical_json(record)})
    with write_atomically(Path(path)) as temporary:
        temporary.write_bytes(content)


def read_packed(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and CPU tensors of a packed file, checked.

    Raises:
        BidmError: no such file, not a packed file, another format version, cut off or changed in any byte,
            or tensors that do not fit the layer table.
    """
    path = Path(path)
    if not path.is_file():
        raise BidmError(f"{path}: no such file; give a .bidm file written by bidm compress")
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise BidmError(
            f"{path} is not a packed file, or it is cut off or damaged ({reason}); copy it again or "
            "write it anew with bidm compress"
        ) from error
    metadata = _parse(path, header)
    try:
        check_tensors(metadata, tensors)
        _check_names(tensors)
        if metadata.get("digest") != digest(metadata, tensors):
            raise BidmError("its contents do not match its checksum")
    except BidmError as error:
        raise BidmError(
            f"{path} is damaged: {error}; copy it again or write it anew with bidm compress"
        ) from error
    return metadata, tensors


def format_version(metadata: Mapping[str, Any]) -> int:
    """The lowest version of the format that has everything in ``metadata``."""
    if metadata.get("requires"):
        return 4
    convention = metadata.get("convention")
    if isinstance(convention, Mapping) and (
        any(name in convention for name in LATER) or convention.get("variance") == "learned"
    ):
        return 3
    return 2 if metadata.get("attention") else 1


def is_packed(path: str | Path) -> bool:
    """True if a file is a safetensors file with bidm's metadata key, of any version and even if damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as handle:
            return KEY in (handle.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError):
        return str(path).endswith(".bidm")


def network_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the denoising network's tensors in the file."""
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if name.startswith(UNET))


def canonical_json(values: Any) -> str:
    """JSON with sorted keys and no spaces; infinities and NaN become null."""
    return json.dumps(finite(values), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata without ``digest`` and every tensor's name, type, shape and bytes."""
    values = {key: value for key, value in metadata.items() if key != "digest"}
    total = hashlib.sha256(canonical_json(values).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _parse(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    if KEY not in header:
        raise BidmError(
            f"{path} is a safetensors file but not a packed bidm file; give one written by bidm compress"
        )
    try:
        metadata = json.loads(header[KEY])
    except (ValueError, RecursionError) as error:
        raise BidmError(f"{path} is damaged: its metadata is not JSON; copy it again") from error
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if version not in FORMAT_VERSIONS or isinstance(version, bool):
        known = " and ".join(str(n) for n in FORMAT_VERSIONS)
        raise BidmError(
            f"{path} has format version {version!r}, this bidm reads {known}; "
            "use the version of bidm that wrote it, or upgrade with pip install -U bidm"
        )
    try:
        check_requires(metadata)
    except BidmError as error:
        raise BidmError(f"{path}: {error}") from error
    return metadata


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not name.startswith(_PREFIXES):
            raise BidmError(f"the tensor {name!r} does not belong in a packed file")
        if tensor.dtype not in _TYPES and tensor.is_floating_point():
            raise BidmError(f"the tensor {name!r} has the type {tensor.dtype}")


def finite(values: Any) -> Any:
    """Copy of JSON values with null for infinities and NaN, which JSON lacks."""
    if isinstance(values, dict):
        return {str(key): finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values

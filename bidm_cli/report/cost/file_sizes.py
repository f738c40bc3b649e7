"""Bytes of a packed file by part: network, first stage, conditioner, header."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from bidm_cli.errors import BidmError

_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class FileSizes:
    """Bytes of a packed file by part; the parts add up to ``total``."""

    network: int
    first_stage: int
    conditioner: int
    header: int
    total: int


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a safetensors file, read from its header alone.

    Raises:
        BidmError: not a safetensors file.
    """
    try:
        with open(path, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > _MAX_HEADER:
                raise ValueError("its header is over 100 MiB")
            header = json.loads(handle.read(length))
        return {
            name: int(entry["data_offsets"][1]) - int(entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise BidmError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error) as error:
        raise BidmError(f"{path} is not a packed file: {error}") from error


def file_sizes(path: Path) -> FileSizes:
    """Bytes of a packed file by part.

    Raises:
        BidmError: not a safetensors file.
    """
    parts = {"unet": 0, "first_stage": 0, "conditioner": 0}
    for name, size in tensor_bytes(path).items():
        part = name.split(".", 1)[0]
        parts[part] = parts.get(part, 0) + size
    total = path.stat().st_size
    header = total - sum(parts.values())
    return FileSizes(parts["unet"], parts["first_stage"], parts["conditioner"], header, total)


def stored_network_tensors(path: Path) -> dict[str, int]:
    """Bytes of each tensor of a packed file's network, by its name within the network."""
    sizes = tensor_bytes(path)
    return {name.removeprefix("unet."): size for name, size in sizes.items() if name.startswith("unet.")}

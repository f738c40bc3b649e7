"""Read a checkpoint file without running anything that is in it.

    contents = read_file(Path("model.ckpt"))      # dicts, lists, tensors, numbers; Stub where a class was

PyTorch files (zip, and the older plain layout) go through ``torch.load(weights_only=True)`` after the names
they ask for were checked, or where that has no instructions for them (pickle protocols other than 2) through
:mod:`bidm_cli.checkpoints.reading.restricted`; ``.safetensors`` files hold nothing but tensors. Both kinds of
container are memory-mapped where they allow it: tensors are read from disk when they are used, so the file
must not be overwritten in place meanwhile.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bidm_cli.checkpoints.reading import restricted
from bidm_cli.checkpoints.reading.pickle_names import collect_names, printable, stubs_for
from bidm_cli.errors import BidmError

_LARGEST_PICKLE = 1 << 29
_LARGEST_HEADER = 100 << 20
_ZIP_MAGIC = b"PK\x03\x04"


def read_file(path: Path) -> Any:
    """The contents of a checkpoint: mostly dicts of tensors, on the CPU.

    Raises:
        BidmError: no such file, not a checkpoint, cut short or damaged, or it asks for a class or function
            that is not on the list (see :mod:`bidm_cli.checkpoints.reading.pickle_names`).
    """
    path = existing_file(path)
    with open(path, "rb") as handle:
        start = handle.read(512)
    _refuse_other_content(path, start)
    if safetensors_metadata(path) is not None:
        return _read_safetensors(path)
    return _read_torch(path, start.startswith(_ZIP_MAGIC))


def existing_file(path: str | Path) -> Path:
    """``path``, if it is a file.

    Raises:
        BidmError: it is not there, or a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise BidmError(f"{path} is a folder; name the checkpoint file in it")
    if not path.exists():
        raise BidmError(f"no such file: {path}")
    return path


def safetensors_metadata(path: Path) -> dict[str, str] | None:
    """The free metadata of a safetensors file ({} if it has none); None if the file is something else."""
    with open(path, "rb") as handle:
        prefix = handle.read(9)
        if len(prefix) < 9 or prefix[8:] != b"{":
            return None
        (length,) = struct.unpack("<Q", prefix[:8])
        if length > min(_LARGEST_HEADER, path.stat().st_size - 8):
            return {} if path.suffix == ".safetensors" else None
        try:
            header = json.loads(b"{" + handle.read(length - 1))
        except (ValueError, RecursionError):
            return {} if path.suffix == ".safetensors" else None
    metadata = header.get("__metadata__", {})
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def _refuse_other_content(path: Path, start: bytes) -> None:
    """Plain words for the files people most often mistake for a checkpoint."""
    if not start:
        raise BidmError(f"{path} is empty; download or copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise BidmError(f"{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull")
    if start.lstrip()[:1] == b"<":
        raise BidmError(f"{path} is a web page, not a checkpoint; the download went wrong")
    if path.suffix == ".safetensors" and safetensors_metadata(path) is None:
        raise BidmError(f"{path} is not a safetensors file, or is cut short; download or copy it again")


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise BidmError(f"{path}: damaged or cut short ({_reason(error)}); get the file again") from error


def _read_torch(path: Path, zipped: bool) -> Any:
    # What a damaged or hostile pickle raises cannot be listed: every error of every opcode, KeyError to
    # RecursionError. All of them mean the same to the user.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # torch unpacks such an archive into a temporary folder.
            if not zipped and tarfile.is_tarfile(path):
                raise BidmError("it is a tar archive, as torch wrote them before 0.2; save it again")
            names, instructions = _scan_zip(path) if zipped else _scan_plain(path)
            stubs = stubs_for(names)
            if not instructions <= restricted.TORCHS_INSTRUCTIONS:
                return _load_other_protocol(path, zipped)
            with torch.serialization.safe_globals(stubs):  # type: ignore[arg-type]
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except BidmError as error:
        raise BidmError(f"{path}: {error}") from error
    except Exception as error:
        raise BidmError(
            f"{path} cannot be read as a PyTorch checkpoint: damaged, cut short or another kind of file "
            f"({_reason(error)})"
        ) from error


def _load_other_protocol(path: Path, zipped: bool) -> Any:
    if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0") not in ("", "0"):
        raise BidmError(
            "it was saved with another pickle protocol than 2, which torch does not read while "
            "TORCH_FORCE_WEIGHTS_ONLY_LOAD is set; unset it: bidm's own unpickler runs nothing either"
        )
    return torch.load(path, map_location="cpu", pickle_module=restricted, weights_only=False, mmap=zipped)


def _scan_zip(path: Path) -> tuple[set[str], set[str]]:
    """(names, instructions) of the pickle in a zip file."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = {entry.filename.partition("/")[2] for entry in entries}
        if any(name.startswith("code/") for name in names):
            raise BidmError("it is a TorchScript program, not a checkpoint; save model.state_dict() instead")
        programs = [entry for entry in entries if entry.filename.partition("/")[2] == "data.pkl"]
        if len(programs) != 1:
            raise BidmError("it is a zip archive, but not one that torch.save wrote (it has no data.pkl)")
        # Memory-mapping would take compressed bytes for weights; torch.save never compresses.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise BidmError("its contents are compressed, which torch.save does not do; save it again")
        if programs[0].file_size > _LARGEST_PICKLE:
            raise BidmError("its table of contents is larger than any checkpoint's; refused")
        found: set[str] = set()
        return found, collect_names(io.BytesIO(archive.read(programs[0])), found)


def _scan_plain(path: Path) -> tuple[set[str], set[str]]:
    """(names, instructions) in the older layout: magic number, version, system, contents, storages.

    These are five pickles in a row. A plain pickle is scanned the same way, to be refused by name.
    """
    names: set[str] = set()
    instructions: set[str] = set()
    with open(path, "rb") as handle:
        for index in range(5):
            try:
                instructions |= collect_names(handle, names)
            except ValueError:
                if index == 0 and not names:
                    raise
                break
    return names, instructions


def _reason(error: BaseException) -> str:
    """An error of a reader in a few words, without torch's advice to load unsafely."""
    text = str(error)
    if isinstance(error, zipfile.BadZipFile):
        return "the end of the archive is missing or damaged"
    if match := re.search(
        r"Weights(?:Unpickler error:| only load failed\.)\s*(?:In PyTorch 2\.6.*?\n\n?)?(.+)", text, re.S
    ):
        text = match[1]
    text = printable(" ".join(text.split()) or type(error).__name__)
    return text if len(text) <= 160 else text[:157] + "..."

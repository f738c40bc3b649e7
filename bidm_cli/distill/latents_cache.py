"""Latents of training images on disk, so that no image is encoded twice, in whichever run.

    key = latents_key(model, content)
    cache = open_latents(key, count, shape, limit, say)     # None where there is no place for it
    cache.write(7, latents)
    cache.read(7)                                           # float32 [C, H, W]; None if it is not there

One file per data set and first stage, ``latents/KEY.npy`` in the user's cache folder: an array of records,
each a latent image and its checksum. It is as long as the data set, and sparse. Records are written as images
are first needed: a short run on many images encodes few, and one that is killed loses none. A record counts
if its checksum is right, so half-written and damaged ones are missing ones, and processes need no lock: they
write the same bytes to the same place.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import threading
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from numpy.lib import format as npy_format
from torch import Tensor

from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill.fingerprint import digest_of
from bidm_cli.errors import BidmError
from bidm_cli.files import cache_folder
from bidm_cli.packed.cpu.codegen.isa import cpu_model
from bidm_cli.version import __version__

LIMIT = "BIDM_LATENTS_GIB"
"""Environment variable: GiB that the files of latents may take together; 0 keeps none."""
DEFAULT_LIMIT = 20.0
RESERVE = 1 << 30
"""Bytes of the disk that are left free for others, such as the run's own state."""
ROOM_EVERY = 64
"""Records written between looks at the room that is left."""
_WRITTEN = 1 << 32  # set in every checksum, so that the zeros of a hole are none


def latents_limit() -> int:
    """Bytes that all files of latents may take together, from :data:`LIMIT`.

    Raises:
        BidmError: it is not a number from 0 up.
    """
    text = os.environ.get(LIMIT) or str(DEFAULT_LIMIT)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise BidmError(f"{LIMIT}={text} is not a number of GiB; 0 keeps no latents on disk")
    return int(min(limit, 1 << 30) * (1 << 30))


def has_latents(model: DiffusionModel) -> bool:
    """True if images are encoded by a first stage whose description and weights tell all of it."""
    stage = model.architecture.get("first_stage") or {}
    return model.first_stage is not None and stage.get("kind") not in (None, "value_range")


def latents_key(model: DiffusionModel, content: str) -> str:
    """Hexadecimal name of the latents of images with the digest ``content``.

    Convolutions differ in the last bits between machines, numbers of threads and versions of torch, so all of
    these are part of it: latents from the disk are the bytes that encoding would give here and now.
    """
    stage, device = model.first_stage, model.device
    assert stage is not None
    about = {
        "content": content,
        "first_stage": model.architecture["first_stage"],
        "class": f"{type(stage).__module__}.{type(stage).__qualname__}",
        "weights": digest_of([*stage.parameters(), *stage.buffers()]),
        "scale_factor": model.scale_factor,
        "shape": list(model.sample_shape),
        "versions": [__version__, torch.__version__, PIL.__version__],
        "device": _device_text(device),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _device_text(device: torch.device) -> str:
    if device.type == "cuda":
        tensor_cores = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        return f"{torch.cuda.get_device_name(device)} {tensor_cores}"
    return f"{device.type} {cpu_model()} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"


class LatentsCache:
    """File of the latents of one data set, open for reading and writing; safe to use from several threads.

    Args:
        path: made if it is not there. count: number of images. shape: (C, H, W) of their latents.
        limit: bytes that all files in its folder may take; those used longest ago are removed for it.
        say: called with a line once nothing more can be written, which is no error.

    Raises:
        OSError: it cannot be opened for writing.
    """

    def __init__(
        self, path: Path, count: int, shape: tuple[int, ...], limit: int, say: Callable[[str], None]
    ) -> None:
        self.path, self._limit, self._say = path, limit, say
        self._record = np.dtype([("latents", "<f4", shape), ("check", "<u8")])
        header = _header(self._record, count)
        self._start, self._written, self._stopped = len(header), 0, False
        self.whole = self._start + count * self._record.itemsize
        self._lock = threading.Lock()
        self._file = _opened(path, header, self.whole)
        weakref.finalize(self, self._file.close)

    @property
    def size(self) -> int:
        """Bytes that it takes on the disk now."""
        return _allocated(os.fstat(self._file.fileno()))

    def read(self, index: int) -> Tensor | None:
        """Latents float32 [C, H, W] of an image; None if they are missing or damaged."""
        try:
            with self._lock:
                self._file.seek(self._start + index * self._record.itemsize)
                content = self._file.read(self._record.itemsize)
        except OSError:
            return None
        if len(content) != self._record.itemsize:
            return None
        record = np.frombuffer(content, self._record)[0]
        if int(record["check"]) != _checksum(index, record["latents"]):
            return None
        return torch.from_numpy(np.array(record["latents"], dtype=np.float32))

    def write(self, index: int, latents: Tensor) -> None:
        """Keep the latents [C, H, W] of an image, if there is room."""
        record = np.zeros((), self._record)
        record["latents"] = latents.numpy(force=True)
        record["check"] = _checksum(index, record["latents"])
        content = record.tobytes()
        with self._lock:
            if self._stopped or (self._written % ROOM_EVERY == 0 and not self._has_room()):
                return None
            try:
                self._file.seek(self._start + index * self._record.itemsize)
                if self._file.write(content) != len(content):
                    return self._stop("the disk is full")
            except OSError as error:
                return self._stop(str(error.strerror))
            self._written += 1
        return None

    def _has_room(self) -> bool:
        """True if more may be written, once files of others that were used longest ago are removed."""
        try:
            own = os.stat(self.path)
            if not os.path.samestat(own, os.fstat(self._file.fileno())):
                raise FileNotFoundError
            others = _others(self.path)
            while True:
                total = _allocated(own) + sum(size for _, size, _ in others)
                free = shutil.disk_usage(self.path.parent).free
                if total < self._limit and free > RESERVE:
                    return True
                if not others:
                    break
                others.pop(0)[2].unlink(missing_ok=True)
        except FileNotFoundError:
            self._stop(f"{self.path} was removed")
        except OSError as error:
            self._stop(str(error.strerror))
        else:
            full = f"they take {size_text(total)}, the limit ({LIMIT})"
            self._stop(full if free > RESERVE else f"only {size_text(free)} are free on the disk")
        return False

    def _stop(self, reason: str) -> None:
        self._stopped = True
        self._say(
            f"No more latents are kept in {self.path.parent}: {reason}; training goes on, and what is not "
            "there is encoded when it is needed"
        )


def open_latents(
    key: str, count: int, shape: tuple[int, ...], limit: int, say: Callable[[str], None]
) -> LatentsCache | None:
    """Open the file of ``key``, or make it, and say where it is; None if that cannot be, which is said."""
    try:
        path = cache_folder() / "latents" / f"{key}.npy"
        cache = LatentsCache(path, count, shape, limit, say)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        reason = error.strerror if isinstance(error, OSError) else "there is no home folder"
        say(f"Latents are not kept on disk: {reason}; training goes on, images are encoded when needed")
        return None
    whole = f"{size_text(cache.whole)} for all {count:,} images"
    say(
        f"latents: each image is encoded once and kept in {path} ({size_text(cache.size)} now, {whole}; "
        "`latents_cache=False` keeps none)"
    )
    return cache


def size_text(size: int) -> str:
    """Bytes as "1.2 MB"."""
    number, units = float(size), ["bytes", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:,.0f} {units[0]}" if units[0] == "bytes" else f"{number:,.1f} {units[0]}"


def _header(record: np.dtype, count: int) -> bytes:
    """Header of a .npy of ``count`` records."""
    buffer = io.BytesIO()
    description = npy_format.dtype_to_descr(record)
    about = {"descr": description, "fortran_order": False, "shape": (count,)}
    npy_format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


def _opened(path: Path, header: bytes, size: int) -> Any:
    """The file as long as it has to be and with this header, whatever it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not renamed into place: of two processes that make it at once, one would write to a file without a name.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    try:
        if os.fstat(file.fileno()).st_size != size:
            file.truncate(size)
        if file.read(len(header)) != header:
            file.seek(0)
            file.write(header)
        os.utime(path)
    except BaseException:
        file.close()
        raise
    return file


def _checksum(index: int, latents: np.ndarray) -> int:
    return _WRITTEN | zlib.crc32(np.ascontiguousarray(latents).data, zlib.crc32(index.to_bytes(8, "little")))


def _others(path: Path) -> list[tuple[int, int, Path]]:
    """(time of the last use in ns, bytes, path) of the other files in the folder, the oldest use first."""
    found = []
    for other in path.parent.glob("*.npy"):
        if other != path:
            try:
                about = other.stat()
            except OSError:
                continue
            found.append((about.st_mtime_ns, _allocated(about), other))
    return sorted(found)


def _allocated(about: os.stat_result) -> int:
    """Bytes on the disk, holes left out where the system tells."""
    blocks = getattr(about, "st_blocks", None)
    return about.st_size if blocks is None else blocks * 512

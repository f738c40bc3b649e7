"""Models of the Hugging Face hub: ``hf://org/name`` or ``hf://org/name@revision`` to a local folder.

Needs huggingface_hub (the ``hub`` extra) and, for what is not in its cache yet, the network.
"""

from __future__ import annotations

import re
from pathlib import Path

from bidm_cli.checkpoints.reading.pickle_names import printable
from bidm_cli.errors import BidmError

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
_WANTED = ["*.json", "diffusion_pytorch_model*", "unet/*", "vae/*", "vqvae/*", "scheduler/*"]
_UNWANTED = ["*.msgpack", "*.onnx*", "*.ckpt"]


def is_hub_id(path: str | Path) -> bool:
    """True if ``path`` names a model of the hub; pathlib makes one slash of two."""
    return re.match(r"hf:/", str(path)) is not None


def downloaded(path: str | Path) -> Path:
    """The folder with the model's files, from the cache or downloaded.

    Raises:
        BidmError: no such model, no network, or huggingface_hub is not installed.
    """
    name = re.sub(r"^hf:/+", "", str(path))
    match = _ID.fullmatch(name)
    if match is None:
        raise BidmError(f"hf://{printable(name, 80)} is no id of the hub; write hf://organisation/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise BidmError(
            f"hf://{name} needs huggingface_hub; install it with: pip install 'bidm[hub]', or download the "
            "folder and name it"
        ) from error
    # Its errors are of many classes: HTTP, connection, offline mode, cache, validation.
    try:
        folder = snapshot_download(
            match[1], revision=match[2], allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except Exception as error:
        reason = printable(" ".join(str(error).split()) or type(error).__name__, 160)
        raise BidmError(
            f"hf://{name} cannot be had: no such model, or no connection to the hub ({reason}); "
            "download the folder on another machine and name it"
        ) from error
    return Path(folder)

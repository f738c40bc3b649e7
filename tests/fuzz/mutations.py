"""Mutations of small files, run in a process of its own: the tests read what it prints.

    python -m tests.fuzz.mutations FOLDER SEED COUNT

Loads every file of FOLDER, mutated COUNT times in all, and prints one JSON line of counts, or of what went
wrong: an exception that is no BidmError. A crash, a hang or too much memory shows in the exit status.
"""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import signal
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from bidm_cli.checkpoints.first_stages.file import load_first_stage
from bidm_cli.checkpoints.open import load_architecture, load_checkpoint
from bidm_cli.data.image_sets import read_image_set
from bidm_cli.errors import BidmError
from bidm_cli.packed.format.read import load_packed

MEMORY = 4 << 30
"""Bytes of address space beyond what the libraries take."""
SECONDS = 10
"""Longest time for one file."""


def flip(data: bytes, random: random.Random) -> bytes:
    """A few bytes changed, mostly near the start, where the headers are."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        place = random.randrange(min(len(out), random.choice((16, 256, len(out)))))
        out[place] = random.choice((0, 255, out[place] ^ (1 << random.randrange(8)), random.randrange(256)))
    return bytes(out)


def cut(data: bytes, random: random.Random) -> bytes:
    return data[: random.randrange(len(data))]


def splice(data: bytes, random: random.Random) -> bytes:
    """A piece copied over another, or left out."""
    start, end = sorted(random.randrange(len(data)) for _ in range(2))
    piece = data[start : min(end, start + 64)]
    place = random.randrange(len(data))
    return data[:place] + piece + data[place + (0 if random.random() < 0.5 else len(piece)) :]


def number(data: bytes, random: random.Random) -> bytes:
    """A number in the text made huge, negative or something else: JSON, YAML and headers."""
    digits = [i for i, byte in enumerate(data[:4096]) if 48 <= byte <= 57]
    if not digits:
        return flip(data, random)
    place = random.choice(digits)
    value = random.choice((b"99999999999", b"-1", b"0", b"1e308", b"null", b"[]", b'"x"', b"{}", b"true"))
    return data[:place] + value + data[place + 1 :]


def repack(data: bytes, random: random.Random) -> bytes:
    """The entries of a zip archive mutated rather than the archive, so that it stays whole."""
    if not data.startswith(b"PK"):
        return flip(data, random)
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = random.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            if name == chosen and content:
                content = random.choice((flip, cut, splice))(content, random)
            squeezed = zipfile.ZIP_DEFLATED if random.random() < 0.02 else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(name), content, squeezed)
    return out.getvalue()


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip,
    flip,
    cut,
    splice,
    number,
    repack,
    repack,
)


def load(path: Path) -> None:
    """What a user would open the file with."""
    if path.suffix == ".bidm":
        load_packed(path, backend="torch")
    elif path.suffix in (".npz", ".tar", ".tgz"):
        read_image_set(path)[0]
    elif path.name.startswith("vae"):
        load_first_stage(path)
    elif path.suffix in (".yaml", ".yml") or path.name == "arguments.json":
        load_architecture(path)
    else:
        load_checkpoint(path.parents[1] if "diffusers" in path.parts else path)


def attempt(path: Path, data: bytes) -> str:
    """ "refused" or "loaded"; raises whatever else happens."""
    original = path.read_bytes()
    path.write_bytes(data)
    signal.alarm(SECONDS)
    try:
        load(path)
    except BidmError as error:
        assert "\n" not in str(error), f"more than one line: {error}"
        return "refused"
    finally:
        signal.alarm(0)
        path.write_bytes(original)
    return "loaded"


def main(folder: Path, seed: int, count: int) -> None:
    """Run ``count`` mutations over the files of ``folder``, all alike, and print the counts."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        load(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Only now: the libraries are mapped.
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    counts = {"refused": 0, "loaded": 0}
    for index in range(count):
        chance = random.Random(f"{seed} {index}")
        path = files[index % len(files)]
        mutation = chance.choice(MUTATIONS)
        data = mutation(path.read_bytes(), chance)
        try:
            counts[attempt(path, data)] += 1
        except BaseException as error:
            kept = folder.parent / f"failed{path.suffix}"
            kept.write_bytes(data)
            where = "".join(traceback.format_exception(error)[-4:])
            print(
                json.dumps(
                    {"failed": f"{path.name}, {mutation.__name__}, {index}: {error!r}", "where": where}
                )
            )
            return
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps(counts | {"megabytes": grown / 1024}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

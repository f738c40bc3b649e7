"""``bidm demo``: the bundled checkpoints, data, recipes and packed models."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click

from bidm_cli.cli.wording import echo

FILES = {
    "ldm4_peeps.ckpt": "an LDM-4 of 32x32 faces in CompVis' layout, averaged weights, half precision",
    "config.yaml": "its configuration",
    "faces.npz": "4,000 of its training images (Open Peeps by Pablo Stanley, CC0)",
    "faces-w1a1.yaml": "a recipe for it, 400 steps",
    "faces-w1a2.yaml": "a recipe with two planes of binary activations, 280 steps: better faces",
    "faces-w1a1.bidm": "packed from it by faces-w1a1.yaml with --steps 6000",
    "faces-w1a2.bidm": "packed from it by faces-w1a2.yaml with --steps 7000",
    "digits.pth": "a DDPM of 8x8 handwritten digits, EMA weights in ermongroup/ddim's layout",
    "digits.yml": "its configuration",
    "digits.npz": "its 1,797 training images (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)",
    "digits-w1a1.yaml": "a recipe for it, 1,600 steps",
    "digits-w1a2.yaml": "a recipe with two planes of binary activations, 1,600 steps",
}


@click.command("demo")
@click.argument("folder", default="demo", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Write the bundled checkpoints, data, recipes and packed models into FOLDER, and print what to do next.

    Files that are already there are left alone if they are the same, and never overwritten if they are not.
    """
    from bidm_cli.errors import BidmError
    from bidm_cli.files import write_atomically

    contents = {name: resources.files("bidm_cli.demo").joinpath(name).read_bytes() for name in FILES}
    for name, content in contents.items():
        target = folder / name
        if target.exists() and not (target.is_file() and target.read_bytes() == content):
            raise BidmError(
                f"{target} exists and is another file; choose another folder: bidm demo NEW_FOLDER"
            )
    for name, what in FILES.items():
        with write_atomically(folder / name) as temporary:
            temporary.write_bytes(contents[name])
        echo(f"{folder / name}: {what}")
    echo(
        f"""
Draw faces on 1-bit arithmetic, now:
  bidm sample {folder}/faces-w1a2.bidm -n 64
Compress the checkpoint yourself, and compare:
  bidm compress {folder}/ldm4_peeps.ckpt --recipe {folder}/faces-w1a1.yaml --data {folder}/faces.npz
  bidm sample ldm4_peeps.bidm -n 64
  bidm sample {folder}/ldm4_peeps.ckpt -n 64 --steps 50
  bidm report ldm4_peeps.bidm --teacher {folder}/ldm4_peeps.ckpt"""
    )

"""``bidm demo``: the bundled checkpoint, data and recipe."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click

from bidm_cli.cli.wording import echo

FILES = {
    "digits.pth": "a DDPM of 8x8 handwritten digits, EMA weights in ermongroup/ddim's layout",
    "digits.yml": "its config",
    "digits.npz": "its 1,797 training images (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)",
    "digits-w1a1.yaml": "a recipe of about three minutes on two cores",
    "digits-w1a2.yaml": "a recipe with two planes of binary activations: better digits in about four minutes",
}


@click.command("demo")
@click.argument("folder", default="demo", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Write the bundled checkpoint, its data and a recipe into FOLDER, and print the next commands.

    Files that are already there are left alone if they are the same, and never overwritten if they are not.
    """
    from bidm_cli.errors import BidmError
    from bidm_cli.files import write_atomically

    for name, what in FILES.items():
        content = resources.files("bidm_cli.demo").joinpath(name).read_bytes()
        target = folder / name
        if target.exists() and target.read_bytes() != content:
            raise BidmError(
                f"{target} exists and is another file; choose another folder: bidm demo NEW_FOLDER"
            )
        with write_atomically(target) as temporary:
            temporary.write_bytes(content)
        echo(f"{target}: {what}")
    echo(
        f"""
Next:
  bidm compress {folder}/digits.pth --recipe {folder}/digits-w1a1.yaml --data {folder}/digits.npz
  bidm sample digits.bidm -n 64
  bidm sample {folder}/digits.pth -n 64
  bidm report digits.bidm --teacher {folder}/digits.pth"""
    )

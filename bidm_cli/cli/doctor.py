"""``bidm doctor``: devices, backends and kernels of this machine."""

from __future__ import annotations

import click

from bidm_cli.cli.wording import echo


@click.command("doctor")
def command() -> None:
    """Show devices, backends, the kernels that layers get, cached weights and versions."""
    from bidm_cli.report import doctor as machine
    from bidm_cli.version import __version__

    sections = {
        "devices": machine.devices(),
        "backends": machine.backends(),
        "cpu kernels": machine.kernels(),
        "gpu kernels": machine.gpu_kernels(),
        "feature networks": machine.feature_networks(),
        "versions": [f"bidm {__version__}", *machine.versions()],
    }
    for title, lines in sections.items():
        echo(f"{title}:")
        for line in lines:
            echo(f"  {line}")

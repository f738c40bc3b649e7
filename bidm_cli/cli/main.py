"""``bidm`` command: a group whose commands are imported when they are asked for."""

from __future__ import annotations

import importlib
import os
import sys
import warnings

import click

from bidm_cli.cli.quiet import quiet_beside_first
from bidm_cli.cli.threads import settle_openmp
from bidm_cli.cli.wording import echo, with_options
from bidm_cli.errors import BidmError
from bidm_cli.interrupts import Interrupted, raising_signals
from bidm_cli.parallel.place import LAUNCHED, LOST, ProcessLost, is_first_to_fail, own_place
from bidm_cli.version import __version__

COMMANDS = {
    "compress": "Binarize a checkpoint, distil it against the original, pack it into one file.",
    "sample": "Draw images from a packed file or an original checkpoint.",
    "report": "Storage and operation savings, FID, timings: as a table, JSON or a page.",
    "inspect": "Say what a checkpoint, packed file or config is, and what a recipe would make of it.",
    "bench": "Time one step and whole sampling, packed against float, in one run.",
    "export": "Turn a packed file back into a float checkpoint in the original key layout.",
    "demo": "Write the bundled checkpoints, packed models, data and recipes.",
    "doctor": "Show devices, backends, kernels, cached weights and versions.",
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and summary and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"bidm_cli.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bidm")
@click.option("--debug", is_flag=True, help="Show tracebacks instead of one-line errors.")
def cli(debug: bool) -> None:
    """Compress diffusion checkpoints to 1-bit weights and activations, and sample from the packed file.

    \b
    A first round, with the bundled checkpoint:
      bidm demo demo
      bidm compress demo/digits.pth --recipe demo/digits-w1a1.yaml --data demo/digits.npz
      bidm sample digits.bidm -n 64
      bidm report
    """


def main() -> None:
    """Entry point: one line and exit status 1 for what the user can mend, 2 for usage errors.

    A signal that ended it gives 128 and its number.
    """
    debug = "--debug" in sys.argv[1:]
    if not debug:
        warnings.formatwarning = lambda message, *where: with_options(f"Warning: {message}\n")  # type: ignore[assignment]
    try:
        place = own_place()
        settle_openmp(place.local_size)
        quiet_beside_first(place.rank, place.size)
        with raising_signals():
            cli(prog_name="bidm", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.Abort as abort:
        # click turns KeyboardInterrupt, of which Interrupted is one, into this.
        stop = abort.__cause__ if isinstance(abort.__cause__, Interrupted) else Interrupted()
        _say_once(f"Interrupted: {stop.message}" if stop.message else "Interrupted.")
        sys.exit(128 + stop.signum)
    except click.ClickException as error:
        if place.rank == 0:
            error.show()
        sys.exit(error.exit_code)
    except (BidmError, OSError, MemoryError) as error:
        if debug:
            raise
        lost = isinstance(error, ProcessLost)
        if not (lost and LAUNCHED in os.environ):  # there the process that started all says it
            _say_once(f"Error: {_one_line(error)}")
        sys.exit(LOST if lost else 1)


def _say_once(line: str) -> None:
    """Show why the run ends; of several processes the first to fail does."""
    if is_first_to_fail():
        echo(line, err=True)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, BidmError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return "out of memory; try a smaller --batch-size"
    return " ".join(str(error).split())

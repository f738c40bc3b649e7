"""Options that several commands share, each written once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def path_option(*names: str, help: str, **more: Any) -> Callable[[Command], Command]:
    """Option whose value is a path."""
    return click.option(*names, type=click.Path(path_type=Path), help=help, **more)


def int_option(name: str, least: int, help: str, default: int | None = None) -> Any:
    """Option whose value is an integer from ``least`` up."""
    known: dict[str, Any] = {} if default is None else {"default": default, "show_default": True}
    return click.option(name, type=click.IntRange(min=least), help=help, **known)


def device_option(default: str = "auto", help: str = "cpu, cuda, cuda:1, ... or auto.") -> Any:
    """``--device``; :func:`bidm_cli.cli.devices.choose_device` checks it."""
    return click.option("--device", default=default, show_default=True, help=help)


model_argument = click.argument("model", type=click.Path(path_type=Path))
backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "numba", "cupy"]),
    default="auto",
    show_default=True,
    help="What runs the packed layers.",
)
layers_option = click.option("--layers", is_flag=True, help="List every layer.")
json_option = path_option("--json", "json_path", help="Also write everything here.")


def write_json_if(path: Path | None, content: dict[str, Any]) -> None:
    """Write ``content`` for ``--json``, if that was given."""
    if path is not None:
        from bidm_cli.report.pages.render import write_json

        write_json(path, content)


def grouped(
    name: str, make: Callable[..., Any], *options: Callable[[Any], Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that gives a command ``options`` and passes their values on as one argument.

    Args:
        name: the command's parameter.
        make: called with the options' values by name; its result is the argument.
        options: click options; their names are the parameters of ``make``.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapped(**values: Any) -> Any:
            own = {parameter.name: values.pop(parameter.name) for parameter in added}
            return command(**values, **{name: make(**own)})

        before = len(getattr(command, "__click_params__", []))
        for option in reversed(options):
            option(wrapped)
        added = list(wrapped.__click_params__[before:])  # type: ignore[attr-defined]
        return wrapped

    return add


class SamplerName(click.ParamType):
    """Name of a registered sampler; the registry, and torch with it, is imported when it is looked at."""

    name = "sampler"

    @property
    def _choice(self) -> click.Choice:
        from bidm_cli.registry import SAMPLERS

        return click.Choice(SAMPLERS.names())

    def get_metavar(self, param: click.Parameter, *context: Any, **named: Any) -> str | None:
        return self._choice.get_metavar(param, *context, **named)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self._choice.convert(value, param, ctx)


def _sampling(**values: Any) -> Any:
    from bidm_cli.sampling.options import SamplingOptions

    return SamplingOptions(**values)


sampling_options = grouped(
    "sampling",
    _sampling,
    int_option("--steps", 1, "Sampler steps.  [default: the recipe's, else 100]"),
    click.option(
        "--sampler",
        type=SamplerName(),
        help="DDIM, ancestral, or DPM-Solver++(2M).  [default: the recipe's, else ddim]",
    ),
    click.option(
        "--eta",
        type=click.FloatRange(0, 1),
        help="DDIM's fresh noise: 0 none, 1 as ancestral.  [default: the recipe's, else 0]",
    ),
    int_option("--seed", 0, "Every seed and number is another image.", default=0),
    int_option("--batch-size", 1, "Images at a time on a GPU; a CPU takes small groups of a fixed size.", 64),
    click.option(
        "--guidance", default=1.0, show_default=True, help="Scale of classifier-free guidance; 1 is none."
    ),
    click.option(
        "--clip/--no-clip", default=None, help="Limit x0 to [-1, 1].  [default: as the model needs]"
    ),
    click.option(
        "--skip",
        type=click.Choice(["uniform", "quad"]),
        default="uniform",
        show_default=True,
        help="How timesteps are spaced.",
    ),
)
"""Give a command the fields of :class:`bidm_cli.sampling.options.SamplingOptions`, as ``sampling``."""

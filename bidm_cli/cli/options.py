"""Options that several commands share, and the records that their values become."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from bidm_cli.cli.outputs import json_target
from bidm_cli.cli.wording import json_with_options
from bidm_cli.errors import BidmError, first_line


def option(*names: str, default: Any = None, **more: Any) -> Callable[[Any], Any]:
    """Option that shows its default, if it has one."""
    return click.option(
        *names, **({} if default is None else {"default": default, "show_default": True}), **more
    )


def path_option(*names: str, **more: Any) -> Callable[[Any], Any]:
    """Option whose value is a path."""
    return option(*names, type=click.Path(path_type=Path), **more)


def int_option(name: str, least: int, help: str, default: int | None = None) -> Callable[[Any], Any]:
    """Option whose value is an integer from ``least`` up."""
    return option(name, type=click.IntRange(min=least), help=help, default=default)


def device_option(default: str = "auto", help: str = "cpu, cuda, cuda:1, ... or auto.") -> Any:
    """``--device``; :func:`choose_device` checks it."""
    return option("--device", default=default, help=help)


def choose_device(name: str) -> str:
    """Device to run on; "auto" takes CUDA where there is one.

    Raises:
        BidmError: no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no NVIDIA GPU; bidm doctor says more")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BidmError(f"--device {name}: {first_line(error)}; use cpu") from error
    return name


model_argument = click.argument("model", type=click.Path(path_type=Path))
backend_option = option(
    "--backend",
    type=click.Choice(["auto", "torch", "numba", "cupy"]),
    default="auto",
    help="What runs packed layers: torch (the reference), numba (CPU) or cupy (GPU).",
)
layers_option = click.option("--layers", is_flag=True, help="List every layer.")
json_option = path_option(
    "--json", "json_path", callback=json_target, help="Also write all results to this JSON file."
)


def write_json_if(path: Path | None, content: dict[str, Any]) -> None:
    """Write ``content`` for ``--json``, if that was asked for."""
    if path is not None:
        from bidm_cli.report.pages.render import write_json

        write_json(path, json_with_options(content))


def grouped(name: str, record: str, *options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Decorator that gives a command ``options`` and passes them on as one argument.

    Args:
        name: the command's parameter.
        record: its type, a dataclass with a field for each option, as "module:Class": imported when needed.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapped(**values: Any) -> Any:
            kind = pkgutil.resolve_name(record)
            own = {key.name: values.pop(key.name) for key in fields(kind) if key.name in values}
            return command(**values, **{name: kind(**own)})

        for add_option in reversed(options):
            add_option(wrapped)
        return wrapped

    return add


@dataclass(frozen=True)
class CheckpointOptions:
    """Settings for reading an original checkpoint: see :func:`bidm_cli.checkpoints.open.load_checkpoint`."""

    config: Path | None = None
    ema: bool = True
    family: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    first_stage: Path | None = None
    strict: bool = False

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of ``load_checkpoint`` and ``open_model``: those that were asked for."""
        usual = CheckpointOptions()
        return {name: value for name, value in vars(self).items() if value != getattr(usual, name)}


def _parse_settings(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> Any:
    from bidm_cli.checkpoints.overrides import parse_settings

    return parse_settings(value)


checkpoint_options = grouped(
    "loading",
    f"{__name__}:CheckpointOptions",
    path_option("--config", help="Config file of the original, if it is not beside the checkpoint."),
    option("--family", help="Family to read the file as: ldm, ddpm, openai, ...  [default: detected]"),
    option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_parse_settings,
        help="Set or override what the file says, such as num_heads=8 or prediction=v; may be repeated.",
    ),
    path_option("--first-stage", help="Autoencoder of a latent model, if it is in a file of its own."),
)
no_ema_option = click.option(
    "--no-ema", "ema", flag_value=False, default=True, help="Take the weights as trained, not their average."
)
"""Field ``ema`` of :data:`checkpoint_options`, for the commands that use the weights."""
strict_option = click.option(
    "--strict", is_flag=True, help="Refuse a model about which anything had to be assumed; list it."
)
"""Field ``strict`` of :data:`checkpoint_options`."""

condition_options = grouped(
    "conditions",
    "bidm_cli.data.condition_files:ConditionSource",
    path_option("--context", help="Text models: embeddings [L, D] or [n, L, D], .npy, .npz or .safetensors."),
    path_option(
        "--unconditional-context",
        help="Text models: embedding [L, D] of the empty prompt, for guidance; bidm compress packs it.",
    ),
    path_option(
        "--condition",
        help="Models conditioned on images: these (a file, folder, zip or .npz), or arrays [n, C, H, W].",
    ),
    path_option("--mask", help="Inpainting: one mask, or one per image of --condition; white is filled in."),
)


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


sampling_options = grouped(
    "sampling",
    "bidm_cli.sampling.options:SamplingOptions",
    int_option("--steps", 1, "Sampler steps.  [default: the recipe's, else 100]"),
    option(
        "--sampler",
        type=SamplerName(),
        help="ddpm is ancestral sampling, dpm++ DPM-Solver++(2M).  [default: the recipe's, else ddim]",
    ),
    option(
        "--eta",
        type=click.FloatRange(0, 1),
        help="Noise that DDIM adds per step: 0 none, 1 as much as ddpm.  [default: the recipe's, else 0]",
    ),
    int_option("--seed", 0, "Seed of the noise; an image depends on it and on its number.", default=0),
    int_option("--batch-size", 1, "Images at a time on a GPU; a CPU takes small groups of a fixed size.", 64),
    option("--guidance", default=1.0, help="Scale of classifier-free guidance; 1 means none."),
    click.option(
        "--clip/--no-clip",
        default=None,
        help="Clip x0 to [-1, 1] in each step.  [default: as the model needs]",
    ),
    option("--skip", type=click.Choice(["uniform", "quad"]), default="uniform", help="Spacing of timesteps."),
)

"""``bidm sample``: draw images from a packed file or an original checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bidm_cli.cli.checkpoint_options import Reading, reading_options
from bidm_cli.cli.conditions import condition_options, embed_prompts, prompt_options, take_conditions
from bidm_cli.cli.threads import threads_option
from bidm_cli.errors import BidmError
from bidm_cli.files import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from bidm_cli.diffusion.condition import ConditionSet
    from bidm_cli.diffusion.model import DiffusionModel
    from bidm_cli.sampling.drawing import Drawn
    from bidm_cli.sampling.folder import SampleFolder
    from bidm_cli.sampling.sample import Inputs, SamplingPlan

DEFAULT_COUNT = 64
_PLANNED = ("steps", "sampler", "eta", "seed", "guidance", "batch_size", "clip", "skip")
"""Options that :meth:`SamplingPlan.settle` takes."""


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-n",
    "n",
    type=click.IntRange(min=1),
    help="Number of images.  [default: 64, or what x-t, context or condition hold]",
)
@click.option("--steps", type=click.IntRange(min=1), help="Sampler steps.  [default: the recipe's, else 100]")
@click.option(
    "--sampler",
    type=click.Choice(["ddim", "ddpm", "dpm++"]),
    default="ddim",
    show_default=True,
    help="DDIM, ancestral, or DPM-Solver++(2M).",
)
@click.option(
    "--eta",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="DDIM's fresh noise: 0 none, 1 as ancestral.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Every seed and number is another image.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Images at a time on a GPU; a CPU takes small groups of a fixed size.",
)
@click.option("--label", help='Class: a number, several ("1,5,7", dealt out in turn), or "all".')
@click.option(
    "--guidance",
    type=float,
    default=1.0,
    show_default=True,
    help="Scale of classifier-free guidance; 1 is none.",
)
@click.option("--prompt", multiple=True, help="Text to draw; several are dealt out in turn.")
@click.option("--negative-prompt", help="What guidance leads away from.  [default: the empty prompt]")
@prompt_options
@condition_options
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ... or auto.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "numba", "cupy"]),
    default="auto",
    show_default=True,
    help="What runs the packed layers.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What stays float in a packed file, with cupy. Half moves fewer bytes and gives other images: "
    "rounding flips signs.",
)
@click.option("--x-t", type=click.Path(path_type=Path), help="Start noise, a .npy of [N, C, H, W].")
@click.option("--raw", is_flag=True, help="Also write samples.npy: the floats before decoding.")
@click.option("--npz", is_flag=True, help="Also write samples.npz: all images in one array (ADM layout).")
@click.option("--no-ema", is_flag=True, help="Use an original checkpoint's raw weights, not its averages.")
@reading_options
@click.option("--config", type=click.Path(path_type=Path), help="An original checkpoint's configuration.")
@click.option("--clip/--no-clip", default=None, help="Limit x0 to [-1, 1].  [default: as the model needs]")
@click.option(
    "--skip",
    type=click.Choice(["uniform", "quad"]),
    default="uniform",
    show_default=True,
    help="How timesteps are spaced.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder.  [default: samples/<name>, or samples/<name>-original]",
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run wrote to the folder.")
@threads_option
def command(model: Path, **options: Any) -> None:
    """Draw images from MODEL, a packed file or an original checkpoint.

    Writes numbered PNGs, a grid.png and a record of the settings. Each image depends only on the seed and its
    number; the same command again draws what is still missing.

    \b
      bidm sample digits.bidm -n 16 --steps 50
      bidm sample model.ckpt --label all --guidance 3 --out original
      bidm sample sd.ckpt --prompt "a lighthouse at night" --guidance 7.5
      bidm sample text.bidm --context prompts.npy --guidance 5
      bidm sample upscaler.bidm --condition small/
    """
    _sample(model, **options)


def _sample(path: Path, *, n: int | None, raw: bool, npz: bool, out: Path | None, **options: Any) -> None:
    from bidm_cli.data.condition_files import gather
    from bidm_cli.sampling.drawing import fill
    from bidm_cli.sampling.folder import SampleFolder
    from bidm_cli.sampling.images import is_decodable, no_images
    from bidm_cli.sampling.sample import SamplingPlan, default_steps

    model = _open(path, options)
    options["steps"] = options["steps"] or default_steps(model)
    given = take_conditions(options)
    prompt, empty = options["prompt"], options["negative_prompt"]
    texts = embed_prompts(given, prompt, empty, path, options["text_encoder"], options["tokenizer"])
    model, rows = gather(model, **texts)
    for note in rows.notes:
        click.echo(note)
    plan = SamplingPlan.settle(model, **{name: options[name] for name in _PLANNED})
    if not is_decodable(model) and not raw:
        raise BidmError(no_images(model.sample_shape[0]))
    n, cycle, inputs = _inputs(plan, rows, n, options)
    folder = SampleFolder(
        out or _default_folder(path, model),
        _record(path, plan, cycle, given, options),
        n,
        images=is_decodable(model),
        raw=raw,
        npz=npz,
        overwrite=options["overwrite"],
    )
    labels = None if inputs.labels is None else inputs.labels.tolist()
    _say(plan, folder, fill(folder, plan, inputs, labels))


def _open(path: Path, options: dict[str, Any]) -> DiffusionModel:
    from bidm_cli.cli.devices import choose_device
    from bidm_cli.cli.models import open_model
    from bidm_cli.packed.precision import use_precision

    model = open_model(
        path,
        config=options["config"],
        ema=not options["no_ema"],
        device=choose_device(options["device"]),
        backend=options["backend"],
        **options["reading"].kwargs(),
    )
    use_precision(model, options["precision"])
    return model


def _inputs(
    plan: SamplingPlan, rows: ConditionSet, n: int | None, options: dict[str, Any]
) -> tuple[int, list[int] | None, Inputs]:
    """(number of images, the classes that are dealt out, what each image is given)."""
    import torch

    from bidm_cli.sampling.sample import Inputs

    start = None if options["x_t"] is None else _load_start(options["x_t"], n)
    n = n or (len(start) if start is not None else len(rows) if len(rows) > 1 else DEFAULT_COUNT)
    cycle = _labels(plan.model, options["label"])
    labels = None if cycle is None else torch.tensor([cycle[i % len(cycle)] for i in range(n)])
    inputs = Inputs(start, labels, conditions=rows).checked(plan.model, n, len(plan.steps))
    return n, cycle, inputs


def _record(
    path: Path,
    plan: SamplingPlan,
    cycle: list[int] | None,
    given: dict[str, Path | None],
    options: dict[str, Any],
) -> dict[str, Any]:
    """All that the images depend on, under the names of the options; only the same continues a folder."""
    reading: Reading = options["reading"]
    sources = {"model": path, "config": options["config"], "x-t": options["x_t"]}
    sources |= {"text-encoder": options["text_encoder"]}
    sources |= {name.replace("_", "-"): source for name, source in given.items()}
    if reading.first_stage is not None:
        sources["first-stage"] = reading.first_stage
    return {
        **_hashes(sources),
        **_said(reading),
        "ema": not options["no_ema"],
        "label": cycle,
        # None, not "float32": folders of earlier versions have none.
        "precision": None if options["precision"] == "float32" else options["precision"],
        **{name: options[name] for name in ("steps", "sampler", "eta", "seed", "guidance", "skip")},
        "clip": plan.clip,
        "prompt": list(options["prompt"]) or None,
        "negative-prompt": options["negative_prompt"],
    }


def _say(plan: SamplingPlan, folder: SampleFolder, drawn: Drawn) -> None:
    what = f"{folder.n} {'images' if folder.images else 'arrays'} in {folder.path}"
    if not drawn.images:
        click.echo(f"Already complete: {what}")
        return
    if drawn.not_finite:
        click.echo(
            f"Warning: {drawn.not_finite} of {drawn.images} images hold values that are not finite", err=True
        )
    click.echo(f"{what}, all together in {folder.grid}" if folder.images else what)
    backend = getattr(plan.model, "backend", "torch")
    click.echo(
        f"Drew {drawn.images} with {len(plan.steps)} steps of {plan.sampler}, backend {backend} on "
        f"{plan.model.device}: {drawn.seconds / drawn.images:.3g} s an image"
    )


def _default_folder(path: Path, model: DiffusionModel) -> Path:
    """Of its own for an original: it often has the same name as the file packed from it."""
    packed = getattr(model, "recipe", None) is not None
    return Path("samples") / (path.stem if packed else f"{path.stem}-original")


def _said(reading: Reading) -> dict[str, Any]:
    """What ``--family`` and ``--set`` say, where they do."""
    said = {"family": reading.family, "set": {name: str(value) for name, value in reading.settings.items()}}
    return {name: value for name, value in said.items() if value}


def _load_start(path: Path, n: int | None) -> Tensor:
    """The first ``n`` (default: all) images' start noise."""
    import numpy as np
    import torch

    from bidm_cli.data.arrays import map_array

    array = map_array(path)
    if array.ndim != 4 or array.dtype.kind not in "fiu" or not len(array):
        raise BidmError(f"{path} must hold an array of numbers [N, C, H, W] for --x-t")
    if n is not None and n > len(array):
        raise BidmError(f"{path} holds start noise for {len(array)} images; -n asks for {n}")
    return torch.from_numpy(np.array(array[:n], dtype=np.float32))


def _labels(model: DiffusionModel, label: str | None) -> list[int] | None:
    """The classes to deal out, as ``--label`` gives them."""
    if label is None:
        return None
    if label == "all":
        classes = [i for i in range(model.num_classes or 0) if i != model.null_label]
        if not classes:
            raise BidmError("this model has no classes; leave out --label")
        return classes
    try:
        return [int(part) for part in label.split(",")]
    except ValueError:
        raise BidmError(f'--label {label!r} is not a number, a list like "1,5,7", or "all"') from None


def _hashes(sources: dict[str, Path | None]) -> dict[str, str | None]:
    return {name: None if path is None else _hash(path) for name, path in sources.items()}


def _hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's files."""
    if not path.is_dir():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()

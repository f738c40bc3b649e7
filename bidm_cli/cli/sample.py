"""``bidm sample``: draw images from a packed file or an original checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bidm_cli.cli import options as shared
from bidm_cli.cli.processes import processes_option
from bidm_cli.cli.prompts import TextOptions, embed_prompts, text_options
from bidm_cli.cli.threads import threads_option
from bidm_cli.cli.wording import echo
from bidm_cli.errors import BidmError
from bidm_cli.files import check_writable, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from bidm_cli.data.condition_files import ConditionSource
    from bidm_cli.diffusion.condition import ConditionSet
    from bidm_cli.diffusion.model import DiffusionModel
    from bidm_cli.parallel.processes import Processes
    from bidm_cli.sampling.folder import Drawn, SampleFolder
    from bidm_cli.sampling.options import SamplingOptions
    from bidm_cli.sampling.sample import Inputs, SamplingPlan

DEFAULT_COUNT = 64
RECORDED = ("steps", "sampler", "eta", "seed", "guidance", "skip")


@click.command("sample")
@shared.model_argument
@shared.int_option("-n", 1, "Number of images.  [default: that of --x-t, --context or --condition, else 64]")
@shared.sampling_options
@click.option("--label", help='Class: a number, several ("1,5,7", used in turn), or "all".')
@click.option("--prompt", multiple=True, help="Text to draw; several are used in turn.")
@click.option("--negative-prompt", help="Text that guidance leads away from.  [default: the empty prompt]")
@text_options
@shared.condition_options
@shared.device_option()
@shared.backend_option
@shared.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Type of the floats that remain in a packed file, on the cupy backend; on a CPU bfloat16 is for "
    "the products of attention alone, where the processor has a matrix unit. Half precision gives other "
    "images, because rounding flips signs.  [default: what the file's recipe says, else float32]",
)
@shared.path_option("--x-t", help="Noise to start from in place of the seed's, a .npy of [n, C, H, W].")
@click.option("--raw", is_flag=True, help="Also write samples.npy: the floats before decoding.")
@click.option("--npz", is_flag=True, help="Also write samples.npz: all images in one array (ADM layout).")
@shared.checkpoint_options
@shared.no_ema_option
@shared.strict_option
@shared.path_option("--out", help="Folder.  [default: samples/<name>, for originals samples/<name>-original]")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier run wrote to the folder.")
@threads_option
@processes_option("the same command draws what is missing")
def command(**options: Any) -> None:
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
    from bidm_cli.parallel.processes import joined

    chosen = _Command(**options)
    with joined(shared.choose_device(chosen.device)) as processes:
        _draw(chosen, processes)


def _draw(chosen: _Command, processes: Processes) -> None:
    """Draw what is missing, together with the other processes."""
    from bidm_cli.checkpoints.evidence import caveat_lines
    from bidm_cli.data.condition_files import gather
    from bidm_cli.sampling.images import is_decodable, no_images
    from bidm_cli.sampling.sample import SamplingPlan

    if chosen.out is not None and not chosen.out.exists():
        check_writable(chosen.out)  # before kernels are compiled
    model = chosen.open()
    source = embed_prompts(
        chosen.conditions, chosen.prompt, chosen.negative_prompt, chosen.model, chosen.text
    )
    model, conditions = gather(model, source)
    for note in conditions.notes:
        echo(note)
    plan = SamplingPlan.settle(model, chosen.sampling)
    if not is_decodable(model) and not chosen.raw:
        raise BidmError(no_images(model.sample_shape[0]))
    cycle = _labels(model, chosen.label)
    n, inputs = chosen.inputs(plan, conditions, cycle)
    folder = chosen.folder(plan, n, chosen.record(plan, cycle), processes)
    for line in caveat_lines(model) if folder.is_new else ():
        echo(line)
    _say(plan, folder, folder.fill(plan, inputs))


@dataclass(frozen=True)
class _Command:
    """Options of one ``bidm sample``."""

    model: Path
    n: int | None
    sampling: SamplingOptions
    label: str | None
    prompt: tuple[str, ...]
    negative_prompt: str | None
    text: TextOptions
    conditions: ConditionSource
    device: str
    backend: str
    precision: str | None
    x_t: Path | None
    raw: bool
    npz: bool
    loading: shared.CheckpointOptions
    out: Path | None
    overwrite: bool

    def open(self) -> DiffusionModel:
        from bidm_cli.cli.models import open_model
        from bidm_cli.packed.precision import precision_of, use_precision
        from bidm_cli.parallel.processes import device_of

        device = device_of(shared.choose_device(self.device))
        model = open_model(self.model, device=str(device), backend=self.backend, **self.loading.kwargs())
        use_precision(model, self.precision)
        _, reason = precision_of(model)
        if reason:
            echo(f"Note: attention's products are float32, not bfloat16: {reason}", err=True)
        return model

    def inputs(
        self, plan: SamplingPlan, conditions: ConditionSet, cycle: list[int] | None
    ) -> tuple[int, Inputs]:
        """(number of images; start noise, labels and conditions for them)."""
        import torch

        from bidm_cli.sampling.sample import Inputs

        start = None if self.x_t is None else _load_start(self.x_t, self.n)
        held = len(start) if start is not None else len(conditions) if len(conditions) > 1 else DEFAULT_COUNT
        n = self.n or held
        labels = None if cycle is None else torch.tensor([cycle[i % len(cycle)] for i in range(n)])
        return n, Inputs(start, labels, conditions=conditions).checked(plan.model, n, len(plan.steps))

    def folder(
        self, plan: SamplingPlan, n: int, record: dict[str, Any], processes: Processes
    ) -> SampleFolder:
        from bidm_cli.sampling.folder import SampleFolder
        from bidm_cli.sampling.images import is_decodable

        # An original gets a folder of its own: it often has the same name as the file packed from it.
        packed = getattr(plan.model, "recipe", None) is not None
        out = self.out or Path("samples") / (self.model.stem if packed else f"{self.model.stem}-original")
        images = is_decodable(plan.model)
        return SampleFolder(
            out,
            record,
            n,
            images=images,
            raw=self.raw,
            npz=self.npz,
            overwrite=self.overwrite,
            processes=processes,
        )

    def record(self, plan: SamplingPlan, cycle: list[int] | None) -> dict[str, Any]:
        """All that the images depend on, under the names of the options; only the same continues a folder."""
        from bidm_cli.packed.precision import precision_of

        precision, _ = precision_of(plan.model)
        loading, options = self.loading, plan.options
        sources = {"model": self.model, "config": loading.config, "x-t": self.x_t}
        sources["text-encoder"] = self.text.text_encoder
        sources |= {name.replace("_", "-"): source for name, source in vars(self.conditions).items()}
        if loading.first_stage is not None:
            sources["first-stage"] = loading.first_stage
        settings = {name: str(value) for name, value in loading.settings.items()}
        return {
            **{name: None if path is None else _hash(path) for name, path in sources.items()},
            **({"family": loading.family} if loading.family else {}),
            **({"set": settings} if settings else {}),
            "ema": loading.ema,
            "label": cycle,
            # None, not "float32": folders of earlier versions have none.
            "precision": None if precision == "float32" else precision,
            **{name: getattr(options, name) for name in RECORDED},
            "clip": plan.clip,
            "prompt": list(self.prompt) or None,
            "negative-prompt": self.negative_prompt,
        }


def _say(plan: SamplingPlan, folder: SampleFolder, drawn: Drawn) -> None:
    what = f"{folder.n} {'images' if folder.images else 'arrays'} in {folder.path}"
    if not drawn.images:
        echo(f"Already complete: {what}")
        return
    if drawn.not_finite:
        echo(
            f"Warning: {drawn.not_finite} of {drawn.images} images hold values that are not finite", err=True
        )
    echo(f"{what}, all together in {folder.grid}" if folder.images else what)
    backend = getattr(plan.model, "backend", "torch")
    echo(
        f"Drew {drawn.images} with {len(plan.steps)} steps of {plan.options.sampler}, backend {backend} on "
        f"{plan.model.device}: {drawn.seconds / drawn.images:.3g} s per image"
    )


def _load_start(path: Path, n: int | None) -> Tensor:
    """Start noise of the first ``n`` (default: all) images."""
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
    """Classes to deal out, as ``--label`` gives them."""
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


def _hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's files."""
    if not path.is_dir():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()

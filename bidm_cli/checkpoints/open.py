"""Open whatever a path names: a packed file, a checkpoint of any family, or a bare configuration.

model = open_model("model.bidm")        # or "model.ckpt", a folder, "hf://org/name", "config.yaml"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bidm_cli.checkpoints.checkpoint import Checkpoint
from bidm_cli.checkpoints.detect import (
    FIRST_STAGE,
    described,
    detect,
    families,
    family_named,
    read_config,
    sibling_config,
)
from bidm_cli.checkpoints.evidence import assumed, refuse_assumptions
from bidm_cli.checkpoints.families.diffusers import files
from bidm_cli.checkpoints.families.diffusers.files import is_part
from bidm_cli.checkpoints.family import Family, FirstStageAlone
from bidm_cli.checkpoints.first_stages.file import StageFile, join_first_stage, load_first_stage
from bidm_cli.checkpoints.neighbours import neighbour_of, options_in, refusal, settings_of
from bidm_cli.checkpoints.overrides import Settings, apply_settings
from bidm_cli.checkpoints.reading.config import CONFIG_SUFFIXES, Config
from bidm_cli.checkpoints.reading.hub import downloaded, is_hub_id
from bidm_cli.checkpoints.reading.schedules import has_zero_terminal_snr
from bidm_cli.checkpoints.reading.unpickle import existing_file, read_file, safetensors_metadata
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.errors import BidmError


def open_model(
    path: str | Path,
    config: str | Path | None = None,
    ema: bool = True,
    device: str = "cpu",
    backend: str = "auto",
    say: Callable[[str], None] = lambda text: None,
    strict: bool = False,
    **reading: Any,
) -> DiffusionModel:
    """Open a packed file (:class:`PackedModel`), a checkpoint or a bare configuration (:class:`Checkpoint`).

    A bare configuration's networks stay on the meta device.

    Args:
        config, ema: for checkpoints, as the other keywords of :func:`load_checkpoint` in ``reading``.
        backend: for packed files; its kernels are compiled here if they are not yet.
        say: gets the pieces of a line about compiling.
        strict: refuse a model about which something had to be assumed, packed files included.

    Raises:
        BidmError: no such file, or it cannot be opened.
    """
    model = _open_model(path, config, ema, device, backend, say, reading)
    if strict:
        refuse_assumptions(model, path)
    return model


def _open_model(
    path: str | Path,
    config: str | Path | None,
    ema: bool,
    device: str,
    backend: str,
    say: Callable[[str], None],
    reading: Mapping[str, Any],
) -> DiffusionModel:
    if not (is_hub_id(path) or Path(path).is_dir()):
        path = existing_file(path)
        if path.suffix == ".bidm" or "bidm" in (safetensors_metadata(path) or {}):
            if reading:
                raise BidmError(
                    f"{path} is a packed file, which says everything itself; leave out {_options(reading)}"
                )
            from bidm_cli.packed.format.read import load_packed

            packed = load_packed(path, device=device, backend=backend)
            packed.warm_up(say)
            return packed
        if path.suffix.lower() in CONFIG_SUFFIXES and not is_part(path):
            if config is not None:
                raise BidmError(f"{path} is a configuration itself; leave out `config`")
            if reading.keys() - {"settings"}:
                raise BidmError(f"{path} is a configuration without weights; leave out {_options(reading)}")
            return load_architecture(path, **reading)
    return load_checkpoint(path, config, ema, **reading).to(device)


def open_any(path: str | Path, strict: bool = False, **options: Any) -> DiffusionModel | StageFile:
    """As :func:`open_model`, or a first stage in a file of its own."""
    try:
        return open_model(path, strict=strict, **options)
    except FirstStageAlone:
        stage = load_first_stage(path)
    if strict:
        refuse_assumptions(stage, path)
    return stage


def _options(reading: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in reading)


def load_checkpoint(
    path: str | Path,
    config: str | Path | None = None,
    ema: bool = True,
    family: str | None = None,
    settings: Settings | None = None,
    first_stage: str | Path | None = None,
    strict: bool = False,
) -> Checkpoint:
    """Open an original checkpoint: a PyTorch file or .safetensors of a known family, or a diffusers folder.

    Weights come on the CPU, memory-mapped where the file allows it: it must not be overwritten in place while
    the model is in use. Half-precision ones become float32 when their network is first used.

    Args:
        config: the family's own YAML, or JSON with the original constructors' arguments. Without it, a
            configuration beside the file is used; without that, the weights tell the architecture.
        ema: use the averaged weights if there are any.
        family: take the file for one of this family ("ldm", "openai", ...), whatever its names say.
        settings: by name, in place of what the file, its configuration or a rule says (see
            :mod:`bidm_cli.checkpoints.overrides`).
        first_stage: a first stage in a file of its own (see :mod:`bidm_cli.checkpoints.first_stages.file`).
        strict: refuse a checkpoint about which something has to be assumed (see
            :mod:`bidm_cli.checkpoints.evidence`), in one error that lists it all.

    Raises:
        BidmError: no such file, damaged, unsafe, of no known family, a first stage alone, or its weights do
            not fit; assumptions, if ``strict``.
    """
    settings = settings or {}
    forced = None if family is None else family_named(family)
    chosen = None if config is None else read_config(config)
    if is_hub_id(path):
        path = downloaded(path)
    path = Path(path) if Path(path).is_dir() else existing_file(path)
    if path.is_dir() or is_part(path):
        checkpoint = _load_folder(path, chosen, ema, forced)
    else:
        checkpoint = _load_file(path, chosen, ema, forced, settings, first_stage is not None)
    if first_stage is not None:
        join_first_stage(checkpoint, load_first_stage(first_stage))
    checkpoint = _settled(checkpoint, settings)
    if strict:
        refuse_assumptions(checkpoint, path)
    return checkpoint


def _settled(checkpoint: Checkpoint, settings: Settings) -> Checkpoint:
    """``checkpoint`` with ``settings``.

    Raises:
        BidmError: noise is predicted at a step where nothing else is left, so that x0 is not defined there.
    """
    if settings:
        checkpoint = apply_settings(checkpoint, settings)
    defined = checkpoint.prediction != "epsilon" or not has_zero_terminal_snr(checkpoint.schedule)
    if not defined and "prediction" not in settings:
        raise BidmError(
            f"{checkpoint.source}: the schedule ends at zero terminal SNR (alpha-bar 0, as by "
            "rescale_betas_zero_snr), where the noise that this network is said to predict tells nothing of "
            "the image; such models predict v: say so with `settings` prediction=v, or keep the noise with "
            "prediction=epsilon"
        )
    return checkpoint


def _load_folder(path: Path, config: Config | None, ema: bool, forced: Family | None) -> Checkpoint:
    if path.is_dir() and forced is not None and not forced.reads_folders:
        raise BidmError(f"{path} is a folder, which only diffusers writes; name the file in it")
    family = next(family for family in families() if family.reads_folders)
    root = path if path.is_dir() else path.parent
    _check_config(config, family, root)
    with _located(root):
        checkpoint = family.load_folder(root, config, ema)
        _check_neighbours(root.name, checkpoint.evidence, family, forced, config, {}, files.settings(root))
        return checkpoint


def _load_file(
    path: Path, config: Config | None, ema: bool, forced: Family | None, settings: Settings, latent: bool
) -> Checkpoint:
    if "bidm" in (safetensors_metadata(path) or {}):
        raise BidmError(f"{path} is a packed file; open it with bidm_cli.load_packed")
    contents = read_file(path)
    detected = detect(contents, path, None if forced is None else forced.name)
    if detected.family == FIRST_STAGE.family:
        raise FirstStageAlone(path)
    family = family_named(detected.family)
    if forced is None:
        detected = family.settle(detected, lambda name: config or sibling_config(path, name, []), latent)
        family = family_named(detected.family)
    detected = replace(detected, settings=settings)
    _check_config(config, family, path)
    detected.evidence.extend(_container_notes(contents))
    config = config or sibling_config(path, family.name, detected.evidence)
    with _located(path):
        options = [*options_in(contents), *(files.settings(path.parent) if family.reads_folders else ())]
        names = detected.weights[0].tensors
        _check_neighbours(path.name, detected.evidence, family, forced, config, names, options)
        return family.load(detected, config, ema, path)


def _check_neighbours(
    name: str,
    notes: list[str],
    family: Family,
    forced: Family | None,
    config: Config | None,
    tensors: Iterable[str],
    options: Iterable[str],
) -> None:
    """Raise BidmError for a model that only looks like the family's; noted if the user says the family."""
    configured = () if config is None else settings_of(config.root.values)
    found = neighbour_of(name, [*configured, *options], tensors)
    if found is None:
        return
    if forced is None:
        raise refusal(found, family.name)
    notes.append(
        assumed(f"a model of diffusion, as `family` says, though it is {found[0].name} by {found[1]}")
    )


def _check_config(config: Config | None, family: Family, path: Path) -> None:
    if config is not None and not family.accepts(config):
        kind = "of no known family" if config.layout is None else f"for {described(config.layout)}"
        raise BidmError(
            f"{config.path} is {kind}, but {path} is of the family {family.name}; give the configuration "
            "that belongs to it"
        )


def load_architecture(path: str | Path, settings: Settings | None = None) -> Checkpoint:
    """Open a bare configuration: an LDM config.yaml, a ddim .yml or JSON of constructor arguments.

    The networks are on the meta device: shapes without memory.

    Raises:
        BidmError: no such file, no configuration of a known family, or its settings make no sense.
    """
    config = read_config(path)
    if config.layout is None:
        keys = ", ".join(map(str, config.root.values))[:200]
        raise BidmError(f"{path} is no configuration that bidm knows: top-level keys {keys}")
    if config.layout == FIRST_STAGE.family:
        known = ", ".join(family.signature.described for family in families())
        raise BidmError(
            f"{config.path} looks like {FIRST_STAGE.described}, which this version of bidm cannot load; it "
            f"loads {known}"
        )
    with _located(config.path):
        family = family_named(config.layout)
        _check_neighbours("", [], family, None, config, (), ())
        return _settled(family.from_config(config), settings or {})


@contextmanager
def _located(path: Path) -> Iterator[None]:
    """Put the path before messages without it."""
    try:
        yield
    except FirstStageAlone:
        raise
    except BidmError as error:
        raise error if str(error).startswith(str(path)) else BidmError(f"{path}: {error}") from error


def _container_notes(contents: Any) -> list[str]:
    """Facts that the file says about its making."""
    if not isinstance(contents, Mapping) or "pytorch-lightning_version" not in contents:
        return []
    numbers = [
        f"{name.replace('_', ' ')} {contents[name]}"
        for name in ("epoch", "global_step")
        if isinstance(contents.get(name), int)
    ]
    return [", ".join(["PyTorch Lightning file", *numbers])]

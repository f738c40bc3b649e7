"""Latents on disk: encoded once whatever the run, the same bytes with and without, damage and a full disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bidm_cli.distill import image_data, latents_cache
from bidm_cli.distill import trainer as trainer_module
from bidm_cli.distill.compress import compress
from bidm_cli.distill.image_data import ImageData
from bidm_cli.distill.latents_cache import LatentsCache, has_latents, latents_key, latents_limit, open_latents
from bidm_cli.distill.training_data import DataOptions
from bidm_cli.errors import BidmError
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Recipe
from tests.distill.conftest import TINY, make_latent_teacher, make_teacher

SHAPE = (3, 2, 2)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("BIDM_LATENTS_GIB", "1")


@pytest.fixture
def faces() -> Path:
    folder = Path("faces")
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def encodings(monkeypatch) -> list[int]:
    """Sizes of the batches that were encoded."""
    found: list[int] = []
    encode = image_data.DiffusionModel.encode

    def counted(model, images):
        found.append(len(images))
        return encode(model, images)

    monkeypatch.setattr(image_data.DiffusionModel, "encode", counted)
    return found


def kept() -> list[Path]:
    return sorted(Path("cache/bidm/latents").glob("*"))


def batch(data: ImageData, *indices: int) -> torch.Tensor:
    return data.batch(torch.tensor(indices), torch.Generator())[0]


def run(out: str, data: Path, steps: int = 6, **how) -> bytes:
    compress(
        make_latent_teacher(), Recipe.parse(TINY), out, data=data, steps=steps, trajectory_points=0, **how
    )
    return Path(out).read_bytes()


def make_cache(count: int = 10, limit: int = GIB, name: str = "a", say=lambda line: None) -> LatentsCache:
    return LatentsCache(Path(f"cache/bidm/latents/{name}.npy"), count, SHAPE, limit, say)


def test_cold_warm_without_and_resumed_runs_give_the_same_bytes(faces, encodings, monkeypatch):
    monkeypatch.setattr(trainer_module, "CHECKPOINT_EVERY_SECONDS", 0.0)
    without = run("without.bidm", faces, latents_cache=False)
    assert not kept()
    encodings.clear()
    cold = run("cold.bidm", faces)
    assert set(encodings) == {1} and len(encodings) <= 7 and len(kept()) == 1
    encodings.clear()
    assert run("warm.bidm", faces) == cold == without and not encodings
    steps = 0

    def kill(row):
        nonlocal steps
        steps += len(encodings) > 0  # not the look at the images
        if steps == 3:
            raise KeyboardInterrupt

    shutil.rmtree("cache")
    with pytest.raises(KeyboardInterrupt):
        run("resumed.bidm", faces, run_dir="r", reporter=Reporter(advance=kill))
    assert encodings
    assert run("resumed.bidm", faces, run_dir="r", resume=True) == cold
    assert len(encodings) <= 7


def test_other_runs_and_copies_of_the_data_encode_nothing(faces, encodings):
    whole = batch(ImageData(make_latent_teacher(), faces), *range(7))
    encodings.clear()
    shutil.copytree("faces", "elsewhere")
    recipe = TINY.replace("batch_size: 2", "batch_size: 3")
    teacher = make_latent_teacher()
    teacher.unet = make_teacher(5).unet  # another network with the same first stage
    compress(teacher, Recipe.parse(recipe), "x.bidm", data="elsewhere", seed=9, trajectory_points=0)
    assert torch.equal(batch(ImageData(teacher, "elsewhere"), *range(7)), whole)
    assert not encodings and len(kept()) == 1


@pytest.mark.parametrize("kept_bytes", [0, 2 << 30])
def test_an_epoch_encodes_each_image_once_whatever_the_size(faces, encodings, monkeypatch, kept_bytes):
    monkeypatch.setattr(image_data, "KEPT_BYTES", kept_bytes)
    data = ImageData(make_latent_teacher(), faces)
    assert torch.equal(batch(data, 3, 1, 3), batch(data, 3, 1, 3)) and len(encodings) == 2
    batch(data, *range(7))
    assert len(encodings) == 7


def test_what_is_encoded_with_does_not_change_the_latents(faces):
    """Neither other images of the batch nor their order, nor what was there before."""
    off = DataOptions(latents_cache=False)
    teacher = make_latent_teacher()
    whole = batch(ImageData(teacher, faces, options=off), *range(7))
    for order in ([6, 5, 4, 3, 2, 1, 0], [2], [0, 3, 5]):
        assert torch.equal(batch(ImageData(teacher, faces, options=off), *order), whole[order])


def test_the_key_sees_content_stage_scale_and_machine(faces, monkeypatch):
    key = latents_key(make_latent_teacher(), "x")
    assert key == latents_key(make_latent_teacher(), "x") != latents_key(make_latent_teacher(), "y")
    others = {
        latents_key(make_latent_teacher(seed=1), "x"),
        latents_key(make_latent_teacher(scale_factor=2), "x"),
    }
    larger = make_latent_teacher()
    larger.sample_shape = (1, 16, 16)
    others.add(latents_key(larger, "x"))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    others.add(latents_key(make_latent_teacher(), "x"))
    torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "__version__", "9")
    others.add(latents_key(make_latent_teacher(), "x"))
    assert len(others) == 5 and key not in others


def test_half_precision_that_is_kept_until_used_does_not_change_the_key():
    half = make_latent_teacher()
    half.first_stage.half()
    before = latents_key(half, "x")
    half.first_stage.float()
    assert latents_key(half, "x") == before


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm"])
def test_other_pixels_between_the_same_ends_are_encoded_anew(suffix):
    Path("a").mkdir()
    pixels = np.full((100, 100, 3), 255, np.uint8)
    file = Path(f"a/0.{suffix}")
    Image.fromarray(pixels).save(file)
    first = batch(ImageData(make_latent_teacher(), "a"), 0)
    pixels[30:60, 20:70] = 0
    before = file.stat().st_mtime_ns
    Image.fromarray(pixels).save(file)
    os.utime(file, ns=(before + 10**9, before + 10**9))
    assert not torch.equal(batch(ImageData(make_latent_teacher(), "a"), 0), first)


def test_arrays_of_other_layout_or_white_are_other_images():
    pixels = np.random.default_rng(0).integers(0, 9, (3, 3, 16, 3), dtype=np.uint8)
    found = []
    np.save("x.npy", pixels)
    found.append(batch(ImageData(make_latent_teacher(), "x.npy"), 0, 1, 2))
    np.save("x.npy", pixels.reshape(3, 3, 3, 16))
    found.append(batch(ImageData(make_latent_teacher(), "x.npy"), 0, 1, 2))
    for white in (9, 20):
        np.savez("x.npz", images=pixels, max_value=white)
        found.append(batch(ImageData(make_latent_teacher(), "x.npz"), 0, 1, 2))
    assert len(kept()) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_labels_are_no_part_of_it(faces, encodings):
    teacher = make_latent_teacher()
    batch(ImageData(teacher, faces), *range(7))
    teacher.num_classes = 7
    np.save("y.npy", np.arange(7))
    batch(ImageData(teacher, faces, options=DataOptions(data_labels="y.npy")), *range(7))
    assert len(encodings) == 7 and len(kept()) == 1


def test_stages_of_which_not_all_is_known_or_that_leave_pixels_have_none():
    model = make_latent_teacher()
    assert has_latents(model) and not has_latents(make_teacher())
    for stage in (None, {"kind": "value_range", "args": {}}):
        model.architecture["first_stage"] = stage
        assert not has_latents(model)


@pytest.mark.parametrize("kind", ["pixels", "off", "limit", "dry"])
def test_nothing_is_kept_where_nothing_is_to_be(kind, faces, monkeypatch):
    teacher = make_teacher() if kind == "pixels" else make_latent_teacher()
    if kind == "limit":
        monkeypatch.setenv("BIDM_LATENTS_GIB", "0")
    data = ImageData(teacher, faces, options=DataOptions(latents_cache=kind != "off"))
    if kind != "dry":
        batch(data, 0, 1)
    assert not kept()


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_a_limit_that_is_no_number_is_refused(text, faces, monkeypatch):
    monkeypatch.setenv("BIDM_LATENTS_GIB", text)
    with pytest.raises(BidmError, match=f"BIDM_LATENTS_GIB={text} is not a number of GiB"):
        ImageData(make_latent_teacher(), faces)
    monkeypatch.setenv("BIDM_LATENTS_GIB", "inf")
    assert latents_limit() > 1 << 59


def test_where_and_how_much_is_said_once(faces):
    said: list[str] = []
    data = ImageData(make_latent_teacher(), faces, reporter=Reporter(say=said.append))
    batch(data, 0)
    batch(data, 1)
    (line,) = said
    assert str(kept()[0].resolve()) in line and "for all 7 images" in line and "`latents_cache=False`" in line


def test_numpy_reads_the_file():
    cache = make_cache(4)
    latents = torch.randn(SHAPE)
    cache.write(2, latents)
    array = np.load(cache.path, mmap_mode="r")
    assert array.shape == (4,) and np.array_equal(array["latents"][2], latents)
    assert cache.path.stat().st_size == cache.whole


def test_holes_and_zeros_are_told_apart():
    cache = make_cache()
    cache.write(0, torch.zeros(SHAPE))
    assert cache.read(0) is not None and cache.read(1) is None and cache.read(9) is None


@pytest.mark.parametrize("place", ["latents", "check", "header", "cut", "long", "text", "moved"])
def test_damage_is_noticed_and_encoded_anew(place, faces, encodings):
    expected = batch(ImageData(make_latent_teacher(), faces), *range(7))
    (file,) = kept()
    content = bytearray(file.read_bytes())
    record = np.load(file).dtype.itemsize
    start = len(content) - 7 * record
    encodings.clear()
    if place == "moved":
        content[start : start + record] = content[start + record : start + 2 * record]
    elif place in ("latents", "check"):
        content[start + 3 * record + (5 if place == "latents" else record - 6)] ^= 1
    elif place == "header":
        content[:start] = bytes(start)
    else:
        content = {"cut": content[: start + 2 * record + 9], "long": content + b"more", "text": b"<html>"}[
            place
        ]
    file.write_bytes(content)
    assert torch.equal(batch(ImageData(make_latent_teacher(), faces), *range(7)), expected)
    assert len(encodings) == {"header": 0, "long": 0, "cut": 5, "text": 7}.get(place, 1)
    assert np.load(file)["latents"].shape[0] == 7
    encodings.clear()
    batch(ImageData(make_latent_teacher(), faces), *range(7))
    assert not encodings


def _fill(barrier, seed: int) -> None:
    cache = make_cache(200)
    barrier.wait()
    for i in np.random.default_rng(seed).permutation(200).tolist():
        if cache.read(i) is None:
            cache.write(i, torch.full(SHAPE, float(i)))


def test_processes_share_a_file():
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_fill, args=(barrier, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    cache = make_cache(200)
    assert all(torch.equal(cache.read(i), torch.full(SHAPE, float(i))) for i in range(200))


def test_what_one_process_writes_the_other_reads():
    first, second = make_cache(), make_cache()
    first.write(4, torch.ones(SHAPE))
    assert torch.equal(second.read(4), torch.ones(SHAPE))


def test_files_used_longest_ago_make_room(monkeypatch):
    monkeypatch.setattr(latents_cache, "ROOM_EVERY", 1)
    for age, name in enumerate("abc"):
        make_cache(name=name).write(0, torch.zeros(SHAPE))
        os.utime(f"cache/bidm/latents/{name}.npy", (10**9 + age, 10**9 + age))
    make_cache(name="a")  # used again
    size = kept()[0].stat().st_blocks * 512
    said: list[str] = []
    cache = make_cache(name="d", limit=3 * size, say=said.append)
    for i in range(10):
        cache.write(i, torch.zeros(SHAPE))
    assert [file.stem for file in kept()] == ["a", "d"] and not said


def test_beyond_the_limit_nothing_more_is_kept_and_training_goes_on(faces, monkeypatch):
    monkeypatch.setattr(latents_cache, "ROOM_EVERY", 1)
    monkeypatch.setenv("BIDM_LATENTS_GIB", "1e-9")
    said: list[str] = []
    whole = run("x.bidm", faces, reporter=Reporter(say=said.append))
    assert sum("BIDM_LATENTS_GIB" in line and "training goes on" in line for line in said) == 1
    monkeypatch.setenv("BIDM_LATENTS_GIB", "0")
    assert run("y.bidm", faces) == whole


@pytest.mark.parametrize("fault", ["write", "short", "open", "reserve", "home", "gone"])
def test_a_full_disk_is_said_once_and_training_goes_on(fault, faces, monkeypatch):
    expected = batch(
        ImageData(make_latent_teacher(), faces, options=DataOptions(latents_cache=False)), *range(7)
    )
    opened = latents_cache._opened

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, content):
            if fault == "short":
                return self.file.write(content[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken(*arguments):
        if fault == "open":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return Full(opened(*arguments))

    def no_home():
        raise RuntimeError("no home")

    monkeypatch.setattr(latents_cache, "ROOM_EVERY", 1)
    if fault in ("write", "short", "open"):
        monkeypatch.setattr(latents_cache, "_opened", broken)
    elif fault == "reserve":
        monkeypatch.setattr(latents_cache, "RESERVE", 1 << 60)
    elif fault == "home":
        monkeypatch.setattr(latents_cache, "cache_folder", no_home)
    said: list[str] = []
    data = ImageData(make_latent_teacher(), faces, reporter=Reporter(say=said.append))
    if fault == "gone":
        batch(data, 0)
        shutil.rmtree("cache")
    assert torch.equal(batch(data, *range(7)), expected) and torch.equal(batch(data, *range(7)), expected)
    stops = [line for line in said if "training goes on" in line]
    assert len(stops) == 1 and "\n" not in stops[0]
    words = {"reserve": "are free", "home": "no home folder", "gone": "was removed", "short": "is full"}
    assert words.get(fault, "No space left") in stops[0]


def test_low_space_removes_others_before_it_gives_up(monkeypatch):
    make_cache(name="old").write(0, torch.zeros(SHAPE))
    os.utime("cache/bidm/latents/old.npy", (1, 1))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: type("Usage", (), {"free": GIB * (1 + (len(kept()) == 1))})
    )
    make_cache(name="new").write(0, torch.zeros(SHAPE))
    assert [file.stem for file in kept()] == ["new"]


def test_what_takes_the_place_of_an_unreadable_image_is_not_kept(faces, monkeypatch):
    data = ImageData(make_latent_teacher(), faces)
    content = Path("faces/3.png").read_bytes()
    Path("faces/3.png").write_bytes(b"a moment of a bad disk")
    latents = batch(data, 3, 4)
    assert torch.equal(latents[0], latents[1])
    Path("faces/3.png").write_bytes(content)
    again = batch(ImageData(make_latent_teacher(), faces), 3, 4)
    assert torch.equal(again[1], latents[1]) and not torch.equal(again[0], again[1])


def test_a_place_that_cannot_be_written_is_said(monkeypatch):
    Path("cache").write_text("a file")
    said: list[str] = []
    assert open_latents("x", 3, SHAPE, GIB, said.append) is None
    assert len(said) == 1 and "not kept on disk" in said[0]


def test_the_command_takes_the_option(bidm, faces):
    assert "--no-latents-cache" in bidm("compress", "--help").out

import json
import sys
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from bidm_cli.cli.main import cli
from bidm_cli.diffusion.convention import SamplingConvention
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.errors import BidmError
from bidm_cli.networks.ddpm_unet import DDPMUNet
from bidm_cli.sampling.sample import SamplingPlan, sample


class Labelled(nn.Module):
    """A little network for 3x8x8 with four classes and a null label."""

    def __init__(self):
        super().__init__()
        self.body, self.embedding = nn.Conv2d(3, 3, 3, padding=1), nn.Embedding(5, 3)

    def forward(self, x, t, context=None, y=None):
        return self.body(x + self.embedding(y)[:, :, None, None])


def digits():
    torch.manual_seed(0)
    network = DDPMUNet(
        in_channels=1, out_channels=1, ch=32, ch_mult=[1, 2], num_res_blocks=1, attention_levels=[]
    ).eval()
    schedule = NoiseSchedule.linear(20, 1e-3, 0.2)
    return DiffusionModel("ddpm", network, (1, 8, 8), schedule, SamplingConvention(), {})


def classes():
    torch.manual_seed(0)
    schedule, convention = NoiseSchedule.linear(20, 1e-3, 0.2), SamplingConvention()
    return DiffusionModel(
        "openai", Labelled(), (3, 8, 8), schedule, convention, {}, null_label=4, num_classes=5
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder where the files a.ckpt and classes.ckpt open as the models above."""
    (tmp_path / "a.ckpt").write_bytes(b"a")
    (tmp_path / "classes.ckpt").write_bytes(b"classes")
    made = {"a.ckpt": digits(), "classes.ckpt": classes()}

    def open_model(path, config=None, ema=True, device="cpu", backend="auto"):
        if path.name not in made:
            raise BidmError(f"{path} does not exist")
        return made[path.name].to(device)

    monkeypatch.setitem(sys.modules, "bidm_cli.cli.models", SimpleNamespace(open_model=open_model, made=made))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bidm(*arguments):
    """Run ``bidm sample``; its output, or the error it ends with."""
    result = CliRunner().invoke(
        cli, ["sample", "--device", "cpu", *map(str, arguments)], standalone_mode=False
    )
    if result.exception is not None:
        raise result.exception
    return result.output


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_images_grid_and_arrays(folder):
    output = bidm("a.ckpt", "-n", 5, "--steps", 3, "--raw", "--npz")
    out = folder / "samples" / "a-original"
    names = {f"{i:06d}.png" for i in range(5)} | {"grid.png", "samples.npy", "samples.npz", "sample.json"}
    assert set(contents(out)) == names
    assert "samples/a-original" in output and "backend torch on cpu" in output and "s per image" in output
    raw = np.load(out / "samples.npy")
    assert raw.dtype == np.float32
    assert np.array_equal(raw, sample(digits(), n=5, steps=3).numpy())
    with np.load(out / "samples.npz") as arrays:
        expected = np.floor(np.clip((raw + 1) * 127.5, 0, 255) + 0.5).transpose(0, 2, 3, 1)
        assert np.array_equal(arrays["arr_0"], expected) and arrays.files == ["arr_0"]
        with Image.open(out / "000003.png") as png:
            assert np.array_equal(np.asarray(png), arrays["arr_0"][3, :, :, 0])
    with Image.open(out / "grid.png") as png:
        assert png.size == (3 * 64 + 16, 2 * 64 + 8)


def test_the_number_of_images_is_64(folder):
    bidm("a.ckpt", "--steps", 1, "--out", "x")
    assert len(list((folder / "x").glob("0*.png"))) == 64


def test_batch_size_and_interruptions_change_nothing(folder, monkeypatch):
    options = ("--steps", 3, "--eta", 1, "--seed", 4, "--raw", "--npz")
    bidm("a.ckpt", "-n", 40, *options, "--out", "whole")
    bidm("a.ckpt", "-n", 40, *options, "--batch-size", 7, "--out", "batches")
    assert contents(folder / "batches") == contents(folder / "whole")

    run, calls = SamplingPlan.run, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(SamplingPlan, "run", interrupted)
    with pytest.raises(click.Abort):
        bidm("a.ckpt", "-n", 40, *options, "--out", "parts")
    assert len(list((folder / "parts").glob("0*.png"))) == 32
    (folder / "parts" / "000007.png").unlink()
    assert "Drew 9 " in bidm("a.ckpt", "-n", 40, *options, "--out", "parts")
    assert contents(folder / "parts") == contents(folder / "whole")
    assert len(calls) == 4


def test_a_complete_folder_is_left_alone(folder):
    bidm("a.ckpt", "-n", 3, "--steps", 2)
    before = contents(folder / "samples" / "a-original")
    assert "Already complete: 3 images" in bidm("a.ckpt", "-n", 3, "--steps", 2)
    assert contents(folder / "samples" / "a-original") == before
    bidm("a.ckpt", "-n", 5, "--steps", 2)
    bidm("a.ckpt", "-n", 5, "--steps", 2, "--out", "whole")
    assert contents(folder / "samples" / "a-original") == contents(folder / "whole")


@pytest.mark.parametrize(
    "option, message",
    [
        (("--steps", 3), "steps 2, not 3"),
        (("--seed", 1), "seed 0, not 1"),
        (("--sampler", "dpm++"), r"sampler ddim, not dpm\+\+"),
        (("--clip",), "clip none, not rederive"),
        (("--no-ema",), "ema True, not False"),
        (("--skip", "quad"), "skip uniform, not quad"),
    ],
    ids=str,
)
def test_other_settings_need_another_folder(folder, option, message):
    common = ("a.ckpt", "-n", 2, "--steps", 2, "--out", "x")
    bidm(*common)
    before = contents(folder / "x")
    with pytest.raises(BidmError, match=f"{message}.*`out`.*`overwrite`"):
        bidm(*common, *option)
    assert contents(folder / "x") == before
    bidm(*common, *option, "--overwrite")
    assert contents(folder / "x") != before


def test_another_model_needs_another_folder(folder):
    bidm("a.ckpt", "-n", 2, "--steps", 2, "--out", "x")
    (folder / "a.ckpt").write_bytes(b"trained on")
    with pytest.raises(BidmError, match="another model"):
        bidm("a.ckpt", "-n", 2, "--steps", 2, "--out", "x")


def test_start_noise_from_a_file(folder):
    noise = torch.randn(4, 1, 8, 8)
    np.save(folder / "x.npy", noise.numpy())
    bidm("a.ckpt", "--steps", 3, "--x-t", "x.npy", "--raw", "--out", "x")
    expected = sample(digits(), steps=3, x_t=noise).numpy()
    assert np.array_equal(np.load(folder / "x" / "samples.npy"), expected)
    bidm("a.ckpt", "--steps", 3, "--x-t", "x.npy", "--raw", "--out", "y", "-n", 2)
    assert np.array_equal(np.load(folder / "y" / "samples.npy"), expected[:2])


@pytest.mark.parametrize(
    "label, dealt", [("2", [2] * 6), ("3,1", [3, 1] * 3), ("all", [0, 1, 2, 3, 0, 1]), ("4", [4] * 6)]
)
def test_labels_are_dealt_out_in_turn(folder, label, dealt):
    bidm(
        "classes.ckpt",
        "-n",
        6,
        "--steps",
        2,
        "--label",
        label,
        "--guidance",
        2,
        "--raw",
        "--npz",
        "--out",
        "x",
    )
    expected = sample(classes(), steps=2, labels=dealt, guidance=2.0).numpy()
    assert np.array_equal(np.load(folder / "x" / "samples.npy"), expected)
    with np.load(folder / "x" / "samples.npz") as arrays:
        assert arrays["arr_1"].tolist() == dealt and arrays["arr_0"].shape == (6, 8, 8, 3)


def test_the_recipes_sampler_is_the_default(folder):
    model = sys.modules["bidm_cli.cli.models"].made["a.ckpt"]
    model.recipe, model.backend = {"sampler": {"name": "dpm++", "steps": 5, "eta": 0.0}}, "numba"
    output = bidm("a.ckpt", "-n", 1)
    assert "5 steps of dpm++, backend numba" in output and (folder / "samples" / "a").is_dir()
    record = json.loads((folder / "samples" / "a" / "sample.json").read_text())["settings"]
    assert (record["sampler"], record["steps"], record["eta"]) == ("dpm++", 5, 0.0)
    model.recipe = {"sampler": {"name": "ddim", "steps": 5, "eta": 0.5}}
    bidm("a.ckpt", "-n", 1, "--out", "x")
    record = json.loads((folder / "x" / "sample.json").read_text())["settings"]
    assert (record["sampler"], record["steps"], record["eta"]) == ("ddim", 5, 0.5)
    assert "4 steps of ddpm" in bidm("a.ckpt", "-n", 1, "--sampler", "ddpm", "--steps", 4, "--out", "y")


def test_latents_without_a_decoder_give_floats_only(folder):
    model = sys.modules["bidm_cli.cli.models"].made["a.ckpt"]
    model.unet = DDPMUNet(
        in_channels=4, out_channels=4, ch=32, ch_mult=[1], num_res_blocks=1, attention_levels=[]
    ).eval()
    model.sample_shape = (4, 8, 8)
    with pytest.raises(BidmError, match="`raw`"):
        bidm("a.ckpt", "-n", 2, "--steps", 2, "--out", "x")
    assert not (folder / "x").exists()
    assert "2 arrays" in bidm("a.ckpt", "-n", 2, "--steps", 2, "--raw", "--out", "x")
    assert set(contents(folder / "x")) == {"samples.npy", "sample.json"}


def test_images_that_explode_are_reported(folder, capsys):
    model = sys.modules["bidm_cli.cli.models"].made["a.ckpt"]
    with torch.no_grad():
        model.unet.conv_out.bias.fill_(float("nan"))
    assert "2 of 2 images hold values that are not finite" in bidm("a.ckpt", "-n", 2, "--steps", 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("none.ckpt",), "none.ckpt"),
        (("a.ckpt", "--steps", 21), "1 to 20"),
        (("a.ckpt", "--label", 1), "no classes"),
        (("a.ckpt", "--label", "all"), "no classes"),
        (("a.ckpt", "--guidance", 2), "null label"),
        (("a.ckpt", "--eta", 1, "--sampler", "ddpm"), "belongs to ddim"),
        (("classes.ckpt",), "give `labels`"),
        (("classes.ckpt", "--label", 5), "0 to 4"),
        (("classes.ckpt", "--label", "cat"), "not a number"),
        (("a.ckpt", "--device", "abacus"), "abacus"),
        (("a.ckpt", "--x-t", "flat.npy"), "[N, C, H, W]"),
        (("a.ckpt", "--x-t", "wide.npy"), "[2, 1, 8, 8]"),
        (("a.ckpt", "--x-t", "a.ckpt"), "not a .npy"),
        (("a.ckpt", "--x-t", "words.npy"), "array of numbers"),
        (("a.ckpt", "--x-t", "objects.npy"), "not a .npy"),
        (("a.ckpt", "--x-t", "wide.npy", "-n", 3), "for 2 images"),
        (("a.ckpt", "--out", "a.ckpt"), "is a file"),
        (("a.ckpt", "--out", "a.ckpt/x"), "cannot write"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, arguments, message):
    np.save("flat.npy", np.zeros(3))
    np.save("wide.npy", np.zeros((2, 1, 8, 9)))
    np.save("words.npy", np.full((1, 1, 8, 8), "a"))
    np.save("objects.npy", np.full((1, 1, 8, 8), None), allow_pickle=True)
    before = {file.name for file in folder.iterdir()}
    with pytest.raises((BidmError, OSError)) as caught:
        bidm(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert {file.name for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    "option", [("-n", 0), ("--steps", 0), ("--eta", 2), ("--sampler", "x"), ("--seed", -1)]
)
def test_impossible_values_are_usage_errors(folder, option):
    with pytest.raises(click.UsageError):
        bidm("a.ckpt", *option)

"""Original checkpoints give their original results: ../shared/checkpoints, to 1e-4 of the largest value."""

import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import bidm_cli
from bidm_cli.checkpoints.reading.unpickle import read_file
from bidm_cli.cli.main import cli
from tests.sampling.conftest import SHARED

RUNS = {
    # folder: file, start noise, result, options of sample(), options of bidm sample
    "ldm_unconditional_vq4": ("model.ckpt", "ddim_xT", "ddim10_out", {}, ()),
    "ldm_class_conditional": (
        "model.ckpt",
        "ddim_xT",
        "ddim10_out",
        {"labels": 4, "guidance": 3.0},
        ("--label", "4", "--guidance", "3", "--set", "null_label=10"),
    ),
    "ddpm_ermongroup": ("ckpt.pth", "ddim10_xT", "ddim10_out", {}, ()),
    "ddpm_ermongroup quad": (
        "ckpt.pth",
        "ddim10_xT",
        "ddim10quad_out",
        {"skip": "quad"},
        ("--skip", "quad"),
    ),
}


@pytest.fixture(params=RUNS)
def run(request, reference):
    """(checkpoint's path, reference arrays, start noise, expected result, the two kinds of options)."""
    file, start, result, options, arguments = RUNS[request.param]
    name = request.param.split()[0]
    arrays = reference(name)
    return SHARED / name / file, arrays, arrays[start], arrays[result], options, arguments


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_ddim_and_decoding(run):
    path, arrays, start, expected, options, _ = run
    # The reference was guided by its last row, which nothing in the file says.
    settings = {"null_label": 10} if "guidance" in options else {}
    checkpoint = bidm_cli.load_checkpoint(path, settings=settings)
    latents = bidm_cli.sample(checkpoint, steps=10, x_t=torch.from_numpy(start), **options)
    assert_close(latents.numpy(), expected)
    if "ddim10_image" in arrays:
        assert_close(checkpoint.decode(latents).numpy(), arrays["ddim10_image"])


def test_the_label_is_the_references(reference):
    arrays = reference("ldm_class_conditional")
    path = SHARED / "ldm_class_conditional" / "model.ckpt"
    checkpoint = bidm_cli.load_checkpoint(path, settings={"null_label": 10})
    for label, name in ((4, "cond"), (checkpoint.null_label, "uncond")):
        context, _ = checkpoint.embed_labels(torch.tensor([label, label]))
        assert_close(context.detach().numpy(), arrays[name])


@pytest.mark.parametrize("has_embedder", [True, False])
def test_a_given_context_gives_the_same(reference, tmp_path, has_embedder):
    """The class model's embeddings as files: with its embedder, and as a model that has none of its own."""
    arrays, folder = reference("ldm_class_conditional"), SHARED / "ldm_class_conditional"
    path = folder / "model.ckpt"
    if not has_embedder:
        state = read_file(path)["state_dict"]
        path = tmp_path / "model.ckpt"
        torch.save({k: v for k, v in state.items() if not k.startswith("cond_stage_model")}, path)
        shutil.copy(folder / "config.yaml", tmp_path / "config.yaml")
    np.save(tmp_path / "x.npy", arrays["ddim_xT"])
    np.savez(tmp_path / "cond.npz", context=arrays["cond"])
    save_file({"embeddings": torch.from_numpy(arrays["uncond"][0])}, str(tmp_path / "uncond.safetensors"))
    command = [
        "sample",
        str(path),
        "--x-t",
        str(tmp_path / "x.npy"),
        "--raw",
        "--steps",
        "10",
        "--guidance",
        "3",
    ]
    command += ["--context", str(tmp_path / "cond.npz"), "--device", "cpu", "--out", str(tmp_path / "out")]
    if has_embedder:
        command += ["--set", "null_label=10"]
    else:
        command += ["--unconditional-context", str(tmp_path / "uncond.safetensors")]
    CliRunner().invoke(cli, command, catch_exceptions=False)
    assert_close(np.load(tmp_path / "out" / "samples.npy"), arrays["ddim10_out"])
    latents = bidm_cli.sample(
        bidm_cli.load_checkpoint(path),
        steps=10,
        x_t=torch.from_numpy(arrays["ddim_xT"]),
        context=torch.from_numpy(arrays["cond"]),
        unconditional_context=torch.from_numpy(arrays["uncond"][0]),
        guidance=3.0,
    )
    assert_close(latents.numpy(), arrays["ddim10_out"])


def test_the_first_step_of_ermongroup(reference):
    arrays = reference("ddpm_ermongroup")
    checkpoint = bidm_cli.load_checkpoint(SHARED / "ddpm_ermongroup" / "ckpt.pth")
    from bidm_cli.sampling.prediction import estimate

    x, t = torch.from_numpy(arrays["ddim10_xT"]), 900
    with torch.no_grad():
        output = checkpoint.denoise(x, torch.tensor([t, t]))
    found = estimate(checkpoint.prediction, x, output, float(checkpoint.schedule.alphas_cumprod[t]))
    assert_close(found.x0.numpy(), arrays["ddim10_first_x0"])


def test_the_command(run, tmp_path):
    path, arrays, start, expected, _, arguments = run
    np.save(tmp_path / "x.npy", start)
    command = ["sample", str(path), "--x-t", str(tmp_path / "x.npy"), "--raw", "--npz", "--steps", "10"]
    command += ["--device", "cpu", "--out", str(tmp_path / "out"), *arguments]
    CliRunner().invoke(cli, command, standalone_mode=False, catch_exceptions=False)
    assert_close(np.load(tmp_path / "out" / "samples.npy"), expected)
    with np.load(tmp_path / "out" / "samples.npz") as made:
        images = made["arr_0"]
        labels = made["arr_1"].tolist() if "arr_1" in made else None
    assert labels == ([4, 4] if arguments[:1] == ("--label",) else None)
    decoded = arrays.get("ddim10_image", expected)
    scaled = np.clip((decoded + 1) * 127.5, 0, 255).transpose(0, 2, 3, 1)
    assert np.abs(images - scaled).max() <= 1.01  # one step of the rounding

"""Binary decoders of first stages, from the recipe to the packed file and back to pictures."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bidm_cli.binary.first_stage import binary_decoder, planned_decoder
from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.checkpoints.export import export_checkpoint, first_stage_line
from bidm_cli.checkpoints.open import load_checkpoint
from bidm_cli.cli.compress import _first_stage_line
from bidm_cli.diffusion.model import DiffusionModel
from bidm_cli.distill import trainer as trainer_module
from bidm_cli.distill.compress import compress
from bidm_cli.distill.first_stage.objective import gradient_loss
from bidm_cli.distill.first_stage.trainer import DecoderTrainer
from bidm_cli.distill.parallel.recompute import recomputed
from bidm_cli.errors import BidmError
from bidm_cli.networks.registry import build
from bidm_cli.packed.format.container import read_packed, write_packed
from bidm_cli.packed.format.first_stage import StageForm
from bidm_cli.packed.format.read import load_packed
from bidm_cli.packed.format.write import pack_model
from bidm_cli.packed.layers import PackedGroupNorm, PackedLayer
from bidm_cli.progress import Reporter
from bidm_cli.recipe import Recipe
from bidm_cli.report.cost.cost import cost
from bidm_cli.report.dry_run import describe
from bidm_cli.report.inspection import Inspection
from bidm_cli.sampling.sample import sample
from tests.distill.conftest import TINY, make_teacher
from tests.packed.format.test_first_stage import STAGES, latent_model

SHARED = Path(__file__).resolve().parents[4] / "shared" / "checkpoints"
RULES = """
first_stage:
  keep: {keep}
  weights: {weights}
  layers:
    - {{role: [stem, head], keep: float}}
    - {{role: [conv, skip, resample], binarize: {{planes: {planes}}}}}
    - {{role: "*", binarize: {{activation_scale: none, shortcut: none, planes: {planes}}}}}
  train: {{steps: {steps}, batch_size: 2, warmup: 1, ema: 0.9, lr: 1.0e-3, lr_binary: 1.0e-3}}
"""


def recipe_of(keep: str = "decoder", weights: str = "int8", planes: int = 2, steps: int = 4) -> Recipe:
    text = TINY.replace("steps: 4", "steps: 2") + "distill: {loss: none}\n"
    return Recipe.parse(
        text + RULES.format(keep=keep, weights=weights, planes=planes, steps=steps), "my.yaml"
    )


def student_of(model: DiffusionModel, recipe: Recipe) -> DiffusionModel:
    """Model with a binary decoder, untrained but for its planes' numbers."""
    decoder = binary_decoder(model.first_stage, recipe)
    assert decoder is not None
    with torch.no_grad():
        for layer in decoder.network.modules():
            if isinstance(layer, BinaryLayer):
                assert layer.threshold is not None
                layer.threshold.copy_(torch.randn_like(layer.threshold) * 0.2)
    decoder.network.take_encoder(model.first_stage)  # type: ignore[arg-type]
    student = copy.copy(model)
    student.first_stage = decoder.network
    return student


def as_stored(stage: nn.Module, form: StageForm) -> nn.Module:
    """The simulation with floats as the file has them: those of binary layers and norms in half precision."""
    stage = copy.deepcopy(stage)
    kinds = {name: kind for name, _, kind in form.plan(stage)}
    with torch.no_grad():
        for name, value in stage.state_dict().items():
            if kinds.get(name) is torch.float16:
                value.copy_(value.half().float())
    return stage


@pytest.mark.parametrize(
    ("name", "planes", "backend"),
    [*((name, 2, "torch") for name in STAGES), ("kl", 1, "torch"), ("kl", 3, "torch"), ("vq", 2, "numba")],
)
def test_packed_decoders_draw_what_the_simulation_draws(name, planes, backend, tmp_path):
    recipe = recipe_of("both", "float16", planes)
    student = student_of(latent_model(name), recipe)
    write_packed(tmp_path / "m.bidm", *pack_model(student, recipe.to_json()))
    opened = load_packed(tmp_path / "m.bidm", backend=backend)
    packed = {n for n, m in opened.first_stage.named_modules() if isinstance(m, PackedLayer)}
    assert packed == {n for n, m in student.first_stage.named_modules() if isinstance(m, BinaryLayer)}
    form = StageForm.of(student, recipe.to_json())
    z, images = torch.randn(2, 4, 8, 8), torch.rand(1, 3, 16, 16) * 2 - 1
    simulated = copy.copy(student)
    simulated.first_stage = as_stored(student.first_stage, form)
    with torch.no_grad():
        # Scales of weights are rounded in the file: the packed layer's own are taken.
        for layer, module in simulated.first_stage.named_modules():
            if isinstance(module, BinaryLayer):
                scale = opened.first_stage.get_submodule(layer).weight_scale
                module.weight_scale = lambda scale=scale: scale
        first, second = opened.decode(z), simulated.decode(z)
    if backend == "torch":
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    else:
        # A sign next to its threshold may flip, which moves what comes after.
        assert float((first - second).abs().median()) < 1e-4
    torch.testing.assert_close(opened.encode(images), student.encode(images), atol=0.05, rtol=0.05)
    assert not any(
        isinstance(m, (PackedLayer, PackedGroupNorm)) for m in opened.first_stage.encoder.modules()
    )
    assert sample(opened, n=1, steps=2).shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("name", "weights"),
    [*((name, "int8") for name in STAGES), *(("kl", kind) for kind in ("int6", "float16", "float32"))],
)
def test_the_file_has_bits_and_says_so(name, weights, tmp_path):
    recipe = recipe_of("decoder", weights)
    model = latent_model(name)
    student = student_of(model, recipe)
    metadata, tensors = pack_model(student, recipe.to_json())
    write_packed(tmp_path / "m.bidm", metadata, tensors)
    assert {"binary_first_stage", "decoder", "planes"} <= set(metadata["requires"])
    stage = {key: t for key, t in tensors.items() if key.startswith("first_stage.")}
    assert not any(".encoder." in key or ".quant_conv." in key for key in stage)
    records = metadata["first_stage"]["layers"]
    binary = [record["name"] for record in records if record["kind"] == "binary"]
    assert len(binary) > 8 and "decoder.conv_in" not in binary and "decoder.conv_out" not in binary
    assert "post_quant_conv" not in binary
    for layer in binary:
        assert stage[f"first_stage.{layer}.weight_bits"].dtype == torch.uint8
        assert f"first_stage.{layer}.weight" not in stage
    measured, planned = cost(load_packed(tmp_path / "m.bidm", backend="torch")), cost(model, recipe)
    assert measured.decoder is not None and planned.decoder is not None
    assert measured.parts[0].packed_bytes == sum(t.numel() * t.element_size() for t in stage.values())
    assert planned.parts[0] == measured.parts[0]
    assert planned.decoder.packed_bytes == measured.decoder.packed_bytes == measured.parts[0].packed_bytes
    assert planned.decoder.ops == measured.decoder.ops < planned.decoder.macs
    assert planned.decoder.binary_layers == len(binary)


@pytest.mark.parametrize(
    "damage",
    [
        lambda m, t: m["first_stage"].update(layers="none"),
        lambda m, t: m["first_stage"].update(layers=[{"name": "decoder.conv_in"}]),
        lambda m, t: m["first_stage"].pop("layers"),
        lambda m, t: m["first_stage"]["layers"].pop(3),
        lambda m, t: m["first_stage"]["layers"].append(m["first_stage"]["layers"][3]),
        lambda m, t: m["first_stage"]["layers"][3].update(name="decoder.nothing"),
        lambda m, t: m["first_stage"]["layers"][3]["spec"].update(planes=3),
        lambda m, t: m["first_stage"]["layers"][3]["geometry"].update(in_channels=7),
        lambda m, t: t.pop("first_stage.decoder.mid.block_1.conv1.weight_bits"),
        lambda m, t: t.pop("first_stage.decoder.mid.block_1.conv1.threshold"),
        lambda m, t: t.update(
            {"first_stage.decoder.conv_in.weight_bits": torch.zeros(2, 2, dtype=torch.uint8)}
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused(damage, tmp_path):
    recipe = recipe_of()
    metadata, tensors = pack_model(student_of(latent_model(), recipe), recipe.to_json())
    metadata = json.loads(json.dumps(metadata))
    with pytest.raises(BidmError) as caught:
        damage(metadata, tensors)
        write_packed(tmp_path / "m.bidm", metadata, tensors)
        load_packed(tmp_path / "m.bidm", backend="torch")
    assert "\n" not in str(caught.value)


def test_post_quant_conv_is_binary_only_by_its_name():
    text = "name: x\nlayers:\n  - {role: conv, binarize: {}}\nfirst_stage:\n  layers:\n"
    stage = latent_model().first_stage

    def binary(rules: str) -> set[str]:
        return {p.name for p in planned_decoder(stage, Recipe.parse(text + rules)) if p.spec is not None}

    all_by_role = binary("    - {role: '*', binarize: {}}\n")
    assert "post_quant_conv" not in all_by_role and "decoder.conv_in" in all_by_role
    assert not any(name.startswith(("encoder", "quant_conv")) for name in all_by_role)
    by_name = binary("    - {name: post_quant_conv, binarize: {}}\n    - {role: conv, binarize: {}}\n")
    assert "post_quant_conv" in by_name and "decoder.conv_in" not in by_name
    with pytest.raises(BidmError, match=r"line 6: the rule for encoder\.\* decides no layer"):
        planned_decoder(stage, Recipe.parse(text + "    - {name: 'encoder.*', binarize: {}}\n"))


@pytest.fixture
def latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    np.save("latents.npy", np.random.default_rng(0).standard_normal((6, 4, 8, 8)).astype("float32"))
    return "latents.npy"


def float_model(name: str = "kl") -> DiffusionModel:
    model = latent_model(name)
    model.unet = build(model.architecture["unet"])
    return model


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["network", "decoder", "before packing"])
def test_a_killed_run_resumes_to_the_same_bytes(moment, latents, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "CHECKPOINT_EVERY_SECONDS", 0.0)
    options: dict[str, Any] = {"data": latents, "trajectory_points": 0}
    compress(float_model(), recipe_of(), "whole.bidm", run_dir="whole", **options)
    if moment == "before packing":
        monkeypatch.setattr(
            "bidm_cli.distill.compression.pack_model", lambda *_: (_ for _ in ()).throw(Killed)
        )
    seen = {"stage": 0, "steps": 0}

    def stage(name: str, total: int) -> None:
        seen.update(stage=seen["stage"] + 1, steps=0)

    def advance(row: Any) -> None:
        seen["steps"] += 1
        last = {"network": (1, 2), "decoder": (2, 3)}.get(moment)
        if (seen["stage"], seen["steps"]) == last:
            raise Killed

    with pytest.raises(Killed):
        reporter = Reporter(stage=stage, advance=advance)
        compress(float_model(), recipe_of(), "a.bidm", run_dir="broken", reporter=reporter, **options)
    assert not Path("a.bidm").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    compress(float_model(), recipe_of(), "whole2.bidm", run_dir="broken", resume=True, **options)
    assert Path("whole2.bidm").read_bytes() == Path("whole.bidm").read_bytes()
    logs = [(Path(run) / "first-stage" / "log.csv").read_bytes() for run in ("whole", "broken")]
    assert logs[0] == logs[1] and logs[0].startswith(b"step,loss,pixel_loss,gradient_loss,gradient_norm,lr")


def test_recomputed_blocks_of_a_decoder_change_nothing(latents):
    for name, recompute in (("kept", False), ("again", True)):
        more: dict[str, Any] = {"run_dir": name, "checkpoint_activations": recompute}
        compress(float_model(), recipe_of(), f"{name}.bidm", data=latents, trajectory_points=0, **more)
    tensors = [read_packed(f"{name}.bidm")[1] for name in ("kept", "again")]
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    decoder = binary_decoder(float_model().first_stage, recipe_of()).network
    with recomputed(decoder):
        assert sum("forward" in vars(module) for module in decoder.modules()) >= 3


def test_a_run_with_another_decoder_does_not_resume(latents):
    compress(float_model(), recipe_of(), "a.bidm", data=latents, run_dir="run", trajectory_points=0)
    with pytest.raises(BidmError, match=r"first_stage\.train\.steps 4, now 5"):
        compress(float_model(), recipe_of(steps=5), "b.bidm", data=latents, run_dir="run", resume=True)


@pytest.mark.parametrize("name", STAGES)
def test_distillation_comes_nearer_and_leaves_codes_and_encoder_alone(name, latents):
    model = float_model(name)
    before = {key: value.clone() for key, value in model.first_stage.state_dict().items()}
    few, many = (
        compress(copy.copy(model), recipe_of(steps=n), f"{n}.bidm", data=latents, trajectory_points=0)
        for n in (0, 40)
    )
    assert many.first_stage["psnr"] > few.first_stage["psnr"]
    assert all(torch.equal(value, before[key]) for key, value in model.first_stage.state_dict().items())
    tensors = read_packed("40.bidm")[1]
    for key in ("quantize.embedding.weight",) if "vq" in name else ():
        assert torch.equal(tensors[f"first_stage.{key}"], before[key])
    line = _first_stage_line(many.first_stage)
    assert "layers binary, int8" in line and "dB PSNR" in line and "\n" not in line
    opened = load_packed("40.bidm", backend="torch")
    assert opened.training["first_stage"]["steps"] == 40
    assert "layers binary" in Inspection.of(opened, Path("40.bidm")).to_text()


def test_the_data_free_run_and_the_progressive_decoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shares: list[set[float]] = []
    step = DecoderTrainer._one_step

    def noting(self: DecoderTrainer, targets: Any) -> Any:
        found = step(self, targets)
        layers = [m for m in self.student.unet.modules() if isinstance(m, BinaryLayer)]
        shares.append({layer.binary_share for layer in layers})
        return found

    monkeypatch.setattr(DecoderTrainer, "_one_step", noting)
    recipe = recipe_of().override("train", synthetic_images=2, synthetic_steps=2)
    compress(float_model(), recipe, "a.bidm", trajectory_points=0)
    assert [share for (share,) in shares] == pytest.approx([0, 1 / 1.6, 1, 1])


def test_a_model_without_a_first_stage_says_that_the_rules_are_of_no_use(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    reporter = Reporter(say=said.append)
    result = compress(
        make_teacher(), recipe_of(), "a.bidm", data=images, trajectory_points=0, reporter=reporter
    )
    assert result.first_stage is None and any("first_stage.layers" in line for line in said)
    assert "binary_first_stage" not in read_packed("a.bidm")[0].get("requires", [])


def test_an_export_leaves_a_binary_decoder_out(tmp_path):
    recipe = recipe_of("both")
    write_packed(tmp_path / "m.bidm", *pack_model(student_of(latent_model(), recipe), recipe.to_json()))
    opened = load_packed(tmp_path / "m.bidm", backend="torch")
    line = first_stage_line(opened)
    assert "left out" in line and "a binary decoder" in line and "\n" not in line
    export_checkpoint(opened, tmp_path / "float.ckpt")
    back = load_checkpoint(tmp_path / "float.ckpt")
    assert back.first_stage is None and back.is_latent


def test_steps_of_the_decoder_as_an_option(latents):
    options: dict[str, Any] = {"data": latents, "trajectory_points": 0}
    compress(float_model(), recipe_of(), "a.bidm", decoder_steps=1, **options)
    training = load_packed("a.bidm", backend="torch").training
    assert training["first_stage"]["steps"] == 1 and training["final"]["step"] == 2
    with pytest.raises(BidmError, match="`decoder_steps` is for a binary first stage"):
        compress(float_model(), Recipe.parse(TINY, "my.yaml"), "b.bidm", decoder_steps=1, **options)


def test_the_dry_run_counts_the_decoder_s_training():
    text = describe(float_model(), recipe_of(steps=7), Path("m.ckpt"))
    assert "decoder  7 steps of 2" in text


def test_an_optimizer_that_there_is_not_is_named_before_training(latents):
    text = RULES.format(keep="decoder", weights="int8", planes=1, steps=1).replace(
        "steps: 1", "optimizer: adamx"
    )
    with pytest.raises(BidmError, match=r"my\.yaml, line \d+: first_stage\.train\.optimizer.*adamx"):
        compress(float_model(), Recipe.parse(TINY + text, "my.yaml"), "a.bidm", data=latents)


def test_gradient_loss_is_that_of_neighbours():
    a, b = torch.zeros(1, 1, 2, 3), torch.tensor([[[[0.0, 1, 3], [0, 0, 0]]]])
    rows, columns = (0 + 1 + 3) / 3, (1 + 2 + 0 + 0) / 4
    assert float(gradient_loss(a, b)) == pytest.approx(rows + columns)


CHECKPOINTS = {
    "ldm4_peeps": "ldm4_peeps/ldm4_peeps.ckpt",
    "vq": "ldm_unconditional_vq4",
    "vq with classes": "ldm_class_conditional",
    "diffusers": "diffusers_ldm_vq",
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared checkpoints")
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shared_checkpoints_have_binary_decoders(name, tmp_path):
    place = SHARED / CHECKPOINTS[name]
    files = sorted(place.glob("*.ckpt")) if place.is_dir() and name != "diffusers" else [place]
    model = load_checkpoint(files[0])
    recipe = Recipe.load("w1a2-decoder")
    decoder = binary_decoder(model.first_stage, recipe)
    assert decoder is not None
    z = torch.randn(1, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    assert decoder.network.decode(z).shape == model.decode(z).shape
    counted = cost(model, recipe)
    assert counted.decoder is not None and counted.decoder.storage_ratio > 8

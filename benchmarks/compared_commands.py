"""The commands that compare_checkouts.py runs for each model."""

from __future__ import annotations

from pathlib import Path

RECIPES = ("w1a1", "reference", "xnor", "w1a1-attention", "w1a32")
ALL_RECIPES = ("digits", "ldm_class_conditional")
"""Models that are packed with every recipe; the others with w1a1 alone."""

SAMPLING = {
    "ldm_class_conditional": "--label 3 --guidance 2.5",
    "guided_diffusion": "--label 3,5 --raw",
    "dit": "--label 3 --guidance 2.5 --raw",
}
"""Options for sampling, where a model needs others than --raw."""

MORE = {
    "digits": [
        "compress {model} --recipe demo/digits-w1a1.yaml --data demo/digits.npz --steps 3 -o data.bidm"
        " --run-dir run-data",
        "sample data.bidm -n 3 --steps 4 --seed 3 --raw --npz --sampler ddpm --out data-ddpm",
        "sample data.bidm -n 3 --steps 4 --seed 3 --raw --sampler dpm++ --out data-dpm++",
        "sample {model} -n 3 --steps 4 --raw --sampler ddpm --out original-ddpm",
        "sample {model} -n 3 --steps 4 --raw --sampler dpm++ --clip --out original-dpm++",
        "sample {model} -n 3 --steps 4 --raw --eta 0.5 --skip quad --no-ema --out original-quad",
        "sample nothing.ckpt --out refused",
        "sample w1a1.bidm --label 3 --out refused",
        "sample w1a1.bidm --nonesuch",
        "sample w1a1.bidm --backend cupy --device cpu --out refused",
        "sample {model} --set num_heads=many --out refused",
        "compress {model} --recipe nonesuch -o refused.bidm",
    ],
    "dit": [
        "sample {model} --steps 2 --label 3 --out refused",
        "sample {model} --raw --label 99 --out refused",
    ],
    "guided_diffusion": ["sample {model} -n 3 --steps 4 --raw --label 3 --sampler ddpm --out original-ddpm"],
}  # fmt: skip


def commands_for(name: str, model: str) -> tuple[str, ...]:
    """The commands for one model; every path but the original's is relative."""
    options = f"-n 3 --steps 4 --seed 3 {SAMPLING.get(name, '--raw')}"
    commands = ["demo demo"] if name == "digits" else []
    commands += [f"inspect {model} --recipe ../w1a1.yaml --json inspect.json"]
    commands += [f"sample {model} {options} --out original"]
    for recipe in RECIPES if name in ALL_RECIPES else RECIPES[:1]:
        commands += [
            f"compress {model} --recipe ../{recipe}.yaml --synthetic --steps 2 --seed 7 -o {recipe}.bidm"
            f" --run-dir run-{recipe}",
            f"export {recipe}.bidm -o export-{recipe}/model.pt",
            f"sample {recipe}.bidm {options} --out {recipe}-default",
            f"sample {recipe}.bidm {options} --backend torch --out {recipe}-torch",
        ]
    return (*commands, *(command.format(model=model) for command in MORE.get(name, [])))


def models_of(shared: Path) -> dict[str, str]:
    """The digits, then the shared checkpoints with the longest first: {name: path}."""
    found = {"digits": "demo/digits.pth"}
    folders = [folder for folder in sorted((shared / "checkpoints").glob("*/")) if folder.is_dir()]
    for folder in sorted(folders, key=lambda folder: folder.name not in ALL_RECIPES):
        files = [file for file in folder.iterdir() if file.suffix in (".ckpt", ".pth", ".pt")]
        found[folder.name] = str(folder if (folder / "model_index.json").exists() else files[0])
    return found

"""Train the pixel DDPM of the ablation: 32x32 faces, 1.6 M parameters, ermongroup layout.

    python benchmarks/train_pixels_teacher.py --out benchmarks/pixels

Writes pixels.pth (a five-element list as ermongroup/ddim saves it, in half precision, the averaged weights
standing in for the raw ones, too) and pixels.yml. Run again with the same --work folder to continue.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import yaml
from train_digits_teacher import CONFIG as DIGITS
from train_faces_teacher import noise_loss, trained

from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.files import write_atomically
from bidm_cli.networks.ddpm_unet import DDPMUNet

DATA = Path(__file__).resolve().parent.parent / "bidm_cli" / "demo" / "faces.npz"
MODEL = {"in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 2], "attn_resolutions": [16]}
CONFIG = {
    "data": DIGITS["data"] | {"dataset": "FACES", "image_size": 32, "channels": 3},
    "model": DIGITS["model"] | MODEL,
    "diffusion": DIGITS["diffusion"],
}


def unet() -> DDPMUNet:
    """U-Net on images [N, 3, 32, 32]."""
    return DDPMUNet(
        in_channels=3, out_channels=3, ch=32, ch_mult=[1, 2, 2], num_res_blocks=1, attention_levels=[1]
    )


def main() -> None:
    """Train the network and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("pixels"))
    parser.add_argument("--work", type=Path, default=Path("runs/pixels-teacher"))
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for folder in (chosen.work, chosen.out):
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images = torch.from_numpy(np.load(chosen.data)["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    schedule = NoiseSchedule.linear(1000, 0.0001, 0.02)
    network = trained(
        unet(), images, noise_loss(schedule), chosen.work / "unet.pt",
        steps=chosen.steps, batch=32, lr=1e-3, average=0.9995,
    )  # fmt: skip
    state = {name: value.half() for name, value in network.state_dict().items()}
    with write_atomically(chosen.out / "pixels.pth") as temporary:
        torch.save([state, {}, 0, chosen.steps, state], temporary)
    (chosen.out / "pixels.yml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))


if __name__ == "__main__":
    main()

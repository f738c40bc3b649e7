"""Train the digits DDPM that bidm ships: 8x8 handwritten digits, 0.7 M parameters, ermongroup layout.

    python benchmarks/train_digits_teacher.py --steps 12000 --out bidm_cli/demo

Writes digits.pth (a five-element list as ermongroup/ddim saves it, without optimizer state, the EMA weights
standing in for the raw ones, too) and digits.yml. Run again with the same --work folder to continue.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from timm.utils import ModelEmaV3

from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.networks.ddpm_unet import DDPMUNet

CONFIG = {
    "data": {"dataset": "DIGITS", "image_size": 8, "channels": 1, "rescaled": True, "logit_transform": False},
    "model": {
        "type": "simple",
        "in_channels": 1,
        "out_ch": 1,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.0,
        "resamp_with_conv": True,
        "var_type": "fixedlarge",
        "ema": True,
        "ema_rate": 0.9995,
    },
    "diffusion": {
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "num_diffusion_timesteps": 1000,
    },
}


def build() -> DDPMUNet:
    """Build the teacher's U-Net for 1-channel images."""
    return DDPMUNet(
        in_channels=1, out_channels=1, ch=32, ch_mult=[1, 2], num_res_blocks=1, attention_levels=[1]
    )


def main() -> None:
    """Train the teacher and write its files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("bidm_cli/demo/digits.npz"))
    parser.add_argument("--out", type=Path, default=Path("bidm_cli/demo"))
    parser.add_argument("--work", type=Path, default=Path("runs/digits-teacher"))
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    images = torch.from_numpy(np.load(arguments.data)["images"]).float()[:, None] / 127.5 - 1
    schedule = NoiseSchedule.linear(1000, 1e-4, 0.02)
    network = build().train()
    ema = ModelEmaV3(network, decay=CONFIG["model"]["ema_rate"], use_warmup=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=arguments.lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)
    first, state_file = 0, arguments.work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["network"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        rate.load_state_dict(state["rate"])
        first = state["step"]
    arguments.work.mkdir(parents=True, exist_ok=True)

    started, losses = time.time(), []
    for step in range(first, arguments.steps):
        generator = torch.Generator().manual_seed(step)
        x0 = images[torch.randint(len(images), (arguments.batch_size,), generator=generator)]
        t = torch.randint(1000, (arguments.batch_size,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = (network(schedule.add_noise(x0, noise, t), t) - noise).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        ema.update(network, step=step)
        losses.append(loss.item())
        if (step + 1) % 500 == 0:
            print(f"{step + 1} loss {np.mean(losses[-500:]):.5f} {time.time() - started:.0f} s", flush=True)
            state = {
                "network": network.state_dict(),
                "ema": ema.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rate": rate.state_dict(),
                "step": step + 1,
            }
            torch.save(state, state_file)

    weights = {k: v.clone() for k, v in ema.module.state_dict().items()}
    # The raw weights are not kept (5 MB limit): the first element shares the EMA tensors, at no extra bytes.
    module = {f"module.{k}": v for k, v in weights.items()}
    torch.save([module, {}, 0, arguments.steps, weights], arguments.out / "digits.pth")
    (arguments.out / "digits.yml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))


if __name__ == "__main__":
    main()

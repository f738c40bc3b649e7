"""Train the LDM-4 of faces that bidm ships: a KL first stage, then a U-Net on its latents, in CompVis layout.

    python benchmarks/train_faces_teacher.py --data ../shared/data/peeps/peeps-32.npz --out faces/

Writes ldm4_peeps.ckpt (half precision, averaged weights alone) and config.yaml. About two hours on two cores.
Run again with the same --work folder to continue. The bundled file's U-Net was trained for 11,000 steps and
then for 6,000 from its averages with a new optimizer; here it is one run of 17,000.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from bidm_cli.diffusion.schedule import NoiseSchedule
from bidm_cli.files import write_atomically
from bidm_cli.networks.autoencoder import KLFirstStage
from bidm_cli.networks.ldm_unet import LDMUNet

CONFIG = Path(__file__).resolve().parent.parent / "bidm_cli" / "demo" / "config.yaml"
TIMESTEPS, LINEAR_START, LINEAR_END = 1000, 0.0015, 0.0195
Loss = Callable[[nn.Module, Tensor, torch.Generator], Tensor]


def first_stage() -> KLFirstStage:
    """KL-f4 of 2.7 M parameters: images [N, 3, 32, 32] to latents [N, 3, 8, 8]."""
    return KLFirstStage(
        in_channels=3, out_channels=3, ch=32, ch_mult=[1, 2, 4], num_res_blocks=1, attention_levels=[],
        z_channels=3, embed_dim=3,
    )  # fmt: skip


def unet() -> LDMUNet:
    """U-Net of 4.1 M parameters on latents [N, 3, 8, 8]."""
    return LDMUNet(
        in_channels=3, out_channels=3, model_channels=64, num_res_blocks=2, channel_mult=[1, 2],
        attention_resolutions=[2, 1], num_head_channels=32,
    )  # fmt: skip


def first_stage_loss(stage: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """L1, half of L1 on the differences of neighbours, and a little KL."""
    moments = stage.quant_conv(stage.encoder(images))
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator)
    decoded = stage.decoder(stage.post_quant_conv(z))
    edges = sum(F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3))
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return F.l1_loss(decoded, images) + 0.5 * edges + 1e-4 * divergence


def noise_loss(schedule: NoiseSchedule) -> Loss:
    """Mean squared error of the predicted noise, t uniform."""

    def loss(network: nn.Module, x0: Tensor, generator: torch.Generator) -> Tensor:
        t = torch.randint(TIMESTEPS, (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        return F.mse_loss(network(schedule.add_noise(x0, noise, t), t), noise)

    return loss


def trained(
    network: nn.Module, data: Tensor, loss: Loss, state_file: Path, *, steps: int, batch: int, lr: float,
    average: float,
) -> nn.Module:  # fmt: skip
    """Train to the last step from where it was stopped; the averaged network."""
    ema = ModelEmaV3(network, decay=average, use_warmup=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    rate = CosineLRScheduler(
        optimizer, t_initial=steps, lr_min=lr / 50, warmup_t=min(200, steps // 2), t_in_epochs=False
    )
    parts: dict[str, Any] = {"network": network, "ema": ema.module, "optimizer": optimizer}
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]
    started, losses = time.time(), list[float]()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(data), (batch,), generator=generator)
        rate.step_update(step)
        found = loss(network, data[rows], generator)
        optimizer.zero_grad(set_to_none=True)
        found.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        ema.update(network, step=step)
        losses.append(found.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            seconds = time.time() - started
            print(
                f"{state_file.stem} {step + 1} loss {np.mean(losses[-100:]):.5f} {seconds:.0f} s", flush=True
            )
            with write_atomically(state_file) as temporary:
                saved = {name: part.state_dict() for name, part in parts.items()}
                torch.save({**saved, "step": step + 1}, temporary)
    return ema.module.eval().requires_grad_(False)


def write_checkpoint(
    folder: Path, stage: nn.Module, network: nn.Module, schedule: NoiseSchedule, scale: float
):
    """Write the two networks as CompVis' LatentDiffusion saves them, and the configuration."""
    state = {f"model.diffusion_model.{name}": value.half() for name, value in network.state_dict().items()}
    state |= {f"first_stage_model.{name}": value.half() for name, value in stage.state_dict().items()}
    state |= {"betas": schedule.betas.float(), "alphas_cumprod": schedule.alphas_cumprod.float()}
    state["scale_factor"] = torch.tensor(scale)
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / "ldm4_peeps.ckpt") as temporary:
        torch.save({"state_dict": state}, temporary)
    (folder / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()), sort_keys=False))


def main() -> None:
    """Train both networks and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=CONFIG.parent / "faces.npz")
    parser.add_argument("--out", type=Path, default=Path("faces"))
    parser.add_argument("--work", type=Path, default=Path("runs/faces-teacher"))
    parser.add_argument("--first-stage-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=17000)
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images = torch.from_numpy(np.load(chosen.data)["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    stage = trained(
        first_stage(), images, first_stage_loss, chosen.work / "first_stage.pt",
        steps=chosen.first_stage_steps, batch=32, lr=2e-3, average=0.999,
    )  # fmt: skip
    with torch.no_grad():
        latents = torch.cat([stage.encode(part) for part in images.split(256)])  # type: ignore[operator]
    scale = 1 / float(latents.std())
    schedule = NoiseSchedule.scaled_linear(TIMESTEPS, LINEAR_START, LINEAR_END)
    network = trained(
        unet(), latents * scale, noise_loss(schedule), chosen.work / "unet.pt",
        steps=chosen.steps, batch=64, lr=1e-3, average=0.9995,
    )  # fmt: skip
    write_checkpoint(chosen.out, stage, network, schedule, scale)


if __name__ == "__main__":
    main()

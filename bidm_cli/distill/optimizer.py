"""Optimizer, its rate over the steps, and the type that training computes in, as a recipe names them."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from bidm_cli.binary.layers import BinaryLayer
from bidm_cli.errors import BidmError
from bidm_cli.recipe import Optimization


def create_optimizer(network: nn.Module, settings: Optimization) -> torch.optim.Optimizer:
    """timm's optimizer by name, with ``lr_binary`` for latent binary weights and ``lr`` for all else.

    Raises:
        BidmError: timm knows no such optimizer.
    """
    latent = {id(m.weight) for m in network.modules() if isinstance(m, BinaryLayer)}
    binary = [p for p in network.parameters() if id(p) in latent]
    rest = [p for p in network.parameters() if id(p) not in latent]
    groups = [{"params": rest, "lr": settings.lr}, {"params": binary, "lr": settings.lr_binary}]
    # One pass over all parameters; torch's loop of small operations takes five times as long on a CPU.
    fused: dict[str, Any] = {"fused": True} if settings.optimizer in ("adam", "adamw", "sgd") else {}
    groups = [group for group in groups if group["params"]]
    common = {"lr": settings.lr, "weight_decay": settings.weight_decay, **fused}
    try:
        return create_optimizer_v2(groups, opt=settings.optimizer, **common)
    except (AssertionError, ValueError, KeyError, RuntimeError) as error:
        raise BidmError(f"train.optimizer: timm has no optimizer {settings.optimizer!r} ({error})") from error


def create_scheduler(optimizer: torch.optim.Optimizer, settings: Optimization) -> Scheduler:
    """Linear warm-up, then cosine to a hundredth of the rate, or constant."""
    warmup = min(settings.warmup, settings.steps // 2)
    lowest = settings.lr / 100
    common: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": lowest, "t_in_epochs": False}
    scheduler: Scheduler
    if settings.schedule == "constant":
        scheduler = MultiStepLRScheduler(optimizer, decay_t=[], **common)
    else:
        common |= {"t_initial": max(2, settings.steps - warmup), "lr_min": lowest, "warmup_prefix": True}
        scheduler = CosineLRScheduler(optimizer, **common)
    scheduler.step_update(0)
    return scheduler


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Type that training computes in; None is float32.

    "auto" takes bfloat16 (else float16) on GPUs and float32 on CPUs.
    """
    if amp == "auto":
        amp = "off" if device.type == "cpu" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return {"off": None, "float16": torch.float16, "bfloat16": torch.bfloat16}[amp]

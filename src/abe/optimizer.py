"""The optimiser of a run, and what its rates are at a step."""

from __future__ import annotations

import math
from collections.abc import Set

import torch
from torch import nn

from abe.config import TrainConfig


def build_optimizer(
    train: TrainConfig, model: nn.Module, metric_loss: nn.Module | None, new_layers: Set[str]
) -> torch.optim.Optimizer:
    """Group by rate and decay: biases and norms do not decay, biases and new layers are faster."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        factor = train.bias_lr_factor if name.endswith("bias") else 1.0
        if name in new_layers:
            factor *= train.new_layer_lr_factor
        decay = train.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((factor, decay), []).append(parameter)
    if metric_loss is not None:
        groups.setdefault((train.loss_lr_factor, 0.0), []).extend(metric_loss.parameters())
    settings = [
        {
            "params": parameters,
            "lr": train.lr * factor,
            "initial_lr": train.lr * factor,
            "weight_decay": decay,
        }
        for (factor, decay), parameters in groups.items()
        if parameters
    ]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(settings)
    return torch.optim.SGD(settings, momentum=train.momentum)


def lr_factor(step: int, train: TrainConfig) -> float:
    """The rate at `step` as a fraction of `train.lr`: linear warm-up, then the schedule."""
    factor = warm_up(step, train.warmup)
    if train.schedule == "cosine":
        done = max(0, step - train.warmup) / max(1, train.steps - train.warmup)
        return factor * 0.5 * (1 + math.cos(math.pi * done))
    if train.schedule == "steps":
        return factor * train.decay_factor ** (step // train.decay_every)
    return factor


def set_rate(optimizer: torch.optim.Optimizer, step: int, train: TrainConfig) -> float:
    """Give every group of `build_optimizer` its rate at a step; -> `lr_factor`."""
    factor = lr_factor(step, train)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return factor


def warm_up(step: int, steps: int) -> float:
    """From near 0 in the first step to 1 in step `steps` and after, linearly."""
    return min(1.0, (step + 1) / steps) if steps else 1.0

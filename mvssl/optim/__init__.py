"""Optimisers, parameter groups and schedules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mvssl.config.recipe import Optimizer
from mvssl.optim.lars import LARS, parameter_groups
from mvssl.optim.schedule import apply_rates, hold_on_device, learning_rate, target_decay, weight_decay

__all__ = [
    "LARS",
    "apply_rates",
    "build_optimizer",
    "hold_on_device",
    "learning_rate",
    "parameter_groups",
    "target_decay",
    "weight_decay",
]


def build_optimizer(network: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """The optimiser of a network's trainable parameters, which must already be on their device.

    LARS and AdamW do not decay vectors (biases, norm scales), SGD decays all (PAPER.md section 5). Each group says in
    "vector", "predictor" and "decayed" which rates it follows: `apply_rates` sets them before every step.
    """
    lars = config.kind == "lars"
    groups: list[dict[str, Any]] = []
    for group in parameter_groups(network):
        decayed = config.kind == "sgd" or not group.vector
        options = {
            "vector": group.vector,
            "predictor": group.predictor,
            "decayed": decayed,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        adaptation = {"adapt": not group.vector, "stacked": group.stacked} if lars else {}
        groups.append({"params": list(group.parameters)} | options | adaptation)
    if lars:
        return LARS(groups, lr=config.base_lr, momentum=config.momentum, eta=config.eta)
    if config.kind == "sgd":
        sgd = torch.optim.SGD(groups, lr=config.base_lr, momentum=config.momentum, fused=True)
        sgd.register_step_pre_hook(_zero_momentum)
        return sgd
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=config.betas, fused=True)


def _zero_momentum(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Give every parameter with a gradient a zero momentum buffer if it has none.

    torch allocates the buffers with `empty_like` and counts on its first update to write them; under a GradScaler an
    overflow skips that update, and the next one would read uninitialised memory. 0.9 * 0 + g is g: same numbers.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

"""Optimisers, parameter groups and schedules."""

from __future__ import annotations

import torch
from torch import nn

from mvssl.optim.groups import parameter_groups
from mvssl.optim.lars import LARS
from mvssl.optim.schedule import learning_rate, target_decay
from mvssl.recipe import Optimizer

__all__ = ["LARS", "build_optimizer", "learning_rate", "parameter_groups", "target_decay"]


def build_optimizer(network: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """The optimiser of a network's trainable parameters, which must already be on their device.

    LARS and AdamW do not decay vectors (biases, norm scales), SGD decays all (SPEC section 5). The learning rate is a
    float in each group, to be set before every step; no update waits for the device.
    """
    groups = parameter_groups(network)
    if config.kind == "lars":
        return LARS(
            [
                {
                    "params": list(group.parameters),
                    "weight_decay": 0.0 if group.vector else config.weight_decay,
                    "adapt": not group.vector,
                    "stacked": group.stacked,
                }
                for group in groups
            ],
            lr=config.base_lr,
            momentum=config.momentum,
            eta=config.eta,
        )
    everything = config.kind == "sgd"
    decayed = [
        {
            "params": list(group.parameters),
            "weight_decay": config.weight_decay if everything or not group.vector else 0.0,
        }
        for group in groups
    ]
    if config.kind == "sgd":
        return torch.optim.SGD(decayed, lr=config.base_lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(decayed, lr=config.base_lr, betas=config.betas, fused=True)

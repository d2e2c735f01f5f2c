"""Schedules of learning rate, weight decay and EMA momentum, and their application to an optimiser's groups.

The formulas are those of PAPER.md section 5.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

from mvssl.config.recipe import Optimizer


def learning_rate(step: int, steps: int, warmup: float, peak: float, final_factor: float) -> float:
    """Linear warm-up from 0, then a cosine from `peak` towards `final_factor * peak`.

    Args:
        step: number of the update, 0 to steps - 1.
        steps: updates in the run.
        warmup: updates of warm-up (need not be whole).
        peak: effective learning rate.
        final_factor: fraction of the peak that the cosine would reach at step = steps.
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup) if steps > warmup else 1.0
    q = (1 + math.cos(math.pi * progress)) / 2
    return peak * (q + final_factor * (1 - q))


def weight_decay(step: int, steps: int, start: float, end: float) -> float:
    """Cosine from `start` at step 0 to `end` at step = steps."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def ema_momentum(step: int, steps: int, base: float) -> float:
    """EMA momentum (tau) of the target network: a cosine from `base` at step 0 to 1 at step = steps."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * step / steps)) / 2


def apply_rates(
    optimizer: TorchOptimizer, config: Optimizer, *, batch_size: int, step: int, steps: int, steps_per_epoch: int
) -> float:
    """Set "lr" and "weight_decay" of every group for one update; without a host sync.

    Vectors follow `bias_lr` if the recipe sets it. Predictors with a constant learning rate, biases included, stay at
    the peak of `base_lr`. With lr_schedule "epoch" the values of an epoch's first step hold for the whole epoch, so
    the first epoch of a warm-up has learning rate 0.

    Args:
        optimizer: built by `build_optimizer`.
        config: the rates and their schedules.
        batch_size: images per update over all ranks.
        step: number of this update in the run, from 0.
        steps: updates in the whole run.
        steps_per_epoch: updates in an epoch.

    Returns:
        The main learning rate: that of the matrices outside the predictors.
    """
    at = step - step % steps_per_epoch if config.lr_schedule == "epoch" else step

    def scheduled(base: float) -> float:
        warmup = config.warmup_epochs * steps_per_epoch
        return learning_rate(at, steps, warmup, base * batch_size / 256, config.final_lr_factor)

    main = scheduled(config.base_lr)
    vectors = main if config.bias_lr is None else scheduled(config.bias_lr)
    end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
    decay = weight_decay(at, steps, config.weight_decay, end)
    for group in optimizer.param_groups:
        if group["predictor"] and config.constant_predictor_lr:
            _set(group, "lr", config.base_lr * batch_size / 256)
        else:
            _set(group, "lr", vectors if group["vector"] else main)
        _set(group, "decay" if "decay" in group else "weight_decay", decay if group["decayed"] else 0.0)
    return main


def _set(group: dict[str, Any], name: str, value: float) -> None:
    """Set an entry of a group. Tensors are filled by a kernel argument, so no host buffer has to outlive the call."""
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def rates_to_device(optimizer: TorchOptimizer, config: Optimizer) -> None:
    """Turn every scheduled rate into a tensor on the parameters' device, so that a CUDA graph can replay the update.

    torch's fused kernels accept weight decay as a number only: a scheduled one is applied by a hook just before the
    update. Call this again after `load_state_dict`, which replaces the groups.
    """
    like = optimizer.param_groups[0]["params"][0]
    dtype = torch.promote_types(like.dtype, torch.float32)
    scheduled = config.weight_decay_end is not None
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), dtype=dtype, device=like.device)
        if scheduled and group["decayed"]:
            group["weight_decay"] = 0.0
            group["decay"] = torch.zeros((), dtype=dtype, device=like.device)
        if "capturable" in group:
            group["capturable"] = like.device.type == "cuda"
    # Silences torch's warning that capturable is slow without a graph: with fused kernels it is not.
    optimizer._warned_capturable_if_run_uncaptured = True
    if scheduled and not hasattr(optimizer, "_decay_hook"):
        optimizer._decay_hook = optimizer.register_step_pre_hook(_apply_decay)  # type: ignore[attr-defined]  # once


@torch.no_grad()
def _apply_decay(optimizer: TorchOptimizer, *_: object) -> None:
    """Apply the "decay" of each group: AdamW scales the parameters, the others add to the gradient."""
    overflow: Tensor | None = getattr(optimizer, "found_inf", None)  # from a GradScaler: no parameter may change then
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        if "decay" not in group or not params:
            continue
        if isinstance(optimizer, torch.optim.AdamW):
            factor = 1 - group["lr"] * group["decay"]
            torch._foreach_mul_(params, factor if overflow is None else torch.where(overflow > 0, 1.0, factor))
        else:
            torch._foreach_add_([p.grad for p in params], torch._foreach_mul(params, group["decay"]))

"""Learning rate, weight decay and target decay as pure functions of the step (PAPER.md section 5).

Learning rate and weight decay of every parameter group at a step (PAPER.md section 5).
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
        step: step of the update, 0 to steps - 1.
        steps: number of updates in the run.
        warmup: updates of warm-up (need not be whole).
        peak: effective learning rate.
        final_factor: the cosine's end, reached at step = steps, as a fraction of the peak.
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (steps - warmup) if steps > warmup else 1.0
    q = (1 + math.cos(math.pi * progress)) / 2
    return peak * (q + final_factor * (1 - q))


def weight_decay(step: int, steps: int, start: float, end: float) -> float:
    """Weight decay at a step of `steps`: from `start` at 0 along a cosine to `end` at step = steps."""
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def target_decay(step: int, steps: int, base: float) -> float:
    """Decay of the moving average at a step of `steps`: from `base` at 0 along a cosine to 1 at the end."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * step / steps)) / 2


def apply_rates(
    optimizer: TorchOptimizer, config: Optimizer, *, batch_size: int, step: int, steps: int, steps_per_epoch: int
) -> float:
    """Set "lr" and "weight_decay" of every group for one update.

    Vectors follow `bias_lr` where the recipe sets it. Predictors with a constant learning rate keep the peak of
    `base_lr`, their biases too. With lr_schedule "epoch" the values of an epoch's first step hold for the whole epoch,
    so that an epoch that begins a warm-up has learning rate 0. Fills what `hold_on_device` made tensors, sets floats
    otherwise; nothing waits for the device.

    Args:
        optimizer: made by `build_optimizer`, whose groups say what they hold in "vector", "predictor" and "decayed".
        config: the rates and their schedules.
        batch_size: images per update over all ranks.
        step: number of this update in the run, from 0.
        steps: updates in the whole run.
        steps_per_epoch: updates in an epoch.

    Returns:
        The learning rate of the groups that have none of their own: the matrices outside the predictors.
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
    """Give a group a number; a kernel's argument fills a tensor, so that no buffer of the host has to outlive it."""
    if isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def hold_on_device(optimizer: TorchOptimizer, config: Optimizer) -> None:
    """Keep every rate that changes from step to step in a tensor on the parameters' device.

    Then all updates are the same operations with the same arguments, which a CUDA graph can replay. A weight decay that
    changes is taken out of the optimiser, whose kernels know numbers only, and applied just before its update. To be
    called again after `load_state_dict`, which brings other groups.
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
    # torch would warn that this has to be paid for without a graph; with fused kernels it costs nothing.
    optimizer._warned_capturable_if_run_uncaptured = True  # torch's own name for it
    if scheduled and not hasattr(optimizer, "_decays"):
        optimizer._decays = optimizer.register_step_pre_hook(_decay)  # type: ignore[attr-defined]  # hook, once


@torch.no_grad()
def _decay(optimizer: TorchOptimizer, *_: object) -> None:
    """Decay parameters by `decay` of their group: AdamW scales them, the others add it to the gradient (PAPER.md 5)."""
    overflow: Tensor | None = getattr(optimizer, "found_inf", None)  # of a GradScaler: then nothing may move
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        if "decay" not in group or not params:
            continue
        if isinstance(optimizer, torch.optim.AdamW):
            factor = 1 - group["lr"] * group["decay"]
            torch._foreach_mul_(params, factor if overflow is None else torch.where(overflow > 0, 1.0, factor))
        else:
            torch._foreach_add_([p.grad for p in params], torch._foreach_mul(params, group["decay"]))

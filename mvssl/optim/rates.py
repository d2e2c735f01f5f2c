"""Learning rate and weight decay of every parameter group at a step (SPEC section 5)."""

from __future__ import annotations

from torch.optim import Optimizer as TorchOptimizer

from mvssl.optim.schedule import learning_rate, weight_decay
from mvssl.recipe import Optimizer


def apply_rates(
    optimizer: TorchOptimizer, config: Optimizer, *, batch_size: int, step: int, steps: int, steps_per_epoch: int
) -> float:
    """Set "lr" and "weight_decay" of every group for one update.

    Vectors follow `bias_lr` where the recipe sets it. Predictors with a constant learning rate keep the peak of
    `base_lr`, their biases too. With lr_schedule "epoch" the values of an epoch's first step hold for the whole epoch,
    so that an epoch that begins a warm-up has learning rate 0. Plain floats: nothing waits for the device.

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
            group["lr"] = config.base_lr * batch_size / 256
        else:
            group["lr"] = vectors if group["vector"] else main
        group["weight_decay"] = decay if group["decayed"] else 0.0
    return main

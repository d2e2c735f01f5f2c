"""Learning rate, weight decay and target decay as pure functions of the step (SPEC section 5)."""

from __future__ import annotations

import math


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

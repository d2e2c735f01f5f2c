"""Top-1 and top-5 accuracy with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Accuracy on labelled images.

    Attributes:
        top1: fraction of images whose class scores highest, in [0, 1].
        top5: fraction whose class is among the five highest; None with at most five classes or without scores.
        low: lower end of the 95 % confidence interval of `top1`.
        high: its upper end.
        images: number of images.
        per_class: top-1 of each class that has images, by name.
    """

    top1: float
    top5: float | None
    low: float
    high: float
    images: int
    per_class: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As result files store it."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "top1_interval_95": [self.low, self.high],
            "images": self.images,
            "per_class": self.per_class,
        }


def accuracy_of(ranked: Tensor, labels: Tensor, classes: Sequence[str]) -> Accuracy:
    """Compare predictions with labels.

    Args:
        ranked: int64 [M, R], predicted classes, best first; R is 1, or at least 5 for a top-5.
        labels: int64 [M], each 0 or more, on the same device.
        classes: names by label.
    """
    correct = (ranked[:, 0] == labels).double()  # [M]
    top5 = None
    if ranked.shape[1] >= 5 and len(classes) > 5:
        top5 = float((ranked[:, :5] == labels[:, None]).any(dim=1).double().mean())
    count = torch.bincount(labels, minlength=len(classes)).tolist()  # [C]
    hits = torch.bincount(labels, weights=correct, minlength=len(classes)).tolist()  # [C]
    low, high = wilson_interval(int(correct.sum()), len(labels))
    return Accuracy(
        top1=float(correct.mean()),
        top5=top5,
        low=low,
        high=high,
        images=len(labels),
        per_class={name: hit / of for name, hit, of in zip(classes, hits, count, strict=False) if of > 0},
    )


def wilson_interval(correct: int, images: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion, by Wilson's score (JASA 22, 1927), which is sound near 0 and 1 too."""
    proportion, z2 = correct / images, _NORMAL_95**2
    middle = (proportion + z2 / (2 * images)) / (1 + z2 / images)
    half = _NORMAL_95 / (1 + z2 / images) * math.sqrt(proportion * (1 - proportion) / images + z2 / (4 * images**2))
    return max(0.0, middle - half), min(1.0, middle + half)

"""Uncertainty of a difference between two arms, and the seeds and test images needed to detect one of 2 points.

Runs of two arms with one seed see the same images in the same order from the same initial encoder, and all are tested
on the same images. d[s, i] is +1 if only arm A is right on test image i with seed s, -1 if only B is. A two-way
analysis of variance with random effects splits it (Searle, Casella and McCulloch, Variance Components, 1992,
section 4.3) into seeds, images and the rest. The variance of the mean over S seeds and M images is

    seed / S + image / M + rest / (S * M)

and a difference is detected in four of five experiments, at a two-sided level of 5 %, if it is (1.96 + 0.84) of its
root.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

SEEN = 1.959964 + 0.841621  # quantiles of the normal distribution at 0.975 and 0.8
# Quantile 0.975 of Student's t by degrees of freedom; beyond these the normal quantile is close enough.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variance components of one difference d[s, i], none below 0.

    Attributes:
        seed: between seeds, over all images: luck in training.
        image: between images, over all seeds: luck in the test set.
        rest: everything else.
    """

    seed: float
    image: float
    rest: float

    def standard_error(self, seeds: float, images: float) -> float:
        """Of the mean difference over so many seeds and newly sampled test images."""
        return math.sqrt(self.seed / seeds + self.image / images + self.rest / (seeds * images))

    def seeds_for(self, difference: float, images: float) -> float:
        """Seeds an arm to detect a difference (in [0, 1]) with so many test images; infinite if no number is enough."""
        allowed = (difference / SEEN) ** 2 - self.image / images
        needed = self.seed + self.rest / images
        return needed / allowed if allowed > 0 else math.inf


def components(difference: ArrayLike) -> Components:
    """Estimate the components of d [S, M] with S and M of 2 or more, by the mean squares of the two-way layout."""
    d = np.asarray(difference, dtype=np.float64)
    seeds, images = d.shape
    by_seed, by_image, grand = d.mean(axis=1), d.mean(axis=0), d.mean()
    square_seed = images * ((by_seed - grand) ** 2).sum() / (seeds - 1)
    square_image = seeds * ((by_image - grand) ** 2).sum() / (images - 1)
    left = d - by_seed[:, None] - by_image[None, :] + grand
    square_rest = (left**2).sum() / ((seeds - 1) * (images - 1))
    return Components(
        seed=max(0.0, float(square_seed - square_rest) / images),
        image=max(0.0, float(square_image - square_rest) / seeds),
        rest=float(square_rest),
    )


def interval(by_seed: ArrayLike) -> tuple[float, float]:
    """Mean of a difference and half of its 95 % interval by Student's t over seeds, for these test images.

    With one seed the half is infinite.
    """
    values = np.asarray(by_seed, dtype=np.float64)
    count = len(values)
    if count < 2:
        return float(values.mean()), math.inf
    quantile = _T[count - 2] if count - 1 <= len(_T) else 1.959964
    return float(values.mean()), quantile * float(values.std(ddof=1)) / math.sqrt(count)

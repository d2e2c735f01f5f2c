"""Variance components of drawn data are those it was drawn with, and the power is that of repeated experiments."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.paper.power import Components, components, interval


def drawn(
    generator: np.random.Generator, seeds: int, images: int, sizes: tuple[float, float, float], mean: float = 0.0
) -> NDArray[np.float64]:
    seed, image, rest = sizes
    return (
        mean
        + generator.normal(0, seed, (seeds, 1))
        + generator.normal(0, image, (1, images))
        + generator.normal(0, rest, (seeds, images))
    )


def test_components_are_unbiased() -> None:
    generator = np.random.default_rng(0)
    found = [components(drawn(generator, 4, 50, (0.5, 1.0, 2.0))) for _ in range(400)]
    assert np.mean([one.seed for one in found]) == pytest.approx(0.25, rel=0.15)
    assert np.mean([one.image for one in found]) == pytest.approx(1.0, rel=0.1)
    assert np.mean([one.rest for one in found]) == pytest.approx(4.0, rel=0.05)


def test_standard_error_is_that_of_repeated_experiments() -> None:
    generator = np.random.default_rng(1)
    sizes = (0.02, 0.3, 0.4)
    means = [drawn(generator, 3, 200, sizes).mean() for _ in range(4000)]
    parts = Components(seed=sizes[0] ** 2, image=sizes[1] ** 2, rest=sizes[2] ** 2)
    assert np.std(means) == pytest.approx(parts.standard_error(3, 200), rel=0.05)


def test_so_many_seeds_see_the_difference_in_four_of_five_experiments() -> None:
    generator = np.random.default_rng(2)
    sizes = (0.02, 0.2, 0.4)
    parts = Components(seed=sizes[0] ** 2, image=sizes[1] ** 2, rest=sizes[2] ** 2)
    images = 3000
    seeds = round(parts.seeds_for(0.02, images))
    assert parts.seeds_for(0.02, images) == pytest.approx(seeds, rel=0.05)
    error = parts.standard_error(seeds, images)
    seen = [abs(drawn(generator, seeds, images, sizes, mean=0.02).mean()) > 1.959964 * error for _ in range(600)]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.06)


def test_a_small_test_set_is_not_helped_by_seeds() -> None:
    parts = Components(seed=0.0001, image=0.1, rest=0.1)
    assert parts.seeds_for(0.02, 1000) == math.inf
    assert parts.seeds_for(0.02, 100_000) < math.inf


def test_interval_is_students() -> None:
    # Student's sleep data (Biometrika 1908): ten differences, mean 1.58, 95 % interval 0.70 to 2.46.
    mean, half = interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (mean, mean - half, mean + half) == pytest.approx((1.58, 0.7001, 2.4599), abs=1e-3)
    assert interval([0.5]) == (0.5, math.inf)

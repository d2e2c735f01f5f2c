"""The draws follow the distributions of torchvision's get_params and the probabilities of the spec."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision import transforms as tv

from pipelines import ViewSpec, draw
from pipelines.views.params import ViewParams
from pipelines.views.presets import paper_views

COUNT = 3000
ALPHA = 1e-5  # chance that a right draw fails one comparison; seeds are fixed, so it passes once and for all


def drawn(spec: ViewSpec, size: tuple[int, int] = (64, 64), count: int = COUNT) -> ViewParams:
    return draw([spec], torch.tensor([size]).expand(count, 2), seed=11, epoch=0, index=range(count)).view(0)


def assert_same_distribution(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Two-sample Kolmogorov-Smirnov test (conservative where values tie)."""
    at = np.union1d(ours, theirs)
    cdf = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (ours, theirs)]
    bar = math.sqrt(-math.log(ALPHA / 2) / 2 * (1 / len(ours) + 1 / len(theirs)))
    assert np.abs(cdf[0] - cdf[1]).max() < bar


def test_the_comparison_notices_a_small_difference() -> None:
    rng = np.random.default_rng(0)
    assert_same_distribution(rng.random(COUNT), rng.random(COUNT))
    with pytest.raises(AssertionError):
        assert_same_distribution(rng.random(COUNT), 0.9 * rng.random(COUNT))


@pytest.mark.parametrize(
    ("size", "area"),
    [((375, 500), (0.25, 1.0)), ((375, 500), (0.08, 0.25)), ((60, 200), (0.5, 1.0)), ((300, 61), (0.25, 1.0))],
    ids=["global", "local", "often-central", "tall"],
)
def test_crops_against_torchvision(size: tuple[int, int], area: tuple[float, float]) -> None:
    crop = drawn(ViewSpec(name="a", task="t", area=area), size).crop.numpy()
    torch.manual_seed(0)
    image = torch.empty((3, *size), dtype=torch.uint8)
    theirs = np.array(
        [tv.RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3]) for _ in range(COUNT)]
    )  # (top, left, height, width)
    for column in range(4):
        assert_same_distribution(crop[:, column], theirs[:, column])
    assert_same_distribution(crop[:, 2] * crop[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_distribution(crop[:, 3] / crop[:, 2], theirs[:, 3] / theirs[:, 2])
    assert_same_distribution(crop[:, 0] - crop[:, 1], theirs[:, 0] - theirs[:, 1])


def test_central_fallback_is_torchvisions() -> None:
    """Where no attempt can fit, the box is not random and must be the same."""
    for size in ((10, 1000), (1000, 10), (7, 301), (301, 7), (1, 1000), (999, 2)):
        crop = drawn(ViewSpec(name="a", task="t", area=(0.9, 1.0)), size, count=3).crop
        image = torch.empty((3, *size), dtype=torch.uint8)
        theirs = tv.RandomResizedCrop.get_params(image, [0.9, 1.0], [3 / 4, 4 / 3])
        assert crop.tolist() == [list(theirs)] * 3


def test_cutout_against_torchvisions_crop_of_the_view() -> None:
    box = drawn(ViewSpec(name="a", task="t", cutout=(0.2, 0.4))).cutout.numpy()
    torch.manual_seed(0)
    view = torch.empty((3, 224, 224), dtype=torch.uint8)
    theirs = np.array([tv.RandomResizedCrop.get_params(view, [0.2, 0.4], [3 / 4, 4 / 3]) for _ in range(COUNT)])
    for column in range(4):
        assert_same_distribution(box[:, column], theirs[:, column])
    share = box[:, 2] * box[:, 3] / 224**2
    assert 0.195 < share.min() < 0.21
    assert 0.39 < share.max() < 0.405


def test_jitter_against_torchvision() -> None:
    params = drawn(ViewSpec(name="a", task="t", jitter=(0.4, 0.3, 0.2, 0.1)))
    torch.manual_seed(0)
    theirs = [
        tv.ColorJitter.get_params([0.6, 1.4], [0.7, 1.3], [0.8, 1.2], [-0.1, 0.1]) for _ in range(COUNT)
    ]  # order, four factors
    for number in range(4):
        assert_same_distribution(params.jitter[:, number].numpy(), np.array([row[1 + number] for row in theirs]))
    orders = Counter(tuple(order) for order in params.jitter_order.tolist())
    chi_square = sum((orders[order] - COUNT / 24) ** 2 / (COUNT / 24) for order in orders)
    assert len(orders) == 24
    assert chi_square < 23 + 5 * math.sqrt(2 * 23)


def test_blur_sigma_against_torchvision() -> None:
    sigma = drawn(ViewSpec(name="a", task="t", blur=1.0)).blur_sigma.numpy()
    torch.manual_seed(0)
    theirs = np.array([tv.GaussianBlur.get_params(0.1, 2.0) for _ in range(COUNT)])
    assert_same_distribution(sigma, theirs)


def test_probabilities_of_the_papers_views() -> None:
    specs = paper_views()
    params = draw(specs, torch.full((COUNT, 2), 100), seed=5, epoch=1, index=range(COUNT))
    happened = {
        "flip": params.flip,
        "jitter_p": params.jitter_on,
        "grayscale": params.gray,
        "blur": params.blur_sigma > 0,
        "solarize": params.solarize,
    }
    table = {  # PAPER.md section 2, written out again: global 1, global 2, local, local, cutout
        "flip": (0.5, 0.5, 0.5, 0.5, 0.5),
        "jitter_p": (0.8, 0.8, 0.8, 0.8, 0.8),
        "grayscale": (0.2, 0.2, 0.2, 0.2, 0.2),
        "blur": (1.0, 0.1, 0.5, 0.5, 0.5),
        "solarize": (0.0, 0.2, 0.0, 0.0, 0.0),
    }
    for name, probabilities in table.items():
        for v, p in enumerate(probabilities):
            frequency = happened[name][v].double().mean().item()
            assert abs(frequency - p) <= 5 * math.sqrt(p * (1 - p) / COUNT), (name, v)
    assert ((params.cutout[..., 2] > 0).double().mean(dim=1) == torch.tensor([0, 0, 0, 0, 1])).all()


def test_decisions_are_independent_of_one_another() -> None:
    spec = ViewSpec(name="a", task="t", grayscale=0.5, solarize=0.5, jitter_p=0.5, cutout=(0.2, 0.4), blur=1.0)
    p = drawn(spec, (375, 500))
    columns = [p.flip, p.jitter_on, p.gray, p.solarize, p.blur_sigma, *p.jitter.T, p.crop[:, 2], p.cutout[:, 0]]
    correlation = np.corrcoef(torch.stack([column.double() for column in columns]).numpy())
    assert np.abs(correlation - np.eye(len(columns))).max() < 5 / math.sqrt(COUNT)

"""The online probe against scikit-learn's logistic regression on the same features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mvssl.config.recipe import Evaluation
from mvssl.evaluate.online_knn import evaluate_online
from mvssl.evaluate.online_probe import probe_accuracy
from mvssl.evaluate.session import Session
from pipelines.storage import open_source
from tests.samples.networks import Brightness

CLASSES = 5


def blobs(images: int, *, seed: int, spread: float = 2.5) -> tuple[Tensor, Tensor]:
    """Features [N, 32] of overlapping classes, with directions of very different scale, and labels [N]."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, 32))
    generator = np.random.default_rng(seed)
    labels = np.arange(images) % CLASSES
    features = (centres[labels] + spread * generator.normal(size=(images, 32))) * np.geomspace(0.01, 100, 32)
    return torch.from_numpy(features).float() + 3, torch.from_numpy(labels)


@pytest.mark.parametrize("images", [60, 3000])
def test_it_is_as_good_as_a_logistic_regression(images: int) -> None:
    (features, labels), (test, truth) = blobs(images, seed=1), blobs(2000, seed=2)
    ours = probe_accuracy(features, labels, test, truth, classes=CLASSES)
    scaler = StandardScaler().fit(features)
    theirs = max(
        LogisticRegression(C=strength, max_iter=2000)
        .fit(scaler.transform(features), labels)
        .score(scaler.transform(test), truth)
        for strength in (0.01, 0.1, 1.0)
    )
    assert ours == pytest.approx(theirs, abs=0.04)
    assert probe_accuracy(features, labels, test, truth, classes=CLASSES) == ours  # no generator of the run is used


def test_without_validation_images_it_is_measured_on_images_that_it_has_not_seen() -> None:
    """Random labels, more features than images: a classifier that had seen them would be right every time."""
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(200, 400, generator=generator), torch.arange(200) % CLASSES
    assert probe_accuracy(features, labels, features, labels, classes=CLASSES) > 0.95
    assert probe_accuracy(features, labels, None, None, classes=CLASSES) < 0.45


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_images_are_enough(count: int) -> None:
    features, labels = torch.eye(3)[:count], torch.arange(3)[:count]
    assert probe_accuracy(features, labels, features, labels, classes=3) == 1.0
    if count > 1:
        assert probe_accuracy(features, labels, None, None, classes=3) in (0.0, 0.5, 1.0)


def test_an_exception_in_the_progress_ends_it() -> None:
    features, labels = blobs(100, seed=1)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe_accuracy(features, labels, None, None, classes=CLASSES, progress=stop)


def test_images_of_different_brightness_are_told_apart(images: Path) -> None:
    session = Session(device=torch.device("cpu"), batch_size=7)
    train, val = open_source(images / "train"), open_source(images / "val")
    evaluation = Evaluation(resize=32, crop=32, k=(3,))
    for measured_on in (val, None):
        accuracy = evaluate_online(session, Brightness(), train, measured_on, evaluation)
        assert accuracy.probe is not None
        assert accuracy.probe > 0.8
    off = Evaluation(resize=32, crop=32, k=(3,), probe=False)
    assert evaluate_online(session, Brightness(), train, val, off).probe is None

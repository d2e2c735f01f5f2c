"""Linear classifiers of a grid against torch's own optimiser, setting by setting, and against scikit-learn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mvssl.evaluate.accuracy import accuracy_of, wilson_interval
from mvssl.evaluate.knn import knn_predictions, nearest_images
from mvssl.evaluate.linear_fit import Setting, fit, race, standardisation, stratified
from pipelines.runtime import InputError

CLASSES, WIDTH = 4, 6
GRID = [Setting(lr=lr, weight_decay=decay) for lr, decay in itertools.product((0.01, 0.3), (0.0, 0.05))]


def blobs(count: int, *, seed: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """Features [N, D] float64 of overlapping classes, on scales of their own, and labels [N]."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(CLASSES, WIDTH))
    labels = rng.integers(0, CLASSES, count)
    features = centres[labels] + spread * rng.normal(size=(count, WIDTH))
    return torch.from_numpy(features * np.array([1, 10, 0.1, 1, 5, 1]) + 3), torch.from_numpy(labels)


def by_torch(features: Tensor, labels: Tensor, setting: Setting, *, epochs: int, batch_size: int, seed: int) -> Tensor:
    """Scores of all images after training one linear layer with autograd and torch.optim.SGD."""
    x = torch.from_numpy(StandardScaler().fit_transform(features.numpy()))
    layer = torch.nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    groups: list[dict[str, Any]] = [
        {"params": [layer.weight], "weight_decay": setting.weight_decay},
        {"params": [layer.bias]},
    ]
    optimizer = torch.optim.SGD(groups, lr=setting.lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    steps = len(x) // batch_size
    for step in range(epochs * steps):
        if step % steps == 0:
            order = torch.randperm(len(x), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * (1 + math.cos(math.pi * step / (epochs * steps))) / 2
        batch = order[step % steps * batch_size :][:batch_size]
        optimizer.zero_grad()
        F.cross_entropy(layer(x[batch]), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        scores: Tensor = layer(x)
    return scores


def test_each_setting_is_what_torch_trains_alone() -> None:
    features, labels = blobs(103, seed=0)
    together = fit(features, labels, GRID, classes=CLASSES, epochs=3, batch_size=16, seed=5, dtype=torch.float64)
    for number, setting in enumerate(GRID):
        expected = by_torch(features, labels, setting, epochs=3, batch_size=16, seed=5)
        torch.testing.assert_close(together.scores(features, number), expected, rtol=1e-5, atol=1e-5)


def test_agrees_with_logistic_regression_at_its_optimum() -> None:
    features, labels = blobs(400, seed=1)
    decay = 0.02
    ours = fit(
        features,
        labels,
        [Setting(lr=1.0, weight_decay=decay)],
        classes=CLASSES,
        epochs=3000,
        batch_size=400,
        dtype=torch.float64,
    )
    x = StandardScaler().fit_transform(features.numpy())
    theirs = LogisticRegression(C=1 / (decay * 400), tol=1e-10, max_iter=5000).fit(x, labels.numpy())
    np.testing.assert_allclose(
        ours.scores(features, 0).softmax(dim=1).numpy(), theirs.predict_proba(x), rtol=1e-4, atol=1e-5
    )
    assert float(ours.right(features, labels)[0]) == pytest.approx(theirs.score(x, labels.numpy()))
    assert 0.5 < theirs.score(x, labels.numpy()) < 0.95


def test_rows_alone_are_trained_on_and_standardised() -> None:
    features, labels = blobs(90, seed=2)
    rows = torch.arange(0, 90, 2)
    some = fit(features, labels, GRID[:1], classes=CLASSES, epochs=2, batch_size=8, rows=rows, dtype=torch.float64)
    alone = fit(features[rows], labels[rows], GRID[:1], classes=CLASSES, epochs=2, batch_size=8, dtype=torch.float64)
    torch.testing.assert_close(some.weight, alone.weight, rtol=1e-6, atol=1e-9)
    assert not torch.equal(some.mean, standardisation(features)[0].double())


def test_standardisation_is_numpys_and_leaves_constants_alone() -> None:
    features, _ = blobs(20_000, seed=3)
    features[:, 2] = 4.25
    mean, scale = standardisation(features.float())
    np.testing.assert_allclose(mean, features.numpy().mean(axis=0), rtol=1e-5)
    deviation = features.numpy().std(axis=0)
    deviation[2] = 1
    np.testing.assert_allclose(scale, 1 / deviation, rtol=1e-5)


def test_a_race_finds_the_best_and_ranks_the_diverged_last() -> None:
    features, labels = (value.float() if value.is_floating_point() else value for value in blobs(600, seed=4))
    grid = [Setting(lr=lr, weight_decay=0) for lr in (1e-6, 0.05, 1e38)]
    told: list[str] = []
    raced = race(
        features,
        labels,
        grid,
        classes=CLASSES,
        held_out=stratified(labels, 0.25, seed=0),
        rounds=((2, 1.0), (8, 0.6), (8, 0.1)),
        batch_size=32,
        progress=told.append,
    )
    assert raced.order[0] == 1
    assert raced.order[-1] == 2
    assert raced.accuracy[2] == 0.0
    assert raced.accuracy[1] > 0.4
    assert raced.rounds == [(2, 3), (8, 2), (8, 1)]
    assert told == ["3 settings for 2 epochs", "2 settings for 8 epochs", "1 settings for 8 epochs"]


def test_stratified_shares() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    chosen = stratified(labels, 0.1, seed=0)
    assert torch.bincount(labels[chosen], minlength=4).tolist() == [5, 1, 1, 0]
    assert torch.equal(chosen, stratified(labels, 0.1, seed=0))
    assert not torch.equal(chosen, stratified(labels, 0.1, seed=1))


def test_accuracy_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(500, 9, generator=generator), torch.randint(0, 8, (500,), generator=generator)
    scores[torch.arange(500), labels] += 0.3
    names = tuple(f"class {n}" for n in range(9))
    measured = accuracy_of(scores.topk(5, dim=1).indices, labels, names)
    truth, values = labels.numpy(), scores.numpy()
    assert measured.top1 == pytest.approx(top_k_accuracy_score(truth, values, k=1, labels=range(9)))
    assert measured.top5 == pytest.approx(top_k_accuracy_score(truth, values, k=5, labels=range(9)))
    right = values.argmax(axis=1) == truth
    assert measured.per_class == pytest.approx({f"class {n}": right[truth == n].mean() for n in range(8)})
    stats = pytest.importorskip("scipy.stats")
    interval = stats.binomtest(int(right.sum()), 500).proportion_ci(method="wilson")
    assert (measured.low, measured.high) == pytest.approx((interval.low, interval.high))
    assert accuracy_of(scores[:, :4].topk(4).indices, labels % 4, names[:4]).top5 is None
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)


def test_a_grid_of_neighbours_is_scikit_learns() -> None:
    (bank, labels), (queries, _) = blobs(300, seed=5), blobs(90, seed=6)
    found = knn_predictions(bank, labels, queries, k=(1, 7, 30), temperatures=(0.07, 0.5), chunk=13)
    for (k, t), predicted in found.items():
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d, t=t: np.exp((1 - d) / t))
        expected = theirs.fit(bank.numpy(), labels.numpy()).predict(queries.numpy())
        assert (predicted.numpy() == expected).all(), (k, t)
    parts = [
        knn_predictions(bank, labels, queries, k=(7,), temperatures=(0.07,), rows=rows)[7, 0.07]
        for rows in (range(40), range(40, 40), range(40, 90))
    ]
    assert torch.equal(torch.cat(parts), found[7, 0.07])
    cosine, nearest = nearest_images(bank, queries, [3, 50], k=5)
    distance, place = theirs.kneighbors(queries.numpy()[[3, 50]], n_neighbors=5)
    assert nearest.tolist() == place.tolist()
    np.testing.assert_allclose(cosine, 1 - distance, atol=1e-6)
    _, others = nearest_images(bank, None, [0, 299], k=299)
    assert 0 not in others[0]
    assert 299 not in others[1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Setting(lr=0, weight_decay=0), r"^lr is 0 but must be a number above 0"),
        (lambda: Setting(lr=1, weight_decay=-1), r"^weight_decay is -1 but"),
        (lambda: fit(*blobs(5, seed=0), [], classes=4, epochs=1), "no settings"),
        (lambda: fit(*blobs(5, seed=0), GRID, classes=4, epochs=1, batch_size=0), "batch_size is 0 for 5 images"),
        (
            lambda: knn_predictions(*blobs(5, seed=0), k=(2,), temperatures=(0.0,)),
            r"^temperatures is .* must be one or more numbers above 0",
        ),
        (lambda: knn_predictions(*blobs(5, seed=0), k=(5,), temperatures=(1.0,)), "between 1 and the 4 images"),
    ],
)
def test_what_cannot_be_is_a_sentence(wrong: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        wrong()  # type: ignore[operator]

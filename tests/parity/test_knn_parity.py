"""kNN accuracy against a loop over images in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvssl.evaluate.knn import knn_accuracy
from pipelines.runtime import InputError


def loop_accuracy(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray, k: int, t: float, loo: bool
) -> float:
    correct = 0
    for i, query in enumerate(queries):
        cosine = np.array([query @ x / (np.linalg.norm(query) * np.linalg.norm(x)) for x in bank])
        order = [j for j in np.argsort(-cosine) if not (loo and j == i)][:k]
        votes: dict[int, float] = {}
        for j in order:
            votes[int(labels[j])] = votes.get(int(labels[j]), 0.0) + np.exp(cosine[j] / t)
        correct += max(votes, key=votes.__getitem__) == truth[i]
    return correct / len(queries)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("loo", [False, True])
def test_equals_loop(chunk: int, loo: bool) -> None:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(5, 6))
    labels, truth = rng.integers(0, 5, 60), rng.integers(0, 5, 40)
    bank = centers[labels] + 1.5 * rng.normal(size=(60, 6))
    queries = centers[truth] + 1.5 * rng.normal(size=(40, 6))
    given = () if loo else (torch.from_numpy(queries), torch.from_numpy(truth))
    ks = (20, 1, 59 if loo else 60)
    ours = knn_accuracy(torch.from_numpy(bank), torch.from_numpy(labels), *given, k=ks, temperature=0.2, chunk=chunk)
    assert list(ours) == list(ks)
    for k, accuracy in ours.items():
        asked, answers = (bank, labels) if loo else (queries, truth)
        assert accuracy == loop_accuracy(bank, labels, asked, answers, k, 0.2, loo)
    assert 0.2 < ours[20] < 1.0  # neither chance nor trivial


def test_an_image_is_not_its_own_neighbour() -> None:
    features = torch.eye(4).repeat_interleave(2, dim=0) + 0.01 * torch.randn(8, 4)
    labels = torch.arange(8)  # the twin of each image has another label
    assert knn_accuracy(features, labels, k=(1,)) == {1: 0.0}
    assert knn_accuracy(features, labels, features, labels, k=(1,)) == {1: 1.0}


def test_low_temperature_stays_finite() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    labels = torch.tensor([1, 1, 0])
    assert knn_accuracy(features, labels, features, labels, k=(3,), temperature=1e-3) == {3: 1.0}


def test_bad_input_is_named() -> None:
    x, y = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(InputError, match="between 1 and the 5 images"):
        knn_accuracy(x, y, x, y, k=(6,))
    with pytest.raises(InputError, match="between 1 and the 4 images"):
        knn_accuracy(x, y, k=(5,))
    with pytest.raises(InputError, match="without a label"):
        knn_accuracy(x, y - 1, k=(1,))
    with pytest.raises(InputError, match="4 test_labels"):
        knn_accuracy(x, y, x, y[:4], k=(1,))
    with pytest.raises(InputError, match="give both"):
        knn_accuracy(x, y, x, k=(1,))

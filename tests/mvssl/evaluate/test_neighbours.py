"""Nearest neighbours and projections against scikit-learn, and with sets of any size."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from mvssl.evaluate import projection
from mvssl.evaluate.neighbours import find_neighbours
from mvssl.evaluate.projection import pca, umap
from pipelines.runtime import InputError


def features(images: int, width: int, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(images, width)) * np.linspace(3, 0.2, width) + rng.normal(size=width)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("queries", [None, features(17, 12, seed=1)])
def test_neighbours_are_those_of_scikit_learn(queries: np.ndarray | None, as_tensor: bool) -> None:
    bank = features(60, 12)
    distance, rows = NearestNeighbors(n_neighbors=5, metric="cosine").fit(bank).kneighbors(queries)
    given: Any = (bank, queries)
    if as_tensor:
        given = (torch.from_numpy(bank), None if queries is None else torch.from_numpy(queries))
    found = find_neighbours(*given, k=5)
    assert found.rows.tolist() == rows.tolist()
    assert np.allclose(1 - found.cosine.numpy(), distance, atol=1e-9)


def test_a_bank_of_fewer_images_gives_fewer_neighbours() -> None:
    assert find_neighbours(features(4, 3), k=8).rows.shape == (4, 3)
    assert find_neighbours(features(4, 3), features(2, 3), k=8).rows.shape == (2, 4)
    assert find_neighbours(features(1, 3), k=8).rows.shape == (1, 0)


@pytest.mark.parametrize(
    ("bank", "queries", "words"),
    [
        (np.ones(3), None, "must be numbers \\[N, D\\]"),
        (np.ones((0, 3)), None, "must be numbers"),
        (np.full((2, 3), np.nan), None, "not finite"),
        (np.ones((2, 3)), np.ones((2, 4)), "of width 4 but must be of 3"),
    ],
)
def test_other_features_are_refused(bank: np.ndarray, queries: np.ndarray | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        find_neighbours(bank, queries)
    with pytest.raises(InputError, match="k is 0 but must be 1 or more"):
        find_neighbours(np.ones((2, 3)), k=0)


@pytest.mark.parametrize(("images", "width"), [(200, 16), (20, 64), (3, 5), (2, 1)])
def test_components_are_those_of_scikit_learn(images: int, width: int) -> None:
    values = features(images, width)
    found = pca(values, dims=2)
    theirs = PCA(n_components=min(2, images, width), svd_solver="full").fit(values)
    expected = theirs.transform(values)
    assert found.points.shape == (images, 2)
    for component in range(expected.shape[1]):
        sign = np.sign(expected[:, component] @ found.points[:, component]) or 1.0
        assert np.allclose(found.points[:, component], sign * expected[:, component], atol=1e-6)
    assert np.allclose(found.explained[: expected.shape[1]], theirs.explained_variance_ratio_, atol=1e-9)
    assert np.allclose(pca(torch.from_numpy(values).float()).points, found.points, atol=1e-4)  # of one sign


@pytest.mark.parametrize("values", [np.ones((5, 3)), np.ones((1, 3)), np.zeros((4, 2))])
def test_equal_images_lie_in_one_point(values: np.ndarray) -> None:
    assert not pca(values).points.any()
    assert pca(values).explained == (0.0, 0.0)


def test_umap_without_its_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "has_umap", lambda: False)
    with pytest.raises(InputError, match="umap-learn is not installed: pip install 'mvssl\\[umap\\]'"):
        umap(features(40, 4))


@pytest.mark.slow  # numba compiles it
@pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="umap-learn is not installed")
def test_umap_separates_clusters_and_repeats() -> None:
    values = np.concatenate([features(20, 8, seed=n) / 10 + 5 * np.eye(8)[n] for n in range(2)])
    first = umap(values, seed=3).points
    assert np.array_equal(first, umap(values, seed=3).points)
    centres = np.stack([first[:20].mean(axis=0), first[20:].mean(axis=0)])
    nearest = np.linalg.norm(first[:, None] - centres, axis=2).argmin(axis=1)
    assert nearest.tolist() == [0] * 20 + [1] * 20
    with pytest.raises(InputError, match="UMAP of 3 images"):
        umap(values[:3])
    assert umap(values[:8]).points.shape == (8, 2)

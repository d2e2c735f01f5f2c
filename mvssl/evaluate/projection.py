"""Projections of features to the plane: principal components, and UMAP where umap-learn is installed."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mvssl.evaluate.neighbours import checked_features
from pipelines.runtime import InputError, invalid

NEEDS_UMAP = "umap-learn is not installed: pip install 'mvssl[umap]'"
UMAP_IMAGES = 8
"""Fewest images that UMAP is of use for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Features in a few dimensions.

    Attributes:
        points: float64 [N, dims].
        explained: fraction of the features' variance along each of the dimensions, [dims]; () where there is none.
    """

    points: NDArray[np.float64]
    explained: tuple[float, ...] = ()


def pca(features: Tensor | NDArray[Any], *, dims: int = 2) -> Projection:
    """Principal components: centred features on the directions of largest variance, in float64.

    The sign of each is that which makes the largest coefficient of its direction positive, so that the result does not
    depend on the library. Dimensions beyond the rank of the features are 0.

    Args:
        features: float [N, D].
        dims: number of components.

    Raises:
        InputError: features are no finite [N, D], or `dims` is below 1.
    """
    if dims < 1:
        raise invalid("dims", dims, "1 or more", "2 are plotted")
    values = checked_features("features", features).double().cpu().numpy()
    centred = values - values.mean(axis=0)
    images, width = centred.shape
    # The smaller of the two products has the same eigenvalues.
    small = centred.T @ centred if width <= images else centred @ centred.T
    variances, vectors = np.linalg.eigh(small)
    largest = np.argsort(variances)[::-1][:dims]
    variances, vectors = np.maximum(variances[largest], 0), vectors[:, largest]
    total = float((centred**2).sum())
    kept = variances > total * 1e-12  # the others are rounding
    directions = vectors if width <= images else centred.T @ vectors  # [D, dims]
    directions = directions / np.maximum(np.linalg.norm(directions, axis=0), 1e-300) * kept
    strongest = directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])]
    directions = directions * np.where(strongest < 0, -1.0, 1.0)
    points = np.zeros((images, dims))
    points[:, : directions.shape[1]] = centred @ directions
    explained = np.zeros(dims)
    explained[: len(variances)] = variances * kept / total if total > 0 else 0.0
    return Projection(points=points, explained=tuple(explained.tolist()))


def has_umap() -> bool:
    """Whether umap-learn is installed."""
    return importlib.util.find_spec("umap") is not None


def umap(
    features: Tensor | NDArray[Any], *, dims: int = 2, neighbours: int = 15, min_distance: float = 0.1, seed: int = 0
) -> Projection:
    """UMAP by umap-learn (McInnes et al., arXiv 1802.03426) with cosine distances; the same seed gives the same result.

    Args:
        features: float [N, D] of `UMAP_IMAGES` images or more.
        dims: number of dimensions.
        neighbours: of each image that are kept near; fewer if there are fewer images.
        min_distance: between points in the plane.
        seed: of the initialisation and the sampled edges.

    Raises:
        InputError: umap-learn is not installed, there are too few images, or features are no finite [N, D].
    """
    if not has_umap():
        raise InputError(f"UMAP is asked for but {NEEDS_UMAP}.")
    values = checked_features("features", features).float().cpu().numpy()
    if len(values) < UMAP_IMAGES:
        raise InputError(f"UMAP of {len(values)} images is of no use: give at least {UMAP_IMAGES}, or use PCA.")
    from umap import UMAP

    reducer = UMAP(
        n_components=dims,
        n_neighbors=min(neighbours, len(values) - 1),
        min_dist=min_distance,
        metric="cosine",
        random_state=seed,
        n_jobs=1,  # more would not be reproducible
        init="spectral" if len(values) > 4 * dims + 16 else "random",  # which needs more images than dimensions
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        points = reducer.fit_transform(values)
    return Projection(points=np.asarray(points, dtype=np.float64))

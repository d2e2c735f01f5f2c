"""Nearest neighbours of images by the cosine similarity of their features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipelines.runtime import InputError, invalid


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbours:
    """The nearest images of M queries, on the device of the features.

    Attributes:
        cosine: float [M, k], similarities, descending; the cosine distance is 1 - cosine.
        rows: int64 [M, k], rows of the bank.
    """

    cosine: Tensor
    rows: Tensor


def find_neighbours(
    features: Tensor | NDArray[Any], queries: Tensor | NDArray[Any] | None = None, *, k: int = 8
) -> Neighbours:
    """The k images with the most similar features, by cosine, nearest first.

    Args:
        features: float [N, D], the bank.
        queries: float [M, D]; None takes each image of the bank, which is then no neighbour of itself.
        k: number of neighbours; there are fewer if the bank has fewer images.

    Raises:
        InputError: k is below 1, the bank is empty, or features are no finite [N, D].
    """
    if k < 1:
        raise invalid("k", k, "1 or more", "give a number of neighbours such as 8")
    bank = checked_features("features", features)
    tests = None if queries is None else checked_features("queries", queries).to(bank.device)
    if tests is not None and tests.shape[1] != bank.shape[1]:
        raise InputError(
            f"queries is of width {tests.shape[1]} but must be of {bank.shape[1]}, as features: embed both with one "
            "backbone."
        )
    k = min(k, len(bank) - (tests is None))
    cosine, rows = nearest_images(bank, tests, range(len(bank if tests is None else tests)), k=k)
    return Neighbours(cosine=cosine, rows=rows)


def checked_features(name: str, features: Tensor | NDArray[Any]) -> Tensor:
    """Features [N, D] as a tensor of float32 or float64 on their device.

    Raises:
        InputError: they are of another shape or kind, empty, or not finite; `name` is that of the argument.
    """
    values = torch.as_tensor(features)
    if values.ndim != 2 or 0 in values.shape or values.is_complex() or values.dtype == torch.bool:
        raise InputError(
            f"{name} is {values.dtype} {list(values.shape)} but must be numbers [N, D], one row for each image: give "
            "the features of one image or more."
        )
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if not bool(values.isfinite().all()):
        raise InputError(f"{name} is not finite (NaN or infinite) but must be: leave such rows out.")
    return values


def nearest_images(
    train_features: Tensor, test_features: Tensor | None, rows: Sequence[int], *, k: int
) -> tuple[Tensor, Tensor]:
    """The k most similar images of the bank: cosine [R, k], descending, and row in the bank, int64 [R, k].

    Args:
        train_features: float [N, D], the bank.
        test_features: float [M, D]; None compares with the other images of the bank.
        rows: R test images.
        k: number of neighbours.
    """
    queries = torch.tensor(rows, dtype=torch.int64, device=train_features.device)
    parts = list(nearest_in_chunks(train_features, test_features, k, 256, queries))
    return torch.cat([cosine for cosine, _ in parts]), torch.cat([nearest for _, nearest in parts])


def nearest_in_chunks(
    train_features: Tensor, test_features: Tensor | None, k: int, chunk: int, rows: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields cosine [C, k], descending, and row in the bank [C, k] for each chunk of test images."""
    dtype = torch.promote_types(train_features.dtype, torch.float32)
    bank = F.normalize(train_features.to(dtype), dim=1)  # [N, D]
    tests = bank if test_features is None else test_features
    for chunk_rows in torch.split(rows, chunk):
        similarity = F.normalize(tests[chunk_rows].to(dtype), dim=1) @ bank.T  # [C, N]
        if test_features is None:
            similarity.scatter_(1, chunk_rows[:, None], -torch.inf)  # an image is not its own neighbour
        cosine, nearest = similarity.topk(k, dim=1)
        yield cosine, nearest

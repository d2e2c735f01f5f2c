"""Weighted k-nearest-neighbour classification of frozen features (SPEC section 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.errors import InputError, invalid

Setting = tuple[int, float]
"""Number of neighbours and temperature."""


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor | None = None,
    test_labels: Tensor | None = None,
    *,
    k: tuple[int, ...] = (20, 10),
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[int, float]:
    """Top-1 accuracy of a vote of the k most similar training images, each weighing exp(cosine / temperature).

    Args:
        train_features: float [N, D], the neighbour bank.
        train_labels: int64 [N], each 0 or more.
        test_features: float [M, D]; None classifies each training image by all the others (leave one out).
        test_labels: int64 [M]; None exactly where `test_features` is.
        k: numbers of neighbours.
        temperature: of the votes, above 0.
        chunk: test images compared with the bank at a time; memory grows as chunk * N.

    Returns:
        Fraction of correct test images in [0, 1] for each k, in the order of `k`. Of classes with equal votes the one
        with the lowest number is taken.

    Raises:
        InputError: k is larger than the bank (less one when leaving one out) or below 1, a label is missing, lengths
            do not agree, or a set is empty.
    """
    if (test_features is None) != (test_labels is None):
        raise InputError("Only one of test_features and test_labels is given: give both, or none to leave one out.")
    truth = train_labels if test_labels is None else test_labels
    _check(train_features, train_labels, "train")
    _check(train_features if test_features is None else test_features, truth, "test")
    predicted = knn_predictions(
        train_features, train_labels, test_features, k=k, temperatures=(temperature,), chunk=chunk
    )
    return {neighbours: float((predicted[neighbours, temperature] == truth).double().mean()) for neighbours in k}


def knn_predictions(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor | None = None,
    *,
    k: Sequence[int],
    temperatures: Sequence[float],
    chunk: int = 1024,
    rows: range | None = None,
) -> dict[Setting, Tensor]:
    """The classes that a whole grid of k and temperature gives, in one pass over the similarities.

    Args:
        train_features: float [N, D], the neighbour bank.
        train_labels: int64 [N], each 0 or more.
        test_features: float [M, D]; None classifies each training image by all the others (leave one out).
        k: numbers of neighbours.
        temperatures: of the votes, each above 0.
        chunk: test images compared with the bank at a time.
        rows: classify these test images only (a rank's share); None takes all.

    Returns:
        int64 [M, or of `rows`] for each setting.

    Raises:
        InputError: k is larger than the bank (less one when leaving one out) or below 1, or a temperature is not
            above 0.
    """
    bank_size = len(train_features) - (test_features is None)
    if not k or min(k) < 1 or max(k) > bank_size:
        raise invalid(
            "k", tuple(k), f"between 1 and the {bank_size} images of the bank", "lower it or take more images"
        )
    if not temperatures or not min(temperatures) > 0:
        raise invalid("temperatures", tuple(temperatures), "one or more numbers above 0", "the usual one is 0.07")
    classes = int(train_labels.max()) + 1
    predicted: dict[Setting, list[Tensor]] = {(number, t): [] for number in k for t in temperatures}
    images = len(train_features if test_features is None else test_features)
    mine = torch.arange(images, device=train_features.device)
    mine = mine if rows is None else mine[rows.start : rows.stop]
    for cosine, nearest in _nearest(train_features, test_features, max(k), chunk, mine):
        label = train_labels[nearest]  # [C, max k]
        for t in temperatures:
            # One common factor exp(-1 / t) keeps the votes finite and changes no winner.
            weight = ((cosine - 1) / t).exp()  # [C, max k]
            for number in k:
                votes = weight.new_zeros(len(label), classes)  # [C, classes]
                votes.scatter_add_(1, label[:, :number], weight[:, :number])
                predicted[number, t].append(votes.argmax(dim=1))
    empty = train_labels.new_empty(0)
    return {setting: torch.cat([empty, *parts]) for setting, parts in predicted.items()}


def nearest_images(
    train_features: Tensor, test_features: Tensor | None, rows: Sequence[int], *, k: int
) -> tuple[Tensor, Tensor]:
    """The most similar images of the bank: cosine [R, k], falling, and row in the bank, int64 [R, k].

    Args:
        train_features: float [N, D].
        test_features: float [M, D]; None looks among the other images of the bank.
        rows: which of the test images.
        k: how many, at most as there are.
    """
    asked = torch.tensor(rows, device=train_features.device)
    parts = list(_nearest(train_features, test_features, k, 256, asked))
    return torch.cat([cosine for cosine, _ in parts]), torch.cat([nearest for _, nearest in parts])


def _nearest(
    train_features: Tensor, test_features: Tensor | None, k: int, chunk: int, rows: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosine [C, k], falling, and row in the bank [C, k], for one chunk of test images after the other."""
    dtype = torch.promote_types(train_features.dtype, torch.float32)
    bank = F.normalize(train_features.to(dtype), dim=1)  # [N, D]
    queries = bank if test_features is None else test_features
    for some in torch.split(rows, chunk):
        similarity = F.normalize(queries[some].to(dtype), dim=1) @ bank.T  # [C, N]
        if test_features is None:
            similarity.scatter_(1, some[:, None], -torch.inf)  # an image is not its own neighbour
        cosine, nearest = similarity.topk(k, dim=1)
        yield cosine, nearest


def _check(features: Tensor, labels: Tensor, name: str) -> None:
    """Raise InputError unless each row has a label."""
    if len(features) != len(labels) or len(labels) == 0:
        raise InputError(
            f"{name}_features has {len(features)} rows for {len(labels)} {name}_labels but both must be the "
            "same number, at least 1: give one label for each image."
        )
    if bool((labels < 0).any()):
        raise InputError(f"{name}_labels has images without a label (-1): kNN needs labels for all of them.")

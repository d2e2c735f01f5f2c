"""Weighted k-nearest-neighbour classification of frozen features (SPEC section 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.errors import InputError, invalid


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
    leave_one_out = test_features is None
    if test_features is None or test_labels is None:
        if (test_features is None) != (test_labels is None):
            raise InputError("Only one of test_features and test_labels is given: give both, or none to leave one out.")
        test_features, test_labels = train_features, train_labels
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        if len(features) != len(labels) or len(labels) == 0:
            raise InputError(
                f"{name}_features has {len(features)} rows for {len(labels)} {name}_labels but both must be the "
                "same number, at least 1: give one label for each image."
            )
        if bool((labels < 0).any()):
            raise InputError(f"{name}_labels has images without a label (-1): kNN needs labels for all of them.")
    bank_size = len(train_features) - leave_one_out
    if not k or min(k) < 1 or max(k) > bank_size:
        raise invalid("k", k, f"between 1 and the {bank_size} images of the bank", "lower it or take more images")

    dtype = torch.promote_types(train_features.dtype, torch.float32)
    bank = F.normalize(train_features.to(dtype), dim=1)  # [N, D]
    queries = F.normalize(test_features.to(dtype), dim=1)  # [M, D]
    classes = int(torch.maximum(train_labels.max(), test_labels.max())) + 1
    correct = dict.fromkeys(k, 0)
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ bank.T  # [C, N]
        if leave_one_out:
            rows = torch.arange(len(similarity), device=similarity.device)
            similarity[rows, rows + start] = -torch.inf
        cosine, nearest = similarity.topk(max(k), dim=1)  # [C, max k], falling
        # One common factor exp(-1 / temperature) keeps the votes finite and changes no winner.
        weight = ((cosine - 1) / temperature).exp()  # [C, max k]
        label = train_labels[nearest]  # [C, max k]
        truth = test_labels[start : start + chunk]  # [C]
        for neighbours in k:
            votes = weight.new_zeros(len(label), classes)  # [C, classes]
            votes.scatter_add_(1, label[:, :neighbours], weight[:, :neighbours])
            correct[neighbours] += int((votes.argmax(dim=1) == truth).sum())
    return {neighbours: count / len(queries) for neighbours, count in correct.items()}

"""kNN accuracy of a backbone during training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mvssl.config.recipe import Evaluation
from mvssl.evaluate.features import extract_features
from mvssl.evaluate.knn import knn_accuracy
from mvssl.evaluate.session import Session
from pipelines.runtime import InputError, invalid
from pipelines.storage import align_labels
from pipelines.storage.source import Source


def check_knn_data(train: Source, val: Source | None, evaluation: Evaluation) -> None:
    """Check that kNN accuracy can be computed, before anything is embedded.

    Raises:
        InputError: images have no labels, val has a class that train lacks, or there are fewer images than neighbours.
    """
    for split, source in (("training", train), ("validation", val)):
        if source is not None and bool((source.labels < 0).any()):
            raise InputError(
                f"kNN needs labels but the {split} data ({source.location}) has images without one: put the images "
                "into one folder per class, or turn kNN off (--evaluation.every-epochs 0)."
            )
    if val is not None:
        align_labels(val, train.classes)
    bank = min(len(train), evaluation.max_train or len(train)) - (val is None)
    if max(evaluation.k) > bank:
        raise invalid(
            "Evaluation.k", evaluation.k, f"at most {bank}, the images to compare with", "lower --evaluation.k"
        )


def evaluate_knn(
    session: Session,
    backbone: nn.Module,
    train: Source,
    val: Source | None,
    evaluation: Evaluation,
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[int, float]:
    """Top-1 accuracy in [0, 1] for each k: val by train, or without val each training image by all others.

    The ranks share the work and use rank 0's BatchNorm statistics. `progress` is called with the number of images of a
    split that are done; an exception in it ends the evaluation.

    Raises:
        InputError: as `check_knn_data` and `extract_features`.
        OtherRankFailed: another rank failed.
    """
    check_knn_data(train, val, evaluation)
    session.world.broadcast_from_rank0(backbone.buffers())
    bank = extract_features(session, backbone, train, evaluation, max_images=evaluation.max_train, progress=progress)
    test_features, test_labels = None, None
    if val is not None:
        queries = extract_features(session, backbone, val, evaluation, progress=progress)
        test_features = queries.values
        test_labels = torch.from_numpy(align_labels(val, train.classes))[queries.index].to(session.device)  # [M]
    return knn_accuracy(
        bank.values, bank.labels, test_features, test_labels, k=evaluation.k, temperature=evaluation.temperature
    )

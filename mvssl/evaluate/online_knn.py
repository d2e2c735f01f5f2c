"""kNN accuracy of a backbone on a data set, as the training run and mvssl-eval report it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from mvssl.config.recipe import Evaluation
from mvssl.distributed import World
from mvssl.evaluate.features import extract_features
from mvssl.evaluate.knn import knn_accuracy
from pipelines.decode import DecodeOptions
from pipelines.runtime import InputError, invalid
from pipelines.storage import align_labels
from pipelines.storage.source import Source


def check_knn_data(train: Source, val: Source | None, evaluation: Evaluation) -> None:
    """Check that kNN accuracy can be computed, before anything is embedded.

    Raises:
        InputError: images have no labels, val has a class that train lacks, or there are fewer images than neighbours.
    """
    for what, source in (("training", train), ("validation", val)):
        if source is not None and bool((source.labels < 0).any()):
            raise InputError(
                f"kNN needs labels but the {what} data ({source.location}) has images without one: put the "
                "images into one folder per class, or leave the kNN out (--evaluation.every-epochs 0)."
            )
    if val is not None:
        align_labels(val, train.classes)
    bank = min(len(train), evaluation.max_train or len(train)) - (val is None)
    if max(evaluation.k) > bank:
        raise invalid(
            "Evaluation.k", evaluation.k, f"at most {bank}, the images to compare with", "lower --evaluation.k"
        )


def evaluate_knn(
    backbone: nn.Module,
    train: Source,
    val: Source | None,
    evaluation: Evaluation,
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
    decode: DecodeOptions | None = None,
    progress: Callable[[int], None] | None = None,
    world: World | None = None,
) -> dict[int, float]:
    """Top-1 accuracy in [0, 1] for each k of the evaluation.

    With `val`, its images are classified by the training images; without, each training image is by all the others
    (leave one out). `progress` is called with the number of images of a split that are done; what it raises ends the
    evaluation. The ranks of a `world` embed a share of the images each, with the BatchNorm statistics of rank 0.

    Raises:
        InputError: as `check_knn_data`.
        OtherRankFailed: another rank failed.
    """
    check_knn_data(train, val, evaluation)
    if world is not None:
        world.broadcast_from_rank0(backbone.buffers())
    extract = partial(
        extract_features,
        backbone,
        evaluation=evaluation,
        device=device,
        autocast=autocast,
        decode=decode,
        progress=progress,
        world=world,
    )
    bank = extract(train, max_images=evaluation.max_train)
    if val is None:
        return knn_accuracy(bank.values, bank.labels, k=evaluation.k, temperature=evaluation.temperature)
    queries = extract(val)
    labels = torch.from_numpy(align_labels(val, train.classes))[queries.index].to(device)  # [M]
    return knn_accuracy(
        bank.values, bank.labels, queries.values, labels, k=evaluation.k, temperature=evaluation.temperature
    )

"""kNN and linear accuracy of a backbone during training."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mvssl.config.recipe import Evaluation
from mvssl.evaluate.features import extract_features
from mvssl.evaluate.knn import knn_accuracy
from mvssl.evaluate.online_probe import probe_accuracy
from mvssl.evaluate.session import Session
from pipelines.runtime import InputError, invalid
from pipelines.storage.source import Source, SubsetSource


def scorable(train: Source, val: Source | None) -> tuple[bool, Source | None, str]:
    """Whether kNN accuracy of these images says anything, the validation images that it is of, and what is left out.

    The images of both need labels of two classes or more. Validation images of classes that train lacks are left out.

    Returns:
        Whether there is an accuracy, the validation images, and a note for the user; "" if nothing is left out.
    """
    for source in (train, val):
        without = 0 if source is None else int((source.labels < 0).sum())
        if source is not None and without:
            some = "the" if without == len(source) else f"{without:,} of {len(source):,}"
            return False, val, f"no kNN: {some} {'validation ' * (source is val)}images have no labels"
    present = np.unique(train.labels)
    if len(present) < 2:
        return False, val, f"no kNN: all training images are of the one class {train.classes[present[0]]!r}"
    if val is None:
        return True, None, ""
    names = {train.classes[label] for label in present}
    known = np.array([name in names for name in val.classes])[val.labels]  # bool [len(val)]
    shared = [val.classes[label] for label in np.unique(val.labels[known])]
    if len(shared) == 1:
        some = "all" if known.all() else "those of classes that train has"
        return False, val, f"no kNN: of the validation images {some} are of the one class {shared[0]!r}"
    if known.all():
        return True, val, ""
    others = sorted({val.classes[label] for label in np.unique(val.labels[~known])})
    classes = f"{len(others)} {'classes' if len(others) > 1 else 'class'}"
    example = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    similar = {_folded(name): name for name in names}
    twin = next((name for name in others if _folded(name) in similar), None)
    example += "" if twin is None else f"; train has {similar[_folded(twin)]!r}, not {twin!r}"
    if not known.any():
        return False, val, f"no kNN: the validation images are of {classes} that no training image has ({example})"
    note = (
        f"kNN leaves out {int((~known).sum()):,} of {len(val):,} validation images, of {classes} that no training "
        f"image has ({example})"
    )
    return True, SubsetSource(val, np.flatnonzero(known)), note


def _folded(name: str) -> str:
    """A class name without what differs by mistake: case, spaces at its ends, form of Unicode."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def check_knn_data(train: Source, val: Source | None, evaluation: Evaluation) -> None:
    """Check that kNN accuracy can be computed, before anything is embedded.

    Raises:
        InputError: images have no labels, or there are fewer images than neighbours.
    """
    for split, source in (("training", train), ("validation", val)):
        if source is not None and bool((source.labels < 0).any()):
            raise InputError(
                f"kNN needs labels but the {split} data ({source.location}) has images without one: put the images "
                "into one folder per class, or turn kNN off (--evaluation.every-epochs 0)."
            )
    bank = min(len(train), evaluation.max_train or len(train)) - (val is None)
    if max(evaluation.k) > bank:
        raise invalid(
            "Evaluation.k", evaluation.k, f"at most {bank}, the images to compare with", "lower --evaluation.k"
        )


@dataclass(frozen=True, kw_only=True)
class OnlineAccuracy:
    """Accuracy of a backbone at one step.

    Attributes:
        knn: kNN top-1 accuracy in [0, 1] for each k.
        probe: top-1 accuracy in [0, 1] of a linear classifier; None if the recipe has none.
    """

    knn: dict[int, float]
    probe: float | None = None


def evaluate_online(
    session: Session,
    backbone: nn.Module,
    train: Source,
    val: Source | None,
    evaluation: Evaluation,
    *,
    progress: Callable[[int], None] | None = None,
) -> OnlineAccuracy:
    """Accuracy of val by train; without val of each training image by all others (kNN), or of a held-out part (probe).

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
        test_labels = torch.from_numpy(_labels(val, train))[queries.index].to(session.device)  # [M]
    knn = knn_accuracy(
        bank.values, bank.labels, test_features, test_labels, k=evaluation.k, temperature=evaluation.temperature
    )

    def probe() -> float:
        return probe_accuracy(
            bank.values,
            bank.labels,
            test_features,
            test_labels,
            classes=len(train.classes),
            progress=None if progress is None else lambda: progress(len(bank.labels)),
        )

    return OnlineAccuracy(knn=knn, probe=session.world.run_on_rank0(probe) if evaluation.probe else None)


def _labels(val: Source, train: Source) -> NDArray[np.int64]:
    """Labels of `val`, int64 [M], in the numbering of train's classes; class names without an image do not matter."""
    number = {name: label for label, name in enumerate(train.classes)}
    return np.array([number.get(name, -1) for name in val.classes], dtype=np.int64)[val.labels]

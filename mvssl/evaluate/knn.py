"""Weighted k-nearest-neighbour classification of frozen features (PAPER.md section 6), and a sheet of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from mvssl.evaluate.accuracy import accuracy_of
from mvssl.evaluate.features import cached_features, load_features
from mvssl.evaluate.neighbours import nearest_images as nearest_images
from mvssl.evaluate.neighbours import nearest_in_chunks
from mvssl.evaluate.session import EvalSession, check_labelled
from pipelines.decode.pillow import decode_one
from pipelines.files import whole_file
from pipelines.runtime import InputError, invalid
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source


def knn_grid(session: EvalSession, *, k: Sequence[int], temperatures: Sequence[float]) -> dict[str, Any]:
    """Accuracy for every k and temperature: val by train, or without val each image by all others.

    Each rank embeds and classifies a part of the images; the numbers are those of one process.

    Raises:
        InputError: labels are missing or do not match, or there are fewer images than neighbours.
    """
    train, val, world = session.train, session.val, session.world
    check_labelled("kNN", train, val)
    val_labels = train.labels if val is None else session.labelled_val()[1]
    bank_size = len(train) - (val is None)
    if max(k) > bank_size:
        raise invalid("k", max(k), f"at most {bank_size}, the images to compare with", "lower --k")
    bank, labels, _ = load_features(session, cached_features(session, train, "train"), train.labels)
    max_train = session.loaded.evaluation.max_train
    if max_train is not None and max_train < len(bank):  # evenly spaced, as during training
        some = torch.linspace(0, len(bank) - 1, max_train, dtype=torch.float64).round().long()
        bank, labels = bank[some.to(bank.device)], labels[some.to(labels.device)]
    queries, truth = None, labels
    if val is not None:
        queries, truth, _ = load_features(session, cached_features(session, val, "val"), val_labels)
    labels, truth = labels.to(bank.device), truth.to(bank.device)
    count = len(truth)
    rows = range(count * world.rank // world.size, count * (world.rank + 1) // world.size)
    settings = []
    predicted = knn_predictions(bank, labels, queries, k=k, temperatures=temperatures, rows=rows)
    for (number, temperature), classes in predicted.items():
        accuracy = accuracy_of(world.gather_rows(classes)[:, None], truth, train.classes)
        settings.append({"k": number, "temperature": temperature, **accuracy.to_dict()})
    return {
        "settings": [{key: s[key] for key in ("k", "temperature", "top1", "top1_interval_95")} for s in settings],
        "best": max(settings, key=lambda setting: setting["top1"]),
        "images": count,
        "neighbours": len(labels),
        "leave_one_out": val is None,
    }


def grid_rows(results: dict[str, Any]) -> list[list[str]]:
    """Table rows of `knn_grid`: k, temperature, top-1 and its interval, in per cent."""
    return [
        [
            str(setting["k"]),
            f"{setting['temperature']:g}",
            f"{100 * setting['top1']:.2f}",
            "{:.1f} to {:.1f}".format(*(100 * end for end in setting["top1_interval_95"])),
        ]
        for setting in results["settings"]
    ]


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
    """Top-1 accuracy in [0, 1] for each k; the arguments are those of `knn_predictions`.

    Without `test_features` and `test_labels`, each training image is classified by all others.

    Raises:
        InputError: as `knn_predictions`, or a label is missing, lengths do not match, or a set is empty.
    """
    if (test_features is None) != (test_labels is None):
        raise InputError("Only one of test_features and test_labels is given: give both, or neither for leave-one-out.")
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
) -> dict[tuple[int, float], Tensor]:
    """Classify images by a vote of the k most similar training images, each weighted exp(cosine / temperature).

    The whole grid of k and temperature takes one pass over the similarities.

    Args:
        train_features: float [N, D], the bank.
        train_labels: int64 [N], each 0 or more.
        test_features: float [M, D]; None classifies each training image by all others (leave-one-out).
        k: numbers of neighbours.
        temperatures: each above 0.
        chunk: test images compared with the bank at a time; memory grows as chunk * N.
        rows: test images to classify (a rank's part); None takes all.

    Returns:
        Classes int64 [M, or length of `rows`] for each (k, temperature). Ties go to the lowest class number.

    Raises:
        InputError: k is below 1 or exceeds the bank (less one for leave-one-out), or a temperature is not above 0.
    """
    bank_size = len(train_features) - (test_features is None)
    if not k or min(k) < 1 or max(k) > bank_size:
        raise invalid(
            "k", tuple(k), f"between 1 and the {bank_size} images of the bank", "lower it or take more images"
        )
    if not temperatures or not min(temperatures) > 0:
        raise invalid("temperatures", tuple(temperatures), "one or more numbers above 0", "the usual one is 0.07")
    classes = int(train_labels.max()) + 1
    predicted: dict[tuple[int, float], list[Tensor]] = {(number, t): [] for number in k for t in temperatures}
    images = len(train_features if test_features is None else test_features)
    rows = range(images) if rows is None else rows
    queries = torch.arange(images, device=train_features.device)[rows.start : rows.stop]
    for cosine, nearest in nearest_in_chunks(train_features, test_features, max(k), chunk, queries):
        label = train_labels[nearest]  # [C, max k]
        for t in temperatures:
            # The common factor exp(-1 / t) keeps the votes finite and changes no winner.
            weight = ((cosine - 1) / t).exp()  # [C, max k]
            for number in k:
                votes = weight.new_zeros(len(label), classes)  # [C, classes]
                votes.scatter_add_(1, label[:, :number], weight[:, :number])
                predicted[number, t].append(votes.argmax(dim=1))
    empty = train_labels.new_empty(0)
    return {setting: torch.cat([empty, *parts]) for setting, parts in predicted.items()}


def _check(features: Tensor, labels: Tensor, name: str) -> None:
    """Raise InputError unless each row has a label."""
    if len(features) != len(labels) or len(labels) == 0:
        raise InputError(
            f"{name}_features has {len(features)} rows for {len(labels)} {name}_labels but both must be the "
            "same number, at least 1: give one label for each image."
        )
    if bool((labels < 0).any()):
        raise InputError(f"{name}_labels has images without a label (-1): kNN needs labels for all of them.")


def neighbour_sheet(session: EvalSession, path: Path, *, images: int, neighbours: int = 8) -> None:
    """Draw some images, evenly spaced, with their nearest neighbours among the training images; labels are optional."""
    train, val = session.train, session.val
    queries = train if val is None else val
    bank, _, bank_index = load_features(session, cached_features(session, train, "train"), train.labels)
    query_features, query_index = None, bank_index
    if val is not None:
        query_features, _, query_index = load_features(session, cached_features(session, val, "val"), val.labels)
    k = min(neighbours, len(bank) - (val is None))

    def draw() -> None:
        rows = np.unique(np.linspace(0, len(query_index) - 1, images).round().astype(np.int64)).tolist()
        cosine, nearest = nearest_images(bank, query_features, rows, k=k)
        indices = query_index[rows].tolist()
        found = bank_index[nearest].cpu().numpy()  # [R, k]
        same = None
        if bool((train.labels >= 0).all()) and bool((queries.labels >= 0).all()):
            labels = train.labels if val is None else session.labelled_val()[1]
            same = train.labels[found] == labels[indices][:, None]
        _write_sheet(
            path, queries, train, indices=indices, nearest=found, cosine=cosine.float().cpu().numpy(), same=same
        )

    session.world.run_on_rank0(draw)


_TILE, _GAP, _FRAME, _TEXT = 96, 6, 3, 14
_SAME, _OTHER, _PLAIN = (38, 139, 70), (200, 55, 55), (170, 170, 170)  # of a sheet, in pixels and RGB


def _write_sheet(
    path: Path,
    queries: Source,
    bank: Source,
    *,
    indices: Sequence[int],
    nearest: NDArray[np.int64],
    cosine: NDArray[np.float32],
    same: NDArray[np.bool_] | None,
) -> None:
    """Draw one row per query: the image, then its neighbours with their cosine, nearest first.

    Args:
        path: the PNG to write.
        queries: source of the queries.
        bank: source of the neighbours.
        indices: R dataset indices of queries.
        nearest: int64 [R, k], dataset indices of neighbours.
        cosine: float32 [R, k].
        same: bool [R, k], whether labels agree (green or red frame); None without labels.
    """
    step = _TILE + _GAP
    width = step * (nearest.shape[1] + 1) + 3 * _GAP
    sheet = Image.new("RGB", (width, (step + _TEXT) * len(indices) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, query in enumerate(indices):
        y = _GAP + row * (step + _TEXT)
        sheet.paste(_tile(queries, query), (_GAP, y))
        for column, (other, value) in enumerate(zip(nearest[row].tolist(), cosine[row].tolist(), strict=True)):
            x = 3 * _GAP + (column + 1) * step - _GAP
            colour = _PLAIN if same is None else _SAME if same[row, column] else _OTHER
            pen.rectangle((x - _FRAME, y - _FRAME, x + _TILE + _FRAME - 1, y + _TILE + _FRAME - 1), fill=colour)
            sheet.paste(_tile(bank, other), (x, y))
            pen.text((x, y + _TILE + _FRAME), f"{value:.2f}", fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def _tile(source: Source, index: int) -> Image.Image:
    """Thumbnail of an image's centre, upright."""
    facts = facts_of(source)
    pixels = decode_one(source.read(index), value_range=facts.value_range, limits=facts.limits)
    if isinstance(pixels, str):  # replaced in place since its features were computed
        raise InputError(f"Image {source.key(index)} cannot be decoded ({pixels}): restore it.")
    return ImageOps.fit(Image.fromarray(pixels), (_TILE, _TILE))

"""Weighted k-nearest-neighbour classification of frozen features (PAPER.md section 6).

kNN accuracies of a backbone for a grid of k and temperature, and a sheet of neighbours.

A picture of images with their nearest neighbours: what a backbone takes for alike.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from mvssl.evaluate.features import loaded, stored
from mvssl.evaluate.session import Session, accuracy_of, check_labelled
from pipelines.runtime import InputError, invalid
from pipelines.storage.source import Source

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


_TILE, _GAP, _EDGE, _TEXT = 96, 6, 3, 14
_SAME, _OTHER, _PLAIN = (38, 139, 70), (200, 55, 55), (170, 170, 170)


def write_sheet(
    path: Path,
    queries: Source,
    bank: Source,
    *,
    asked: Sequence[int],
    nearest: NDArray[np.int64],
    cosine: NDArray[np.float32],
    same: NDArray[np.bool_] | None,
) -> None:
    """Draw one row for each query: the image, then its neighbours with their cosine, the nearest first.

    Args:
        path: the PNG to write.
        queries: where the queries are from.
        bank: where the neighbours are from.
        asked: R indices of queries.
        nearest: int64 [R, k], indices of neighbours.
        cosine: float32 [R, k].
        same: bool [R, k], whether the labels agree (green or red edge); None without labels.
    """
    step = _TILE + _GAP
    width = step * (nearest.shape[1] + 1) + 3 * _GAP
    sheet = Image.new("RGB", (width, (step + _TEXT) * len(asked) + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, query in enumerate(asked):
        y = _GAP + row * (step + _TEXT)
        sheet.paste(_tile(queries, query), (_GAP, y))
        for column, (other, value) in enumerate(zip(nearest[row].tolist(), cosine[row].tolist(), strict=True)):
            x = 3 * _GAP + (column + 1) * step - _GAP
            colour = _PLAIN if same is None else _SAME if same[row, column] else _OTHER
            pen.rectangle((x - _EDGE, y - _EDGE, x + _TILE + _EDGE - 1, y + _TILE + _EDGE - 1), fill=colour)
            sheet.paste(_tile(bank, other), (x, y))
            pen.text((x, y + _TILE + _EDGE), f"{value:.2f}", fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    sheet.save(aside, format="PNG")
    aside.replace(path)


def _tile(source: Source, index: int) -> Image.Image:
    """The centre of an image, upright."""
    with Image.open(io.BytesIO(source.read(index).tobytes())) as image:
        return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (_TILE, _TILE))


def knn_grid(session: Session, *, k: Sequence[int], temperatures: Sequence[float]) -> dict[str, Any]:
    """Accuracy for every k and temperature, in one pass: val by train, or without val each image by all the others.

    Several ranks compute a share of the features and classify a share of the images each; the numbers are those of one.

    Raises:
        InputError: labels are missing or do not agree, or there are fewer images than neighbours.
    """
    train, val = session.train, session.val
    check_labelled("kNN", train, val)
    val_labels = train.labels if val is None else session.val_labels()
    bank_size = len(train) - (val is None)
    if max(k) > bank_size:
        raise invalid("k", max(k), f"at most {bank_size}, the images to compare with", "lower --k")
    features, labels, _ = loaded(session, stored(session, train, "train"), train.labels)
    most = session.measured.evaluation.max_train
    if most is not None and most < len(features):  # evenly spaced, as while training
        some = torch.linspace(0, len(features) - 1, most, dtype=torch.float64).round().long()
        features, labels = features[some.to(features.device)], labels[some.to(labels.device)]
    queries, truth = (None, labels)
    if val is not None:
        queries, truth, _ = loaded(session, stored(session, val, "val"), val_labels)
    labels, truth = labels.to(features.device), truth.to(features.device)
    world, count = session.world, len(truth)
    rows = range(count * world.rank // world.size, count * (world.rank + 1) // world.size)
    predicted = knn_predictions(features, labels, queries, k=k, temperatures=temperatures, rows=rows)
    settings = []
    for (number, temperature), mine in predicted.items():
        classes = world.gather_rows(mine)  # [M]
        measured = accuracy_of(classes[:, None], truth, train.classes).to_dict()
        settings.append({"k": number, "temperature": temperature, **measured})
    best = max(settings, key=lambda setting: setting["top1"])
    return {
        "settings": [{name: s[name] for name in ("k", "temperature", "top1", "top1_interval_95")} for s in settings],
        "best": best,
        "images": count,
        "neighbours": len(labels),
        "leave_one_out": val is None,
    }


def neighbour_sheet(session: Session, path: Path, *, images: int, neighbours: int = 8) -> None:
    """Draw some images, evenly spaced, with their nearest neighbours among the training images; no labels needed."""
    train, val = session.train, session.val
    queries = train if val is None else val
    labelled = bool((train.labels >= 0).all()) and bool((queries.labels >= 0).all())
    bank, _, bank_image = loaded(session, stored(session, train, "train"), train.labels)
    asked_features, asked_image = None, bank_image
    if val is not None:
        asked_features, _, asked_image = loaded(session, stored(session, val, "val"), val.labels)
    neighbours = min(neighbours, len(bank) - (val is None))

    def draw() -> None:
        rows = np.unique(np.linspace(0, len(asked_image) - 1, images).round().astype(np.int64)).tolist()
        cosine, nearest = nearest_images(bank, asked_features, rows, k=neighbours)
        asked = asked_image[rows].tolist()
        found = bank_image[nearest].cpu().numpy()  # [R, k]
        same = None
        if labelled:
            of_query = train.labels if val is None else session.val_labels()
            same = train.labels[found] == of_query[asked][:, None]
        write_sheet(path, queries, train, asked=asked, nearest=found, cosine=cosine.float().cpu().numpy(), same=same)

    session.world.run_on_rank0(draw)


def plain_accuracy(results: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: k, temperature, top-1 with its interval."""
    return [
        [
            str(setting["k"]),
            f"{setting['temperature']:g}",
            f"{100 * setting['top1']:.2f}",
            "{:.1f} to {:.1f}".format(*(100 * end for end in setting["top1_interval_95"])),
        ]
        for setting in results["settings"]
    ]

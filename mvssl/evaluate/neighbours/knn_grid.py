"""kNN accuracies of a backbone for a grid of k and temperature, and a sheet of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvssl.evaluate.accuracy import accuracy_of
from mvssl.evaluate.features.shared import loaded, stored
from mvssl.evaluate.neighbours.knn import knn_predictions, nearest_images
from mvssl.evaluate.neighbours.neighbour_sheet import write_sheet
from mvssl.evaluate.session import Session, check_labelled
from pipelines.errors import invalid


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

    session.world.on_main(draw)


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

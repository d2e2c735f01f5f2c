"""A Dataset of Hugging Face's `datasets` as a source: finds the columns of images and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.runtime import InputError
from pipelines.storage.items import IMAGE_NAMES, LABEL_NAMES, ItemSource, as_labels, labels_of, named_labels
from pipelines.storage.source import Source

_ENCODED = ("binary", "large_binary", "binary_view")
_TEXT = ("string", "large_string", "string_view")


def hub_source(dataset: Any, *, field: str = "data") -> Source:
    """The images of a Dataset. Encoded images are read undecoded, many at a time.

    A column of the feature Image, or else of bytes, paths or pixels, is the images; of several, one with a likely name
    (`IMAGE_NAMES`). Labels are a column of the feature ClassLabel, or of a likely name (`LABEL_NAMES`). A Dataset with
    a transform of its own (`set_transform`) is asked for items as any other dataset.

    Raises:
        InputError: no column, or more than one, may be that of the images.
    """
    count = len(dataset)
    if dataset.format["type"] == "custom":
        labels, classes = labels_of(dataset, count, dataset.__getitem__)
        name = f"a transformed Dataset with {count:,} rows"
        return ItemSource(
            dataset.__getitem__, count, name=name, labels=labels, classes=classes, one_at_a_time=True, field=field
        )
    plain = dataset.with_format(None)
    image = _image_column(plain, field)
    label = _label_column(plain, image)
    labels, classes = None, ()
    if label is not None:
        feature = plain.features[label]
        column = as_labels(plain.select_columns([label])[:][label], count)
        names = tuple(feature.names) if _kind(feature) == "ClassLabel" and feature.names else ()
        if column is not None and names:
            labels, classes = np.array([-1 if one is None else int(one) for one in column], dtype=np.int64), names
        elif column is not None:
            labels, classes = named_labels(column)
    rows = plain.select_columns([image])
    if _kind(plain.features[image]) == "Image":
        import datasets

        rows = rows.cast_column(image, datasets.Image(decode=False))

    def fetch_many(indices: Sequence[int]) -> Sequence[object]:
        return [_item(value) for value in rows[list(indices)][image]]

    of_labels = "" if label is None else f", labels of {label!r}"
    return ItemSource(
        lambda index: _item(rows[index][image]),
        count,
        name=f"a Dataset with {count:,} rows (images of column {image!r}{of_labels})",
        labels=labels,
        classes=classes,
        fetch_many=fetch_many,
        constant=True,
        field=field,
    )


def _item(value: Any) -> object:
    """A cell as an image: nested lists of numbers become pixels."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        pixels = np.asarray(value)
        return pixels.astype(np.uint8) if _are_bytes(pixels) else pixels
    return value


def _are_bytes(pixels: np.ndarray) -> bool:
    return pixels.dtype.kind in "iu" and pixels.min() >= 0 and pixels.max() <= 255


def _image_column(dataset: Any, field: str) -> str:
    """The column of the images."""
    features = dataset.features
    kinds = {name: _kind(feature) for name, feature in features.items()}
    groups = (
        [name for name, kind in kinds.items() if kind == "Image"],
        [name for name, feature in features.items() if isinstance(feature, dict) and set(feature) >= {"bytes"}],
        [name for name, feature in features.items() if getattr(feature, "dtype", "") in _ENCODED],
        [name for name, kind in kinds.items() if kind in ("Array2D", "Array3D")],
        [name for name in features if name in IMAGE_NAMES],
    )
    for names in groups:
        likely = [name for name in IMAGE_NAMES if name in names]
        if len(names) == 1 or likely:
            return (likely or names)[0]
        if names:
            raise InputError(
                f"{field} is a Dataset with the columns of images {', '.join(names)} but must have one: keep one, as "
                f"{field}.select_columns([{names[0]!r}]).",
                field=field,
            )
    raise InputError(
        f"{field} is a Dataset with the columns {', '.join(features)}, of which none holds images: name that of the "
        f"images {IMAGE_NAMES[0]!r} (rename_column), or cast it to datasets.Image().",
        field=field,
    )


def _label_column(dataset: Any, image: str) -> str | None:
    """The column of the labels; None if there is none."""
    features = {name: feature for name, feature in dataset.features.items() if name != image}
    named = [name for name, feature in features.items() if _kind(feature) == "ClassLabel"]
    likely = [name for name in LABEL_NAMES if name in (named or features)]
    texts = [name for name in likely if named or _is_plain(features[name])]
    return next(iter([*texts, *named]), None)


def _is_plain(feature: Any) -> bool:
    """Whether a column holds whole numbers or text."""
    dtype = str(getattr(feature, "dtype", ""))
    return dtype in _TEXT or dtype.startswith(("int", "uint"))


def _kind(feature: Any) -> str:
    return type(feature).__name__

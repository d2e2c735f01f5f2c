"""Whatever a user gives as data in Python, as a source: paths, lists, arrays, datasets of torch and `datasets`."""

from __future__ import annotations

import os
from collections import UserList, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipelines.checks import brief
from pipelines.files import given_path
from pipelines.names import Url
from pipelines.runtime import InputError
from pipelines.storage import open_source, split_paths
from pipelines.storage.file_index import is_image_name
from pipelines.storage.items import (
    IMAGE_NAMES,
    LABEL_NAMES,
    ItemSource,
    as_labels,
    given_label,
    label_of,
    labels_of,
    named_labels,
    plain_label,
)
from pipelines.storage.joined import GivenPath, files_source, joined, open_paths
from pipelines.storage.source import Source, SubsetSource
from pipelines.storage.splits import split_role

_TRAIN, _VAL = ("train", "training"), ("validation", "val", "valid", "dev")
_FORMS = (
    "a path, a list of paths, of (path, label) or of images, a uint8 array of images, or a map-style dataset of torch "
    "or `datasets`"
)

Progress = Callable[[int], None] | None


def source_of(data: object, *, field: str = "data", progress: Progress = None) -> Source:
    """The images that a user gives, as a source.

    Args:
        data: one of

            * a path: a folder of images, a text list, converted data; of a folder with train/ and val/ the former;
            * a list of paths of image files and folders, or of (path, label) with labels of whole numbers or text;
            * a list of images, or a uint8 array or tensor [N, H, W, C], [N, C, H, W] or gray [N, H, W];
            * a map-style Dataset of torch, or a Dataset of Hugging Face's `datasets`;
            * a source itself.

            An item of a list or dataset is an image, an (image, label), or a mapping with one of the names
            `IMAGE_NAMES` and maybe one of `LABEL_NAMES` (a table of pandas is a list of such). An image is one of
            Pillow, pixels uint8 [H, W], [H, W, C] or [C, H, W], encoded bytes, or a path. A dataset is asked by one
            thread at a time, unless it has an attribute `thread_safe = True`; an item that raises or is no image is a
            bad image, which is named and replaced.
        field: how messages call the data.
        progress: called with the number of images found so far.

    Raises:
        InputError: it is something else, empty, or holds no images.
    """
    if isinstance(data, (str, os.PathLike)):
        return open_source(split_paths(given_path(data, field))[0], progress=progress)
    if isinstance(data, Mapping):
        return source_of(splits_of(data, field=field)[0], field=field, progress=progress)
    if _is_source(data):
        return cast(Source, data)
    module = type(data).__module__
    if module.partition(".")[0] == "datasets" and hasattr(data, "features"):
        from pipelines.storage.hub_dataset import hub_source

        check_form(data, field)
        return hub_source(data, field=field)
    if isinstance(data, np.ndarray) and data.dtype.kind in "OUS":
        data = list(data)
    elif module.partition(".")[0] == "pandas" and hasattr(data, "columns"):
        data = data.to_dict("records")  # type: ignore[attr-defined]
    elif module.partition(".")[0] == "pandas" and hasattr(data, "tolist"):
        data = data.tolist()
    check_form(data, field)
    count = len(data)  # type: ignore[arg-type]
    if isinstance(data, (list, tuple, UserList, deque)):
        data = list(data)
        _check_no_columns(data, field)
        return _of_list(data, field=field, progress=progress)
    if module.startswith("torch.utils.data"):
        whole: Any = data
        if type(data).__name__ == "Subset":
            inner = source_of(whole.dataset, field=f"{field}.dataset", progress=progress)
            return SubsetSource(inner, np.asarray(list(whole.indices), dtype=np.int64))
        if type(data).__name__ == "ConcatDataset":
            return joined([source_of(part, field=field, progress=progress) for part in whole.datasets])
    files = _image_folder(data)
    if files is not None:
        return files
    return _of_dataset(data, count, field=field, progress=progress)


def splits_of(data: object, *, field: str = "data", of: str = "train") -> tuple[object, object | None]:
    """The split `of` and the validation data of a mapping of splits, such as a DatasetDict; other data, and None.

    Raises:
        InputError: a mapping lacks the split.
    """
    if not isinstance(data, Mapping):
        return data, None
    val = _split(data, "val", _VAL)
    wanted = val if of == "val" else _split(data, "train", _TRAIN)
    if wanted is None:
        raise InputError(
            f"{field} is a {type(data).__name__} of {', '.join(map(str, data))[:200] or 'nothing'} but must have the "
            f"split {of}: give the split that is meant, as {field}={field}[NAME].",
            field=field,
        )
    return wanted, val


def _split(data: Mapping[Any, Any], role: str, usual: Sequence[str]) -> object | None:
    """The split of a usual name, else the only one whose name says this role in another way; None without one."""
    names = [name for name in usual if name in data]
    others = [name for name in data if isinstance(name, str) and split_role(name) == role]
    return data[names[0]] if names else data[others[0]] if len(others) == 1 else None


def check_form(data: object, field: str) -> None:
    """Raise InputError unless data has a length, and items by index."""
    if _is_source(data):
        return
    kind = type(data)
    is_loader = kind.__name__ == "DataLoader" or (hasattr(data, "dataset") and hasattr(data, "batch_size"))
    if is_loader:
        raise InputError(
            f"{field} is a {kind.__name__} but must be a dataset: give its dataset ({field}=loader.dataset), as "
            "batches and views are made here.",
            field=field,
        )
    streams = any("IterableDataset" in base.__name__ for base in kind.__mro__)
    count, lacks = None, "no length (__len__)"
    if isinstance(data, (str, bytes, bytearray)) or data is None:
        pass
    elif not hasattr(kind, "__getitem__"):
        streams = streams or hasattr(kind, "__next__") or hasattr(kind, "__iter__")
    else:
        try:
            count = len(data)  # type: ignore[arg-type]
        except Exception as error:  # torch's Dataset has no __len__; others raise what they like
            if hasattr(kind, "__len__"):
                lacks = f"no length (__len__ raised {type(error).__name__}: {error})"
    is_text = isinstance(data, (str, bytes, bytearray))
    if streams or (count is None and hasattr(kind, "__iter__") and not is_text):
        raise InputError(
            f"{field} is a {kind.__name__}, which gives images in its own order only, but must have a length and items "
            "by index, as each epoch has an order of its own: give a map-style dataset, a list, or write the images to "
            "a folder.",
            field=field,
        )
    if count is None:
        lacks = lacks if hasattr(kind, "__getitem__") and not is_text else ""
        what = f"a {kind.__name__}, which has {lacks}," if lacks else brief(data)
        raise InputError(f"{field} is {what} but must be {_FORMS}: give one of these.", field=field)
    if count < 1:
        raise InputError(f"{field} is an empty {kind.__name__} but must hold images: give at least one.", field=field)
    shape = list(getattr(data, "shape", ()))
    if len(shape) == 3 and (shape[0] in (1, 3, 4) or shape[2] in (1, 3, 4)):
        raise InputError(
            f"{field} is an array {shape}, which may be one image, but must be of several, [N, H, W, C] or [N, C, H, W]"
            f": give more images, or a list of one, [{field}].",
            field=field,
        )


def _of_list(items: Sequence[Any], *, field: str, progress: Progress) -> Source:
    """A list of paths, of (path, label), or of other items."""
    for n, item in enumerate(items):
        if (
            isinstance(item, (list, tuple))
            and len(item) > 1
            and all(map(_is_path, item))
            and is_image_name(os.path.basename(item[1]))
        ):
            raise InputError(
                f"{field}[{n}] is a list of {len(item)} paths but must be one path, or (path, label): give one flat "
                "list.",
                field=field,
            )
    if all(_is_path(item) or (_is_pair(item) and _is_path(item[0])) for item in items):
        return open_paths([_given(item, f"{field}[{n}]") for n, item in enumerate(items)], progress=progress)
    if not any(_may_hold_image(item) for item in items[:8]):
        raise InputError(
            f"{field}[0] is {brief(items[0])} but {field} must be {_FORMS}: give one of these.", field=field
        )
    known = [label_of(item) for item in items]
    labelled = any(label is not None for label in known)
    for n, item in enumerate(items):
        label = given_label(item) if known[n] is None else None
        if isinstance(label, (bool, float, bytes, np.generic)) or (label is not None and labelled):
            raise _no_label(f"{field}[{n}]", label)
    labels, classes = named_labels(known)
    name = f"{len(items):,} images in memory"
    return ItemSource(
        items.__getitem__, len(items), name=name, labels=labels, classes=classes, constant=True, field=field
    )


def _check_no_columns(items: Sequence[Any], field: str) -> None:
    """Raise InputError for (images, labels) as two arrays or lists, which are meant as the columns of a table."""
    if len(items) == 2 and getattr(items[0], "ndim", 0) == 4 and getattr(items[1], "ndim", 0) < 3:
        raise InputError(
            f"{field} is an array of images and one of labels but must be a list of (image, label): give "
            f"list(zip(images, labels)) or a TensorDataset.",
            field=field,
        )


def _is_source(data: object) -> bool:
    return all(hasattr(data, name) for name in ("read", "key", "fingerprint", "labels", "classes", "nbytes"))


def _is_path(item: object) -> bool:
    return isinstance(item, (str, os.PathLike))


def _is_pair(item: object) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2


def _may_hold_image(item: object) -> bool:
    plain = (bool, int, float, complex, type(None))
    return not isinstance(item, plain)


def _given(item: Any, where: str) -> GivenPath:
    path, label = (item[0], given_label(item)) if _is_pair(item) else (item, None)
    known = plain_label(label)
    if known is None and label is not None:
        raise _no_label(where, label)
    place = given_path(path, where).expanduser()
    return GivenPath(
        path=os.path.abspath(place) if not isinstance(place, Url) else str(place), label=known, where=where
    )


def _no_label(where: str, label: object) -> InputError:
    return InputError(
        f"{where} has the label {brief(label)} but must have a whole number or text, None for none: give such labels.",
        field=where.partition("[")[0],
    )


def _of_dataset(dataset: Any, count: int, *, field: str, progress: Progress) -> ItemSource:
    """A map-style dataset, an array or a tensor."""
    fetch, safe = dataset.__getitem__, bool(getattr(dataset, "thread_safe", False))
    arrays = isinstance(dataset, np.ndarray) or hasattr(dataset, "detach")
    name = f"{count:,} images in memory" if arrays else f"{type(dataset).__name__} with {count:,} items"
    labels: npt.NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    tensors = getattr(dataset, "tensors", None)
    if type(dataset).__name__ == "TensorDataset" and tensors is not None:
        safe, name = True, f"{count:,} images in memory"
        column = as_labels(tensors[1], count) if len(tensors) > 1 and tensors[1].ndim == 1 else None
        if column is not None:
            labels, classes = named_labels(column)
    elif not arrays:
        labels, classes = labels_of(dataset, count, fetch, progress=progress)
    return ItemSource(
        fetch,
        count,
        name=name,
        labels=labels,
        classes=classes,
        one_at_a_time=not (safe or arrays),
        constant=arrays,
        field=field,
    )


def _image_folder(dataset: Any) -> Source | None:
    """The files of torchvision's ImageFolder without transforms, which are then decoded by all threads."""
    if type(dataset).__module__ != "torchvision.datasets.folder" or type(dataset).__name__ != "ImageFolder":
        return None
    loader = getattr(dataset.loader, "__name__", "")
    plain = dataset.transform is None and dataset.target_transform is None and loader == "default_loader"
    if not plain:
        return None
    return files_source(
        [os.path.abspath(path) for path, _ in dataset.samples],
        labels=np.array([label for _, label in dataset.samples], dtype=np.int64),
        classes=tuple(dataset.classes),
        root=os.path.abspath(dataset.root),
    )


__all__ = ["IMAGE_NAMES", "LABEL_NAMES", "check_form", "source_of", "splits_of"]

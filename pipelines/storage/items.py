"""Images held by Python objects as a source: lists of images and map-style datasets of torch and others."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.decode.limits import beyond_pixels
from pipelines.decode.pillow import upright_pixels
from pipelines.names import visible
from pipelines.runtime import InputError
from pipelines.storage.image_facts import ImageFacts
from pipelines.storage.text_list import number_labels

IMAGE_NAMES = (
    "image",
    "img",
    "images",
    "picture",
    "photo",
    "jpg",
    "jpeg",
    "png",
    "pixels",
    "bytes",
    "x",
    "path",
    "file",
)
LABEL_NAMES = ("label", "labels", "target", "targets", "class", "fine_label", "category", "cls", "y")
"""Names of columns and of entries of items, the likeliest first."""
_CHECKED = 8  # items read at the start: they show what the dataset gives, and on resuming whether it is the same one
_MOST_READ_FOR_LABELS = 50_000  # items
_SHOWN = 80  # characters of a value in a message
_KINDS = "an image of Pillow, uint8 pixels, encoded bytes or a path"
_TO_BYTES = "leave out ToTensor() and Normalize(), as views are normalised here, or convert it to 0 to 255"


class NoImage(ValueError):
    """An item is no image; the message continues "the item is "."""

    def __init__(self, what: str, allowed: str, remedy: str) -> None:
        super().__init__(f"{what} but must be {allowed}: {remedy}")


class ItemSource:
    """Images that a function returns by index. Implements `Source`.

    Pixels are passed on without loss, as uncompressed files; encoded images as they are. An item that cannot be
    fetched, or is no image, is a bad image.
    """

    def __init__(
        self,
        fetch: Callable[[int], object],
        count: int,
        *,
        name: str,
        labels: npt.NDArray[np.int64] | None = None,
        classes: tuple[str, ...] = (),
        fetch_many: Callable[[Sequence[int]], Sequence[object]] | None = None,
        one_at_a_time: bool = False,
        constant: bool = False,
        field: str = "data",
    ) -> None:
        """`classes` name `labels`, int64 [count].

        Args:
            fetch: the item of an index: an image (see `encoded`), an (image, label, ...), or a mapping with an image.
            count: number of items.
            name: of the data, for messages.
            labels: -1 for none; None without labels.
            classes: names by label.
            fetch_many: the items of some indices, faster than one by one.
            one_at_a_time: whether only one thread at a time may fetch.
            constant: whether an item is the same at every call.
            field: how messages call the data.

        Raises:
            InputError: none of the items that are looked at is an image.
        """
        self._fetch, self._fetch_many = fetch, fetch_many
        self._turn: AbstractContextManager[object] = threading.Lock() if one_at_a_time else nullcontext()
        self._count = count
        self.location = Path(visible(name))
        self.labels = np.full(count, -1, dtype=np.int64) if labels is None else labels
        self.classes = classes
        self.nbytes = np.zeros(count, dtype=np.int64)
        self.facts = ImageFacts.of(count)
        self._look(constant, field)
        digest = hashlib.sha256(f"items\0{count}\0{len(classes)}\0".encode())
        digest.update("\0".join((*classes, *self.facts.digests.values())).encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """The image as an encoded file: uint8 [bytes].

        Raises:
            OSError: the item cannot be fetched or is no image.
        """
        try:
            with self._turn:
                item = self._fetch(index)
        except OSError as error:
            error.strerror = error.strerror or str(error) or type(error).__name__
            raise
        except MemoryError as error:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error
        except (Exception, SystemExit) as error:  # of any library; a thread must not end by it
            raise OSError(f"the dataset raised {_described(error)}") from error
        return self._encoded(item, index)

    def read_batch(self, indices: Sequence[int]) -> list[npt.NDArray[np.uint8] | None]:
        """See `ReadsBatches`."""
        if self._fetch_many is None:
            return [None] * len(indices)
        try:
            items = self._fetch_many(indices)
        except Exception:  # `read` finds out which item it is
            return [None] * len(indices)
        found: list[npt.NDArray[np.uint8] | None] = []
        for item, index in zip(items, indices, strict=True):
            try:
                found.append(self._encoded(item, index))
            except OSError:
                found.append(None)
        return found

    def key(self, index: int) -> str:
        """The number of the item."""
        return f"item {index}"

    def close(self) -> None:
        """Does nothing: the data is the caller's."""

    def _encoded(self, item: object, index: int) -> npt.NDArray[np.uint8]:
        try:
            image = image_of(item)
            if isinstance(image, Image.Image):
                problem = beyond_pixels(image.width, image.height, self.facts.limits)
                if problem:
                    raise OSError(errno.EFBIG, f"item {index}: {problem}")
            return encoded(image)
        except NoImage as error:
            raise OSError(f"item {index} is {error}") from error
        except OSError as error:
            where = "" if error.filename is None else f" ({os.fsdecode(error.filename)})"
            raise OSError(error.errno or errno.EIO, f"{error.strerror or error}{where}") from error
        except Exception as error:  # Pillow raises many types on broken images
            raise OSError(f"item {index} cannot be loaded: {_described(error)}") from error

    def _look(self, constant: bool, field: str) -> None:
        """Read a few items: refuse data of which none is an image, and remember their content."""
        spread = np.unique(np.linspace(0, self._count - 1, min(_CHECKED, self._count)).astype(np.int64)).tolist()
        failures: dict[int, OSError] = {}
        varies = False
        for index in spread:
            try:
                content = self.read(index)
                if not constant and not np.array_equal(content, self.read(index)):
                    varies = True
                    continue
            except OSError as error:
                failures[index] = error
                continue
            self.facts.digests[index] = hashlib.sha256(content.data).hexdigest()[:16]
        if len(failures) == len(spread):
            index, first = next(iter(failures.items()))
            reason = first.strerror or str(first)
            reason = reason if reason.startswith("item ") else f"item {index} cannot be read ({reason})"
            raise InputError(f"{field} is {self.location} but must hold images: {reason}.", field=field) from first
        if varies:
            self.facts.notes += (
                f"{self.location} gives other pixels for an item at each call: a resumed run will not be the same bit "
                "for bit; random transforms are better left to the views",
            )


def image_of(item: object) -> object:
    """The image of an item: the item itself, its first part, or the entry of a mapping with a likely name.

    Raises:
        NoImage: there is none.
    """
    if isinstance(item, Mapping):
        if set(item) <= {"bytes", "path"} and set(item):  # an image of `datasets` that is not decoded
            return item.get("bytes") or item.get("path") or b""
        name = next((name for name in IMAGE_NAMES if name in item), None)
        if name is None:
            names = ", ".join(map(str, item))[:_SHOWN]
            raise NoImage(f"a mapping of {names}", "one with an image", f"name the image {IMAGE_NAMES[0]!r}")
        return image_of(item[name]) if isinstance(item[name], Mapping) else item[name]
    if isinstance(item, (tuple, list)):
        if not item:
            raise NoImage("an empty list", _KINDS, "correct the dataset")
        if len(item) > 1 and _is_picture(item[0]) and _is_picture(item[1]):
            raise NoImage(f"a list of {len(item)} images", "one", "leave out what makes views or crops, made here")
        return image_of(item[0]) if isinstance(item[0], (Mapping, tuple, list)) else item[0]
    return item


def label_of(item: object) -> int | str | None:
    """The label of an item, if it is a whole number or text."""
    return plain_label(given_label(item))


def given_label(item: object) -> object:
    """The label of an item as it is; None without one, or for NaN, which pandas writes for a gap."""
    label: object = None
    if isinstance(item, Mapping):
        label = next((item[name] for name in LABEL_NAMES if name in item), None)
    elif isinstance(item, (tuple, list)) and len(item) > 1:
        label = item[1]
    return None if isinstance(label, float) and label != label else label


def plain_label(label: Any) -> int | str | None:
    """A label as a whole number or text; None for anything else.

    Arrays of one value and floats without a fraction count as that value: so do pandas and others write columns with
    gaps, and data sets such as MedMNIST their labels.
    """
    if isinstance(label, (np.generic, np.ndarray)) or hasattr(label, "detach"):
        label = label.item() if np.prod(label.shape) == 1 and len(label.shape) < 2 else None
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return label if isinstance(label, (str, int)) and not isinstance(label, bool) else None


def encoded(image: Any) -> npt.NDArray[np.uint8]:
    """An image as a file: uint8 [bytes]. Pixels are kept as they are; a file's path is read.

    Args:
        image: of Pillow (turned upright by its orientation); pixels uint8 [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4
            channels; encoded bytes; or a path. An array of three channels on both ends is [H, W, C], a tensor
            [C, H, W].

    Raises:
        NoImage: it is none of these.
        OSError: a file cannot be read.
    """
    if isinstance(image, Image.Image):
        return _of_pillow(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return np.frombuffer(image, dtype=np.uint8)
    if isinstance(image, (str, os.PathLike)):
        return np.frombuffer(Path(os.fspath(image)).read_bytes(), dtype=np.uint8)
    if isinstance(image, io.IOBase) or (hasattr(image, "read") and hasattr(image, "seek")):
        raise NoImage(f"an open file ({type(image).__name__})", _KINDS, "give its bytes, file.read(), or its path")
    channels_first = hasattr(image, "detach")  # a tensor; torch need not be imported for this
    if hasattr(image, "detach"):
        if str(image.dtype) != "torch.uint8":  # NumPy has no bfloat16 and others
            raise NoImage(f"a tensor of {str(image.dtype)[6:]} {list(image.shape)}", "of uint8", _TO_BYTES)
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise NoImage(f"{_short(image)} ({type(image).__name__})", _KINDS, "correct the dataset")
    if image.dtype != np.uint8:
        raise NoImage(f"an array of {image.dtype} {list(image.shape)}", "of uint8", _TO_BYTES)
    return image if image.ndim == 1 else packed(_rows(image, channels_first=channels_first))


def packed(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pixels, [H, W, 3] or gray [H, W], as an uncompressed file (PPM or PGM): uint8 [bytes]."""
    header = f"P{6 if pixels.ndim == 3 else 5}\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode()
    file = np.empty(len(header) + pixels.size, dtype=np.uint8)
    file[: len(header)] = np.frombuffer(header, dtype=np.uint8)
    file[len(header) :].reshape(pixels.shape)[...] = pixels
    return file


def _rows(image: npt.NDArray[np.uint8], *, channels_first: bool) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, 3] or [H, W] of an array with its channels at either end; alpha is dropped."""
    shape = list(image.shape)
    if image.ndim not in (2, 3) or not image.size:
        raise NoImage(f"an array of uint8 {shape}", "one image, [H, W], [H, W, C] or [C, H, W]", "correct its shape")
    if image.ndim == 2:
        return image
    first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
    if not first and not last:
        raise NoImage(f"an array of uint8 {shape}", "of 1, 3 or 4 channels", "choose three, or one for gray")
    if first and (channels_first or not last):
        image = np.moveaxis(image, 0, -1)
    return image[:, :, 0] if image.shape[2] == 1 else image[:, :, :3]


def _of_pillow(image: Image.Image) -> npt.NDArray[np.uint8]:
    if not image.width or not image.height:
        raise NoImage(f"an image of {image.width} by {image.height} pixels", "of one pixel or more", "leave it out")
    if getattr(image, "_im", True) is None and getattr(image, "fp", True) is None:  # nothing is loaded, or can be
        raise NoImage("an image of Pillow whose file is closed", "open or loaded", "call load() before closing it")
    upright = upright_pixels(image)
    if isinstance(upright, np.ndarray):
        return packed(upright)
    content = io.BytesIO()  # more than 8 bits: the decoder scales them by their range
    upright.save(content, "TIFF")
    return np.frombuffer(content.getbuffer(), dtype=np.uint8)


def _is_picture(value: object) -> bool:
    return isinstance(value, Image.Image) or getattr(value, "ndim", 0) >= 2


def named_labels(given: Sequence[int | str | None]) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels, int64 [N], and class names of labels as the user has them; see `number_labels`. None and -1 are none."""
    names = ["-1" if label is None or label == -1 else str(label) for label in given]
    return number_labels(names)


def labels_of(
    dataset: Any,
    count: int,
    fetch: Callable[[int], object],
    *,
    always: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels, int64 [count], and class names of a map-style dataset; None without labels.

    They are the dataset's `targets` or `labels` if its items say the same; else those of its items, which are all read
    if they are at most 50,000 (or `always`), and have none otherwise.
    """
    named = _class_names(dataset)
    sample = {index: _fetched_label(fetch, index) for index in {0, count // 2, count - 1}}
    for attribute in ("targets", "labels", "_labels"):
        given = as_labels(getattr(dataset, attribute, None), count)
        if given is not None and all(label in (None, given[index]) for index, label in sample.items()):
            return _numbered(given, named)
    if all(label is None for label in sample.values()) or (count > _MOST_READ_FOR_LABELS and not always):
        return None, ()
    found: list[int | str | None] = []
    for index in range(count):
        found.append(_fetched_label(fetch, index))
        if progress is not None and (index + 1 == count or index % 100 == 0):
            progress(index + 1)
    return _numbered(found, named)


def _fetched_label(fetch: Callable[[int], object], index: int) -> int | str | None:
    try:
        return label_of(fetch(index))
    except (Exception, SystemExit):  # a bad image, which the loader names
        return None


def as_labels(values: Any, count: int) -> list[int | str | None] | None:
    """A column of `count` labels as a list; None if it is none."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return None
    labels = [plain_label(value) for value in values]
    return labels if any(label is not None for label in labels) else None


def _class_names(dataset: Any) -> tuple[str, ...]:
    """The names of the classes 0, 1, ... that a dataset states; () if it does not."""
    names = getattr(dataset, "classes", None)
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return ()


def _numbered(
    given: Sequence[int | str | None], names: tuple[str, ...]
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels and class names, those stated if they are of the labels."""
    numbers = [label for label in given if isinstance(label, int)]
    texts = any(isinstance(label, str) for label in given)
    if names and not texts and numbers and max(numbers) < len(names) and len(set(names)) == len(names):
        return np.array([-1 if label is None else max(-1, int(label)) for label in given], dtype=np.int64), names
    return named_labels(given)


def _described(error: BaseException) -> str:
    lines: Iterator[str] = iter(str(error).strip().splitlines())
    text = next(lines, "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # of any class
        text = type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."

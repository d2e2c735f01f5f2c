"""LMDB with the usual keys and values: encoded images, Caffe's Datum, pickled or msgpack pairs of image and label."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.runtime import InputError
from pipelines.storage.file_index import begins_as_image
from pipelines.storage.forms.base import (
    IMAGE_NAMES,
    LABEL_NAMES,
    NO_LABEL,
    FormSource,
    Found,
    Labels,
    Request,
    counted,
    need,
    number_labels,
    unlabelled,
    unreadable,
)
from pipelines.storage.forms.lmdb_pages import check_pages
from pipelines.storage.forms.look import File, Look, by_split
from pipelines.storage.forms.names import are_captions
from pipelines.storage.forms.safe_pickle import Picture, RefusedPickleError, load_plain, plain_dtype
from pipelines.storage.forms.wire import DamagedRecordError, fields, unpack_msgpack
from pipelines.storage.source import KeyTable
from pipelines.storage.splits import split_role

_MAGIC, _MAGIC_AT = b"\xde\xc0\xef\xbe", 16  # behind the header of the first page
_ABOUT = (b"__", b"num-samples", b"num_samples", b"length", b"len", b"keys", b"meta", b"classes", b"label-", b"label_")
_IMAGE, _LABEL = b"image-", b"label-"
_REPORT_EVERY = 10_000
LOCAL_ONLY = True  # its library maps files of a disk


def recognise(look: Look) -> bool:
    """Whether a file is an LMDB."""
    return bool(_files(look))


def _files(look: Look) -> list[File]:
    return look.starting(_MAGIC, at=_MAGIC_AT)


def open_form(look: Look, request: Request) -> Found:
    """Open the splits that the names of the databases say."""
    files = _files(look)
    splits, kinds = {}, set()
    for name, of_split in by_split(look, files).items():
        index = _Index(of_split, request)
        splits[name] = index.source(look, request)
        kinds.add(index.kind)
    return Found(what=f"{counted(len(files), 'LMDB database')} of {' and '.join(sorted(kinds))}", splits=splits)


@dataclass(frozen=True, kw_only=True)
class Value:
    """What a value of a database holds: the image (encoded, or pixels), its label, and how it is packed."""

    image: Any
    label: int | str | None
    kind: str


def unpack(value: memoryview, request: Request) -> Value | None:
    """The image and label in a value; None if there is no image in it.

    Raises:
        RefusedPickleError: it is a pickle that wants to run code.
    """
    head = bytes(value[:64])
    if begins_as_image(head):
        return Value(image=value, label=None, kind="encoded images")
    content: Any
    if head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5:
        content, kind = load_plain(value), "pickles"
    else:
        found = _datum(value)
        if found is not None:
            return found
        try:
            content, kind = unpack_msgpack(value), "msgpack messages"
        except DamagedRecordError:
            return None
    return _pair(content, kind, request)


def _datum(value: memoryview) -> Value | None:
    """Caffe's Datum: channels, height, width, data, label, and whether the data are an encoded image."""
    numbers: dict[int, int] = {}
    data = memoryview(b"")
    try:
        for number, one in fields(value):
            if isinstance(one, int):
                numbers[number] = one
            elif number == 4:
                data = one
            elif number != 6:
                return None
    except DamagedRecordError:
        return None
    label = numbers.get(5)
    if begins_as_image(bytes(data[:64])):
        return Value(image=data, label=label, kind="Caffe's Datum")
    shape = tuple(numbers.get(number, 0) for number in (1, 2, 3))
    if not len(data) or shape[0] not in (1, 3) or shape[0] * shape[1] * shape[2] != len(data):
        return None
    pixels = np.frombuffer(bytes(data), np.uint8).reshape(shape).transpose(1, 2, 0)
    return Value(image=pixels[:, :, ::-1], label=label, kind="Caffe's Datum")  # OpenCV's blue, green, red


def _pair(content: Any, kind: str, request: Request) -> Value | None:
    """Image and label of a tuple, a dictionary or a single image."""
    if isinstance(content, dict) and not _is_array(content):
        named = {
            key.decode("utf-8", "replace") if isinstance(key, bytes) else key: value
            for key, value in content.items()
            if isinstance(key, (bytes, str))
        }
        wanted = (request.image,) if request.image is not None else (*IMAGE_NAMES, *named)
        image = next((found for name in wanted if (found := _image(named.get(name or ""))) is not None), None)
        labels = (request.label,) if request.label not in (None, NO_LABEL) else LABEL_NAMES
        label = next((found for name in labels if (found := _label(named.get(name or ""))) is not None), None)
        return None if image is None else Value(image=image, label=label, kind=kind)
    parts = list(content) if isinstance(content, (list, tuple)) else [content]
    image = next((found for part in parts if (found := _image(part)) is not None), None)
    label = next((found for part in parts if (found := _label(part)) is not None), None)
    return None if image is None else Value(image=image, label=label, kind=kind)


def _is_array(content: dict[Any, Any]) -> bool:
    return content.keys() >= {"nd", "type", "shape", "data"} or content.keys() >= {b"nd", b"type", b"shape", b"data"}


def _image(part: Any) -> Any:
    """Encoded image or pixels, if a part is one."""
    if isinstance(part, str):
        part = part.encode("latin1", "ignore")  # bytes of Python 2
    if isinstance(part, (bytes, bytearray)):
        return part if begins_as_image(bytes(part[:64])) else None
    if isinstance(part, dict) and _is_array(part):  # msgpack-numpy's arrays
        try:
            named = {key.decode() if isinstance(key, bytes) else key: value for key, value in part.items()}
            part = np.frombuffer(named["data"], plain_dtype(named["type"])).reshape(named["shape"])
        except (TypeError, ValueError, OverflowError):
            return None
    if isinstance(part, Picture):
        try:
            part = part.pixels()
        except RefusedPickleError:
            return None
    if isinstance(part, np.ndarray):
        if part.ndim == 1 and part.dtype == np.uint8:
            return part if begins_as_image(part[:64].tobytes()) else None
        if part.ndim in (2, 3) and part.dtype in (np.uint8, np.uint16):
            planes = part.ndim == 3 and part.shape[0] in (1, 3, 4) and part.shape[2] not in (1, 3, 4)
            return part.transpose(1, 2, 0) if planes else part
    return None


def _label(part: Any) -> int | str | None:
    if isinstance(part, np.ndarray) and part.size == 1 and part.dtype.kind in "iu":
        part = part.reshape(-1)[0]
    if isinstance(part, (bool, int, np.integer)):
        return int(part)
    return part if isinstance(part, str) and len(part) < 200 else None


class _Index:
    """Keys, labels and sizes of the images of several databases."""

    def __init__(self, files: Sequence[File], request: Request) -> None:
        self.files = files
        self.environments = [_open(file) for file in files]
        self.kind = ""
        self.databases, self.sizes = array("q"), array("q")
        self.keys: list[bytes] = []
        self.labels: list[int | str | None] = []
        self._raw = True
        for number, (file, environment) in enumerate(zip(files, self.environments, strict=True)):
            with _naming(file.path), environment.begin(buffers=True) as transaction:
                self._add(number, file.path, transaction, request)
        if not self.keys:
            raise InputError(f"{files[0].path} holds no images: give a database of images.")
        request.report(len(self.keys))

    def _add(self, number: int, path: Path, transaction: Any, request: Request) -> None:
        without = 0
        for key, value in transaction.cursor():
            name = bytes(key)
            if name.startswith(_ABOUT):
                continue
            try:
                found = unpack(value, request)
            except RefusedPickleError as error:
                raise InputError(
                    f"{path}: the value of {name[:100]!r} is a pickle that is not read: {error}; get the data from "
                    "their publisher in another form."
                ) from None
            if found is None:
                without += 1
                if not self.keys and without >= 100:
                    break
                continue
            label = found.label
            if name.startswith(_IMAGE):
                text = transaction.get(_LABEL + name[len(_IMAGE) :])
                label = None if text is None else _text_label(bytes(text))
            self.kind = self.kind or found.kind
            self.keys.append(name)
            self.labels.append(label)
            self.databases.append(number)
            self.sizes.append(found.image.nbytes if hasattr(found.image, "nbytes") else len(found.image))
            self._raw = self._raw and found.kind == "encoded images"
            if len(self.keys) % _REPORT_EVERY == 0:
                request.report(len(self.keys))
        if without and not self.keys:
            raise InputError(
                f"{path} holds no images that can be read (values are neither encoded images nor Datum, pickles or "
                "msgpack of images, or were written by pyarrow.serialize, which pyarrow no longer has): write it again "
                "with encoded images as values."
            )
        if without:
            raise InputError(
                f"{path} has {len(self.keys):,} values with images and {without:,} without: write it again with images "
                "of one kind."
            )

    def source(self, look: Look, request: Request) -> FormSource:
        """The images as a source."""
        keys = [key.decode("utf-8", "surrogateescape") for key in self.keys]
        databases = np.frombuffer(self.databases, np.int64)
        return FormSource(
            look.path,
            keys=keys,
            labels=self._labels(look, keys, databases, request),
            nbytes=np.frombuffer(self.sizes, np.int64),
            reader=LmdbReader(self.environments, databases, KeyTable.of(keys), request),
        )

    def _labels(self, look: Look, keys: Sequence[str], databases: np.ndarray, request: Request) -> Labels:
        if request.label == NO_LABEL:
            return unlabelled(len(keys))
        if any(label is not None for label in self.labels):
            captions = any(key.startswith("image-") for key in keys) and are_captions(self.labels)
            return unlabelled(len(keys)) if captions else number_labels(self.labels, where=look.path)
        if request.label is not None:
            raise InputError(
                f"--label is {request.label!r} but must be a key of the values of {look.path} that has labels: choose "
                "another, or none.",
                field="--label",
            )
        if all("/" in key for key in keys):
            return number_labels([key.partition("/")[0] for key in keys], where=look.path)
        if len(self.files) > 1:  # LSUN: a database for each category
            names = [_category(file.name) for file in self.files]
            return number_labels([names[number] for number in databases.tolist()], where=look.path)
        return unlabelled(len(keys))


def _text_label(text: bytes) -> int | str | None:
    shown = text.decode("utf-8", "replace").strip()
    return int(shown) if shown.isascii() and shown.isdigit() and len(shown) < 19 else shown or None


def _category(name: str) -> str:
    """Of ``bedroom_train_lmdb/data.mdb`` bedroom."""
    folder = name.removesuffix("/data.mdb").rpartition("/")[2]
    words = [word for word in folder.replace(".", "_").split("_") if split_role(word) is None and word != "lmdb"]
    return "_".join(words) or folder


def _open(file: File) -> Any:
    lmdb = need("lmdb", "Reading LMDB")
    check_pages(file)
    is_folder = file.path.name == "data.mdb"
    with _naming(file.path):
        path = file.path.parent if is_folder else file.path
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False, subdir=is_folder)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    lmdb = need("lmdb", "Reading LMDB")
    try:
        yield
    except lmdb.Error as error:
        raise InputError(f"{path} is no LMDB database that can be read ({str(error)[:200]}): copy it again.") from None


class LmdbReader:
    """Reads images by key out of several databases."""

    def __init__(self, environments: Sequence[Any], databases: np.ndarray, keys: KeyTable, request: Request) -> None:
        self._environments, self._databases, self._keys, self._request = environments, databases, keys, request

    def read(self, row: int) -> Any:
        """See `Reader`."""
        key = self._keys[row].encode("utf-8", "surrogateescape")
        with self._environments[int(self._databases[row])].begin(buffers=True) as transaction:
            value = transaction.get(key)
            if value is None:
                raise unreadable("its key is gone")
            try:
                found = unpack(value, self._request)
            except (RefusedPickleError, DamagedRecordError) as error:
                raise unreadable(str(error)) from None
            if found is None:
                raise unreadable("its value is no image")
            return found.image if isinstance(found.image, np.ndarray) else bytes(found.image)

    def close(self) -> None:
        """See `Reader`."""
        for environment in self._environments:
            environment.close()

"""IDX files, as MNIST, EMNIST, Fashion-MNIST and KMNIST are downloaded, compressed or not, or in EMNIST's zip."""

from __future__ import annotations

import math
import re
import struct

import numpy as np

from pipelines.runtime import InputError
from pipelines.storage.forms.base import NO_LABEL, FormSource, Found, Request, number_labels, unlabelled
from pipelines.storage.forms.blobs import FileBlob, packing, text_of, unpacked_head
from pipelines.storage.forms.look import File, Look, split_of
from pipelines.storage.forms.places import Place, RecordReader, find_places
from pipelines.storage.forms.zip_reader import zip_entries

_UBYTE = 8
_IMAGES = (bytes([0, 0, _UBYTE, 3]), bytes([0, 0, _UBYTE, 4]))  # [N, H, W] and [N, H, W, 3]
_NAME = re.compile(r".*idx\d[-.]u?byte.*|.*-mapping\.txt")
_ANY = re.compile(r".*")
_WORDS = re.compile(r"train|t10k|test|val(idation)?|images?|labels?|idx\d|u?byte|[-_.]+")


def recognise(look: Look) -> bool:
    """Whether a file is an IDX file of images, or a zip with such files."""
    return any(_is_images(file) or _holds_idx(file) for file in look.files)


def _is_images(file: File) -> bool:
    head = unpacked_head(file) if packing(file) else file.head
    if not head.startswith(_IMAGES) or len(head) < 20:
        return False
    height, width = struct.unpack_from(">2I", head, 8)
    return bool(0 < height <= 1 << 16 and 0 < width <= 1 << 16)


def _holds_idx(file: File) -> bool:
    if not file.head.startswith(b"PK\3\4"):
        return False
    blob = FileBlob(file.path)
    try:
        return any(re.search(r"images-idx\d", entry.name) for entry in zip_entries(file.path, blob))
    except InputError:
        return False
    finally:
        blob.close()


def open_form(look: Look, request: Request) -> Found:
    """Open train and test; of several data sets the one that ``--image`` names (``letters`` of EMNIST)."""
    in_zip = any(file.head.startswith(b"PK") for file in look.files)
    places: dict[str, Place] = {}
    for place in find_places(look, _NAME if in_zip else _ANY):
        places.setdefault(place.name, place)  # torchvision keeps packed and unpacked files in one folder
    images = {name: place for name, place in places.items() if place.size > 8 and place.read(4).startswith(_IMAGES)}
    images = {name: place for name, place in images.items() if "label" not in place.base}
    variants: dict[str, list[Place]] = {}
    for name, place in images.items():
        variants.setdefault(_variant(name), []).append(place)
    chosen = _chosen(look, variants, request)
    splits: dict[str, FormSource] = {}
    for place in sorted(variants[chosen], key=lambda place: place.name):
        split = "test" if "t10k" in place.base else split_of(place.name)
        if split in splits:
            raise InputError(f"{look.path} has several files of {split or 'images'}, such as {place.name}: give one.")
        splits[split] = _source(look, place, places, request)
    if len(splits) == 1:
        splits = {"": next(iter(splits.values()))}
    shown = f" of {chosen}" if chosen else ""
    order = sorted(splits, key=lambda name: name != "train")
    return Found(what=f"IDX files{shown} (MNIST's form)", splits={name: splits[name] for name in order})


def _variant(name: str) -> str:
    """What names a data set among several: ``letters`` of EMNIST's files, or the folder."""
    folder, _, base = name.rpartition("/")
    words = [word for word in _WORDS.sub(" ", base.removesuffix(".gz")).split() if word != "emnist"]
    return " ".join(words) or "/".join(part for part in folder.split("/") if part not in ("raw", "gzip"))


def _chosen(look: Look, variants: dict[str, list[Place]], request: Request) -> str:
    if request.image is not None and request.image not in variants:
        raise InputError(
            f"--image is {request.image!r} but must be a data set of {look.path} ({', '.join(sorted(variants))}): "
            "choose one of these.",
            field="--image",
        )
    if request.image is None and len(variants) != 1:
        names = sorted(variants)
        raise InputError(
            f"{look.path} has several data sets ({', '.join(names)}): choose one, such as --image {names[0]}."
        )
    return request.image if request.image is not None else next(iter(variants))


def _shape(look: Look, place: Place) -> tuple[int, ...]:
    """Dimensions of an IDX file of bytes.

    Raises:
        InputError: it has fewer or more bytes than they say.
    """
    dimensions = place.read(4)[3]
    start = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", place.read(4 * dimensions, 4)) if place.size >= start else (0,)
    if place.size < start or start + math.prod(shape) != place.size:
        raise InputError(
            f"{place.path} is truncated or damaged: it has {place.size:,} bytes for {list(shape)} values; download it "
            "again."
        )
    return shape


def _source(look: Look, images: Place, places: dict[str, Place], request: Request) -> FormSource:
    shape = _shape(look, images)
    count, inner = shape[0], shape[1:]
    if len(inner) == 3 and inner[2] not in (1, 3):
        raise InputError(f"{images.path} holds values {list(inner)} of no image: give others.")
    labels = unlabelled(count)
    if request.label != NO_LABEL:
        if request.label is not None:
            raise InputError(
                f"--label is {request.label!r} but must be none, or left out, for IDX files: leave it out.",
                field="--label",
            )
        labels = number_labels(_labels(look, images, places, count), where=look.path, names=_names(images, places))
    request.report(count)
    stem = images.base.partition("-images")[0]
    nbytes = math.prod(inner)
    return FormSource(
        look.path,
        keys=(f"{stem}/{row:06d}" for row in range(count)),
        labels=labels,
        nbytes=np.full(count, nbytes, dtype=np.int64),
        reader=RecordReader(
            [(images, count)],
            start=4 + 4 * len(shape),
            stride=nbytes,
            decode=lambda record: np.frombuffer(record, np.uint8).reshape(inner),
        ),
        deep=(),
        largest=2 * nbytes + 1024,
    )


def _labels(look: Look, images: Place, places: dict[str, Place], count: int) -> np.ndarray:
    wanted = re.sub(r"idx\d", "idx1", images.name.replace("images", "labels").replace("image", "label"))
    found = places.get(wanted)
    if found is None:
        raise InputError(
            f"{look.path} has {images.base} but not its labels {wanted.rpartition('/')[2]}: copy that file too, or use "
            "--label none."
        )
    shape = _shape(look, found)
    if shape != (count,) or found.read(3) != bytes([0, 0, _UBYTE]):
        raise InputError(
            f"{look.path} has {count:,} images and labels {list(shape)} in {found.base}: download it again."
        )
    return np.frombuffer(found.read(count, 8), np.uint8).astype(np.int64)


def _names(images: Place, places: dict[str, Place]) -> list[str] | None:
    """Characters by label, from EMNIST's table of label and character codes."""
    stem = images.name.partition("-train-")[0].partition("-test-")[0]
    table = next((place for name, place in places.items() if name == f"{stem}-mapping.txt"), None)
    if table is None:
        return None
    rows = [line.split() for line in text_of(table.path, table.read()).split("\n")]
    try:
        codes = {int(row[0]): chr(int(row[1])) for row in rows if len(row) > 1}
    except (ValueError, OverflowError):
        return None
    if not codes or min(codes) < 0 or max(codes) > 255:  # labels are bytes
        return None
    names = [codes.get(label, str(label)) for label in range(max(codes) + 1)]
    return names if len(set(names)) == len(names) else None

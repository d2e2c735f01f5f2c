"""What mvssl-convert adds to a .beton file so that one file is all: keys, class names and upright sizes.

The index lies between the last page and the table of allocations, where FFCV does not look; the bytes of the image
field's descriptor that FFCV leaves unused say where. Stock FFCV reads such a file like any other.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.storage.beton_format import FIELD, HEADER, Layout, damaged
from pipelines.storage.keys import KeyTable

BETON = "images.beton"  # in a folder that mvssl-convert wrote
_MAGIC = b"mvssl\0ix"
_VERSION = 1
_POINTER = np.dtype(
    [("magic", "V8"), ("version", "<u8"), ("offset", "<u8"), ("size", "<u8"), ("bytes", "<u8"), ("sha256", "V32")]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class BetonIndex:
    """What FFCV's own format has no place for.

    Attributes:
        keys: of each image.
        classes: class names by label, () if unlabelled.
        sizes: int64 [N, 2], (height, width) of each image in pixels, EXIF orientation applied.
    """

    keys: KeyTable
    classes: tuple[str, ...]
    sizes: npt.NDArray[np.int64]


def pack_index(index: BetonIndex) -> bytes:
    """The index as bytes, the same ones for the same index."""
    classes = KeyTable.of(index.classes)
    file = io.BytesIO()
    np.savez(
        file,
        key_blob=index.keys.blob,
        key_ends=index.keys.ends,
        class_blob=classes.blob,
        class_ends=classes.ends,
        sizes=index.sizes.astype("<i4"),
    )
    return file.getvalue()


def pack_pointer(packed: bytes, *, offset: int, file_bytes: int) -> bytes:
    """Descriptor arguments (1024 bytes) that say where the packed index lies, and how large the whole file is."""
    pointer = np.zeros(1, _POINTER)
    pointer["magic"], pointer["version"] = np.void(_MAGIC), _VERSION
    pointer["offset"], pointer["size"], pointer["bytes"] = offset, len(packed), file_bytes
    pointer["sha256"] = np.void(hashlib.sha256(packed).digest())
    return pointer.tobytes().ljust(FIELD["arguments"].itemsize, b"\0")


def load_index(path: Path, layout: Layout) -> BetonIndex | None:
    """The index in a file that mvssl-convert wrote; None in any other.

    Raises:
        InputError: cut short, damaged, or written by a later release.
    """
    pointer = np.frombuffer(layout.arguments, _POINTER, count=1)[0]
    if pointer["magic"].tobytes() != _MAGIC:
        return None
    if int(pointer["version"]) != _VERSION:
        raise InputError(
            f"{path} has an index of version {pointer['version']} but this release reads version {_VERSION}: convert "
            "the data again with this release's mvssl-convert, or use the release that made it."
        )
    if int(pointer["bytes"]) != layout.file_bytes:
        raise damaged(path, f"has {layout.file_bytes} bytes but must have {pointer['bytes']}")
    with path.open("rb") as file:
        file.seek(int(pointer["offset"]))
        packed = file.read(int(pointer["size"]))
    if hashlib.sha256(packed).digest() != pointer["sha256"].tobytes():
        raise damaged(path, "has an index without its checksum")
    try:
        with np.load(io.BytesIO(packed), allow_pickle=False) as data:
            return BetonIndex(
                keys=KeyTable(blob=data["key_blob"], ends=data["key_ends"]),
                classes=tuple(KeyTable(blob=data["class_blob"], ends=data["class_ends"])),
                sizes=data["sizes"].astype(np.int64),
            )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, f"has an index that cannot be read ({error})") from error


def is_our_beton(path: Path) -> bool:
    """Whether mvssl-convert wrote this file, whole or not."""
    try:
        with path.open("rb") as file:
            return _MAGIC in file.read(HEADER.itemsize + FIELD.itemsize)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False

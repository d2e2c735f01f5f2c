"""Files of converted data on disk: names, versions, the index's layout and manifest.json.

A folder of shards holds ``shard-NNNNNN.tar`` (standard tar files of ``<key>.jpg`` and, for labelled images,
``<key>.cls``), ``index.npy`` (one `INDEX_DTYPE` row per image), ``keys.npy`` (uint8, all keys in UTF-8),
``quarantine.jsonl``, ``warnings.jsonl`` and ``manifest.json``. The manifest is written last: without it the conversion
is unfinished. During a conversion, ``.convert`` holds its plan and the state of the finished shards. With ``--format
beton`` one ``images.beton`` replaces shards and index.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.arrays import read_header
from pipelines.files import parse_json, read_json
from pipelines.runtime import InputError
from pipelines.storage.beton_format import BETON, is_our_beton
from pipelines.value_range import ValueRange, parse_value_range

FORMAT = "mvssl-shards"
BETON_FORMAT = "mvssl-beton"
FORMATS = (FORMAT, BETON_FORMAT)
VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
KEYS = "keys.npy"
CHECKSUMS = "checksums.npy"
QUARANTINE = "quarantine.jsonl"
WARNINGS = "warnings.jsonl"
WORK = ".convert"
PLAN = "plan.json"  # in WORK
_SHARD_NAME = re.compile(r"shard-[0-9]{6,}\.tar")
_MAX_IMAGES, _MAX_BYTES = 2**40, 2**60  # beyond all data; arithmetic with them does not overflow
HEAD_BYTES = 4096  # of each shard, hashed separately: one read at open tells apart two shards of the same size

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<i8"),  # first byte of the image in its shard
        ("size", "<i8"),  # bytes
        ("key_end", "<i8"),  # end of the image's key in keys.npy; it starts at the end of the previous one
        ("shard", "<i4"),  # position in the manifest's list of shards
        ("height", "<i4"),  # pixels, EXIF orientation applied
        ("width", "<i4"),
        ("label", "<i4"),  # -1 = none
    ]
)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file of a converted data set; `head` is the SHA-256 of its first `HEAD_BYTES` bytes."""

    name: str
    count: int
    bytes: int
    sha256: str
    head: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of manifest.json that are read back; the file has more for human readers (counts, versions, source).

    For a .beton file, `shards` and `sha256` are empty: that file has its own checksum.
    """

    count: int
    classes: tuple[str, ...]
    fingerprint: str
    shards: tuple[Shard, ...]
    sha256: Mapping[str, str]  # of index.npy and keys.npy
    plan: Mapping[str, Any]  # source and options of the conversion
    damage: Mapping[int, str] | None = None  # by index, of images that decode nevertheless; None: not examined
    value_range: ValueRange | None = None  # of images with more than 8 bits

    @classmethod
    def load(cls, folder: Path, *, formats: Collection[str] = (FORMAT,), text: bytes | None = None) -> Manifest:
        """Read manifest.json, which must have one of these formats; or its content `text`, if that is at hand.

        Raises:
            InputError: it is missing (unfinished conversion), damaged, or of another format version.
        """
        path = folder / MANIFEST
        try:
            content = read_json(path) if text is None else parse_json(text, numbers=True)
            if content["format"] not in formats:
                wanted = " or ".join(repr(name) for name in formats)
                raise InputError(f"{path} is of the format {content['format']!r}, not {wanted}: check the path.")
            if content["version"] != VERSION:
                raise InputError(
                    f"{path} is of format version {content['version']} but this release reads version {VERSION}: "
                    "convert the data again with this release's mvssl-convert, or use the release that wrote it."
                )
            count = _whole(content["count"], "count", most=_MAX_IMAGES)
            return cls(
                count=count,
                classes=tuple(_text(name, "a class") for name in content["classes"]),
                fingerprint=_text(content["fingerprint"], "fingerprint"),
                shards=tuple(_shard(shard) for shard in content["shards"]),
                sha256={name: _text(digest, f"sha256 of {name}") for name, digest in content["sha256"].items()},
                plan=dict(content["plan"]),
                damage=_damage(content.get("damage"), count=count),
                value_range=_value_range(content.get("value_range")),
            )
        except FileNotFoundError:
            raise InputError(
                f"{folder}: the conversion is not finished (no {MANIFEST}): run the same mvssl-convert command again; "
                "finished shards are kept."
            ) from None
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}: {error}): restore it or convert the data again with "
                "--overwrite."
            ) from error


def _shard(entry: Mapping[str, Any]) -> Shard:
    shard = Shard(**entry)
    if not _SHARD_NAME.fullmatch(_text(shard.name, "the name of a shard")):
        raise ValueError(f"a shard is named {shard.name!r}")
    _whole(shard.count, f"count of {shard.name}", most=_MAX_IMAGES)
    _whole(shard.bytes, f"bytes of {shard.name}", most=_MAX_BYTES)
    for digest in (shard.sha256, shard.head):
        _text(digest, f"a checksum of {shard.name}")
    return shard


def _damage(stored: Mapping[str, str] | None, *, count: int) -> dict[int, str] | None:
    if stored is None:
        return None
    return {_whole(int(index), "damage", most=count - 1): _text(text, "damage") for index, text in stored.items()}


def _value_range(stored: object) -> ValueRange | None:
    if stored is None:
        return None
    try:
        return parse_value_range(_text(stored, "value_range"))
    except InputError as error:
        raise ValueError(f"value_range is {stored!r}") from error


def _whole(value: object, name: str, *, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is {str(value)[:50]}")
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {str(value)[:50]}, no text")
    return value


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds converted data or an unfinished conversion, and not just files of the same names.

    Without a manifest of ours (damaged, missing or another program's), our index, .beton file or plan decides.
    """
    return (
        format_of(folder) is not None
        or (folder / WORK / PLAN).is_file()
        or _is_our_index(folder / INDEX)
        or is_our_beton(folder / BETON)
    )


def format_of(folder: Path) -> str | None:
    """The format (one of `FORMATS`) that the manifest in `folder` names; None if there is no such manifest."""
    try:
        content = read_json(folder / MANIFEST)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
    name = content.get("format") if isinstance(content, dict) else None
    return name if name in FORMATS else None


def _is_our_index(path: Path) -> bool:
    try:
        return bool(read_header(path).dtype == INDEX_DTYPE)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return False

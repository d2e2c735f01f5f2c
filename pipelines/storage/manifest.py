"""The on-disk form of converted data: names, versions, the index's layout and manifest.json.

A converted folder of shards holds ``shard-NNNNNN.tar`` (standard tar files: ``<key>.jpg`` and, where there are labels,
``<key>.cls``), ``index.npy`` (one `INDEX_DTYPE` row per image), ``keys.npy`` (uint8, the UTF-8 of all keys),
``quarantine.jsonl``, ``warnings.jsonl`` and ``manifest.json``, which is written last: without it the conversion is not
finished. While it runs, ``.convert`` holds its plan and the finished shards' parts of the index. In the folder of a
``.beton`` conversion one ``images.beton`` stands in place of shards and index.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.runtime import InputError
from pipelines.storage.beton_format import BETON, is_our_beton

FORMAT = "mvssl-shards"
BETON_FORMAT = "mvssl-beton"
FORMATS = (FORMAT, BETON_FORMAT)
VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
KEYS = "keys.npy"
QUARANTINE = "quarantine.jsonl"
WARNINGS = "warnings.jsonl"
WORK = ".convert"
PLAN = "plan.json"  # in WORK
HEAD_BYTES = 4096  # of each shard, hashed on its own: tells two shards of the same size apart at open, at one read each

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<i8"),  # first byte of the image in its shard
        ("size", "<i8"),  # bytes
        ("key_end", "<i8"),  # end of this image's key in keys.npy; it starts where the one before ends
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
    """What manifest.json says; the file has more for the human reader (counts, versions, options).

    Data in a .beton file has neither shards nor checksums here: that file has its own.
    """

    count: int
    classes: tuple[str, ...]
    fingerprint: str
    shards: tuple[Shard, ...]
    sha256: Mapping[str, str]  # of index.npy and keys.npy
    plan: Mapping[str, Any]  # source and options that made this data

    @classmethod
    def load(cls, folder: Path, *, formats: Collection[str] = (FORMAT,)) -> Manifest:
        """Read manifest.json, which must be of one of these formats.

        Raises:
            InputError: it is missing (unfinished conversion), damaged, or of another format version.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] not in formats:
                wanted = " or ".join(repr(name) for name in formats)
                raise InputError(f"{path} is of the format {content['format']!r}, not {wanted}: check the path.")
            if content["version"] != VERSION:
                raise InputError(
                    f"{path} is of format version {content['version']} but this release reads version {VERSION}: "
                    "convert the data again with this release's mvssl-convert, or use the release that made it."
                )
            return cls(
                count=int(content["count"]),
                classes=tuple(content["classes"]),
                fingerprint=str(content["fingerprint"]),
                shards=tuple(Shard(**shard) for shard in content["shards"]),
                sha256=dict(content["sha256"]),
                plan=dict(content["plan"]),
            )
        except FileNotFoundError:
            raise InputError(
                f"{folder}: the conversion is not finished (no {MANIFEST}): run the same mvssl-convert command again; "
                "finished shards are kept."
            ) from None
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}: {error}): restore it or convert the data again with "
                "--overwrite."
            ) from error


def is_ours(folder: Path) -> bool:
    """Whether `folder` holds converted data or an unfinished conversion, and not just files of the same names.

    A manifest with our format says so; else (damaged, missing or of another program) our index or a plan.

    Raises:
        OSError: the folder or a file that decides it cannot be read.
    """
    if format_of(folder) is not None:
        return True
    return (folder / WORK / PLAN).is_file() or _is_our_index(folder / INDEX) or is_our_beton(folder / BETON)


def format_of(folder: Path) -> str | None:
    """Which of our formats the manifest in `folder` names; None without one.

    Raises:
        OSError: the manifest cannot be read.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return None
    name = content.get("format") if isinstance(content, dict) else None
    return name if name in FORMATS else None


def _is_our_index(path: Path) -> bool:
    try:
        return bool(np.load(path, mmap_mode="r", allow_pickle=False).dtype == INDEX_DTYPE)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, EOFError):
        return False

"""What the conversion asks of the form it writes: tar shards or a .beton file.

What is known of a finished part, kept beside it until the conversion is finished: what makes it resumable.

What every form of converted data ends with: the lists of bad and doubtful images, and the manifest.
"""

from __future__ import annotations

import dataclasses
import io
import json
import platform
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.conversion.destination import Destination, write_whole
from pipelines.conversion.verify import Checked
from pipelines.runtime import InputError
from pipelines.storage.manifest import INDEX_DTYPE, QUARANTINE, VERSION, WARNINGS, Shard
from pipelines.storage.source import KeyTable, fingerprint


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What came of one planned part: a shard, or a stretch of a .beton file.

    Attributes:
        shard: the tar file, or the stretch (see `BetonWriter.finish`); None if every image was bad.
        rows: INDEX_DTYPE [count]; `shard` and `key_end` are filled in when the parts are joined.
        keys: key of each row.
        bad: (source key, reason) of each image left out.
        warned: (source key, warning) of each image kept although the decoder complained.
    """

    shard: Shard | None
    rows: npt.NDArray[np.void]
    keys: Sequence[str]
    bad: Sequence[tuple[str, str]]
    warned: Sequence[tuple[str, str]]


def save_part(path: Path, part: Part) -> None:
    """Write `part` whole."""
    meta = {
        "shard": None if part.shard is None else dataclasses.asdict(part.shard),
        "keys": list(part.keys),
        "bad": list(part.bad),
        "warned": list(part.warned),
    }
    file = io.BytesIO()
    np.savez(file, rows=part.rows, meta=np.frombuffer(json.dumps(meta).encode("ascii"), dtype=np.uint8))
    write_whole(path, file.getvalue())


def load_part(path: Path) -> Part | None:
    """The part at `path` if that file is whole; else None. Whether its shard is there is for the caller to see."""
    try:
        with np.load(path, allow_pickle=False) as data:
            rows = data["rows"]
            meta = json.loads(data["meta"].tobytes())
        if rows.dtype != INDEX_DTYPE:
            return None
        return Part(
            shard=None if meta["shard"] is None else Shard(**meta["shard"]),
            rows=rows,
            keys=meta["keys"],
            bad=[(key, reason) for key, reason in meta["bad"]],
            warned=[(key, warning) for key, warning in meta["warned"]],
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged: that part is converted again


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the data comes from: class names, the plan of the conversion and the source's place."""

    classes: tuple[str, ...]
    plan: Mapping[str, Any]
    source: str


def write_lists(destination: Destination, parts: Sequence[Part], origin: Origin) -> None:
    """Write the lists of bad and of doubtful images.

    Raises:
        InputError: every image is bad.
        OSError: a file cannot be written.
    """
    bad = [item for part in parts for item in part.bad]
    warned = [item for part in parts for item in part.warned]
    write_whole(destination.folder / QUARANTINE, _json_lines(bad, "reason"))
    write_whole(destination.folder / WARNINGS, _json_lines(warned, "warning"))
    if not any(len(part.rows) for part in parts):
        raise InputError(
            f"none of the {len(bad)} images of {origin.source} can be used, the first because of: {bad[0][1]} "
            f"({bad[0][0]}); see {destination.folder / QUARANTINE} and give images that can be decoded."
        )


def finish(
    destination: Destination,
    parts: Sequence[Part],
    origin: Origin,
    *,
    form: str,
    shards: Sequence[Shard] = (),
    sha256: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write the manifest, which makes the folder converted data of this format, and return it.

    Raises:
        OSError: it cannot be written.
    """
    rows = np.concatenate([part.rows for part in parts])
    keys = KeyTable.of(key for part in parts for key in part.keys)
    labels = rows["label"].astype(np.int64)
    manifest = {
        "format": form,
        "version": VERSION,
        "count": len(rows),
        "quarantined": sum(len(part.bad) for part in parts),
        "warnings": sum(len(part.warned) for part in parts),
        "image_bytes": int(rows["size"].sum()),
        "fingerprint": fingerprint(keys, labels=labels, nbytes=rows["size"], classes=origin.classes),
        "source": origin.source,
        "plan": dict(origin.plan),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("mvssl", "numpy", "pillow")},
        },
        "sha256": dict(sha256 or {}),
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "classes": list(origin.classes),
        "class_counts": np.bincount(labels[labels >= 0], minlength=len(origin.classes)).tolist(),
    }
    destination.finish(manifest)
    return manifest


def _json_lines(items: Iterable[tuple[str, str]], name: str) -> bytes:
    return "".join(json.dumps({"key": key, name: text}) + "\n" for key, text in items).encode("ascii")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


class Writer(Protocol):
    """Writes one part of the converted data."""

    def add(self, key: str, outcome: Checked, *, label: int) -> int:
        """Append an image and give the byte offset of its data in the file; `label` -1 is none."""

    def finish(self) -> Shard:
        """Sync what was written; from here on it survives a kill."""

    def discard(self) -> None:
        """Give up the part, unless it is finished."""


class Form(Protocol):
    """One way to lay out converted data."""

    def load(self, count: int) -> list[Part | None]:
        """The finished parts of an earlier run, of `count` that are planned; None for those to be written."""

    def suit(self, outcome: Checked) -> Checked:
        """The image as this form can hold it."""

    def writer(self, number: int, before: Sequence[Part | None]) -> Writer:
        """Begin part `number`; `before` are the parts in front of it."""

    def join(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Make one whole of the parts, write the manifest last, and return it.

        Raises:
            InputError: every image is bad.
            OSError: a file cannot be written.
        """

    def describe(self, manifest: dict[str, Any]) -> str:
        """What was written, for the summary: "in 3 shard(s)"."""

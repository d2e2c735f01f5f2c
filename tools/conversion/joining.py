"""What every form of converted data ends with: the lists of bad and doubtful images, and the manifest."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from pipelines.errors import InputError
from pipelines.storage.keys import KeyTable
from pipelines.storage.manifest import QUARANTINE, VERSION, WARNINGS, Shard
from pipelines.storage.source import fingerprint
from tools.conversion.destination import Destination
from tools.conversion.files import write_whole
from tools.conversion.parts import Part


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

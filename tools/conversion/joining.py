"""Join the parts of a finished conversion: the index, the lists of bad and doubtful images, and the manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from pipelines.errors import InputError
from pipelines.storage.keys import KeyTable
from pipelines.storage.manifest import FORMAT, INDEX, KEYS, QUARANTINE, VERSION, WARNINGS
from pipelines.storage.source import fingerprint
from tools.conversion.destination import Destination
from tools.conversion.files import write_whole
from tools.conversion.parts import Part


def join_parts(
    destination: Destination,
    parts: Sequence[Part],
    *,
    classes: tuple[str, ...],
    plan: Mapping[str, Any],
    origin: str,
) -> dict[str, Any]:
    """Write everything but the shards, the manifest last, and return the manifest.

    Raises:
        InputError: every image is bad.
        OSError: a file cannot be written.
    """
    bad = [item for part in parts for item in part.bad]
    warned = [item for part in parts for item in part.warned]
    write_whole(destination.folder / QUARANTINE, _json_lines(bad, "reason"))
    write_whole(destination.folder / WARNINGS, _json_lines(warned, "warning"))
    shards = [part.shard for part in parts if part.shard is not None]
    if not shards:
        raise InputError(
            f"none of the {len(bad)} images of {origin} can be used, the first because of: {bad[0][1]} ({bad[0][0]}); "
            f"see {destination.folder / QUARANTINE} and give images that can be decoded."
        )
    kept = [part for part in parts if part.shard is not None]
    rows = np.concatenate([part.rows for part in kept])
    keys = KeyTable.of(key for part in kept for key in part.keys)
    rows["shard"] = np.repeat(np.arange(len(kept)), [len(part.rows) for part in kept])
    rows["key_end"] = keys.ends
    sha256 = {}
    for name, array in ((INDEX, rows), (KEYS, keys.blob)):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        write_whole(destination.folder / name, file.getvalue())
        sha256[name] = hashlib.sha256(file.getvalue()).hexdigest()
    labels = rows["label"].astype(np.int64)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "count": len(rows),
        "quarantined": len(bad),
        "warnings": len(warned),
        "image_bytes": int(rows["size"].sum()),
        "fingerprint": fingerprint(keys, labels=labels, nbytes=rows["size"], classes=classes),
        "source": origin,
        "plan": dict(plan),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("mvssl", "numpy", "pillow")},
        },
        "sha256": sha256,
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "classes": list(classes),
        "class_counts": np.bincount(labels[labels >= 0], minlength=len(classes)).tolist(),
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

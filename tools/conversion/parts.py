"""What is known of a finished part, kept beside it until the conversion is finished: what makes it resumable."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.storage.manifest import INDEX_DTYPE, Shard
from tools.conversion.files import write_whole


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

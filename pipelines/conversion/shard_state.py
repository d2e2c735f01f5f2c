"""State of finished shards, saved so that a conversion can resume, and the contract of a format that writes shards."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipelines.conversion.image_check import CheckedImage
from pipelines.files import write_whole
from pipelines.storage.manifest import INDEX_DTYPE, Shard


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardState:
    """Result of one planned shard, which is a tar file or a section of a .beton file.

    Attributes:
        shard: the tar file or the section (see `BetonWriter.finish`); None if every image was bad.
        rows: INDEX_DTYPE [count]; `shard` and `key_end` are set when the shards are merged.
        keys: key of each row.
        bad: (source key, reason) of each image left out.
        warned: (source key, warning) of each image that was stored despite a warning.
        checksums: CRC-32 of each row; None in a state of an earlier version.
        damage: (row, damage) of each image that was stored although it is damaged; None if they were not examined.
    """

    shard: Shard | None
    rows: npt.NDArray[np.void]
    keys: Sequence[str]
    bad: Sequence[tuple[str, str]]
    warned: Sequence[tuple[str, str]]
    checksums: Sequence[int] | None = None
    damage: Sequence[tuple[int, str]] | None = None

    def save(self, path: Path) -> None:
        """Write the state atomically."""
        meta = {
            "shard": None if self.shard is None else dataclasses.asdict(self.shard),
            "keys": list(self.keys),
            "bad": list(self.bad),
            "warned": list(self.warned),
            "checksums": None if self.checksums is None else list(self.checksums),
            "damage": None if self.damage is None else list(self.damage),
        }
        file = io.BytesIO()
        np.savez(file, rows=self.rows, meta=np.frombuffer(json.dumps(meta).encode("ascii"), dtype=np.uint8))
        write_whole(path, file.getvalue())

    @classmethod
    def load(cls, path: Path) -> ShardState | None:
        """The state at `path`; None if it is missing or damaged. Does not check that the shard exists."""
        try:
            with np.load(path, allow_pickle=False) as data:
                rows = data["rows"]
                meta = json.loads(data["meta"].tobytes())
            if rows.dtype != INDEX_DTYPE:
                return None
            return cls(
                shard=None if meta["shard"] is None else Shard(**meta["shard"]),
                rows=rows,
                keys=meta["keys"],
                bad=[(key, reason) for key, reason in meta["bad"]],
                warned=[(key, warning) for key, warning in meta["warned"]],
                checksums=meta.get("checksums"),
                damage=None if meta.get("damage") is None else [(int(row), text) for row, text in meta["damage"]],
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None


def merged_checksums(states: Sequence[ShardState]) -> npt.NDArray[np.uint32] | None:
    """CRC-32 of every image, uint32 [N]; None if a shard was written by an earlier version."""
    found = [state.checksums for state in states if len(state.rows)]
    known = [sums for sums in found if sums is not None]
    return np.array([one for sums in known for one in sums], dtype=np.uint32) if len(known) == len(found) else None


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a format adds to the manifest.

    Attributes:
        format: its name there.
        shards: all tar files.
        sha256: of the index files.
        summary: where the images are, for the user: "in 3 shard(s)".
    """

    format: str
    shards: Sequence[Shard] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    summary: str


class Writer(Protocol):
    """Writes one shard."""

    def add(self, key: str, image: CheckedImage, *, label: int) -> int:
        """Append an image and return the offset of its data in the file; `label` is -1 for none."""

    def finish(self) -> Shard:
        """Sync the shard; it survives a kill from here on."""

    def discard(self) -> None:
        """Close the file and drop the shard, unless it is finished."""


class Format(Protocol):
    """A format of converted data."""

    def load(self, count: int) -> list[ShardState | None]:
        """States of `count` planned shards; None for those that have to be written."""

    def adapt(self, image: CheckedImage) -> CheckedImage:
        """The image as this format stores it."""

    def writer(self, number: int, before: Sequence[ShardState | None]) -> Writer:
        """Start shard `number`; `before` are the states of the shards in front of it."""

    def merge(self, states: Sequence[ShardState]) -> Merged:
        """Write everything but the manifest; raises InputError if it cannot be read back."""

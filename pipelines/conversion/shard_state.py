"""State of finished shards, saved so that a conversion can resume, and the contract of a format that writes shards."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipelines.arrays import read_arrays
from pipelines.conversion.image_check import CheckedImage
from pipelines.files import parse_json, write_whole
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
            data = read_arrays(path)
            meta = parse_json(data["meta"].tobytes())
            state = cls(
                shard=None if meta["shard"] is None else Shard(**meta["shard"]),
                rows=data["rows"],
                keys=_texts(meta["keys"]),
                bad=_pairs(meta["bad"]),
                warned=_pairs(meta["warned"]),
                checksums=meta.get("checksums"),
                damage=None if meta.get("damage") is None else [(int(row), str(text)) for row, text in meta["damage"]],
            )
            return state if state._is_sound() else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            return None

    def _is_sound(self) -> bool:
        """Whether what was read from a file can be a state; TypeError for other types."""
        rows, count, shard = self.rows, len(self.rows), self.shard
        if rows.dtype != INDEX_DTYPE or rows.shape != (len(self.keys),) or (shard is None) != (count == 0):
            return False
        if shard is not None:
            if not isinstance(shard.name, str) or "/" in shard.name or shard.count != count:
                return False
            inside = (rows["offset"] >= 0) & (rows["size"] > 0) & (rows["size"] <= shard.bytes - rows["offset"])
            sizes = (rows["height"] > 0) & (rows["width"] > 0) & (rows["label"] >= -1)
            if not (inside & sizes).all() or not all(isinstance(one, str) for one in (shard.sha256, shard.head)):
                return False
        sums = self.checksums
        if sums is not None and (len(sums) != count or not all(0 <= one < 1 << 32 for one in sums)):
            return False
        return all(0 <= row < count for row, _ in self.damage or ())


def _texts(values: object) -> list[str]:
    """A list of strings; TypeError for anything else."""
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise TypeError("no list of strings")
    return values


def _pairs(values: object) -> list[tuple[str, str]]:
    """A list of pairs of strings; TypeError or ValueError for anything else."""
    if not isinstance(values, list):
        raise TypeError("no list")
    return [(key, text) for key, text in map(_texts, values)]


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

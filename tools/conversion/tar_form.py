"""Converted data as tar shards with an index."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.storage.keys import KeyTable
from pipelines.storage.manifest import FORMAT, INDEX, KEYS
from tools.conversion.destination import Destination
from tools.conversion.files import write_whole
from tools.conversion.joining import Origin, finish, write_lists
from tools.conversion.parts import Part, load_part
from tools.conversion.shard_writer import ShardWriter
from tools.conversion.verify import Checked


class TarForm:
    """Each part is a shard of its own. Meets the `Form` contract."""

    def __init__(self, destination: Destination, origin: Origin) -> None:
        self._destination = destination
        self._origin = origin

    def load(self, count: int) -> list[Part | None]:
        """Parts whose shard is there in full."""
        return [self._load(number) for number in range(count)]

    def suit(self, outcome: Checked) -> Checked:
        """A tar file holds anything."""
        return outcome

    def writer(self, number: int, before: Sequence[Part | None]) -> ShardWriter:
        """A shard under a temporary name."""
        del before
        return ShardWriter(self._destination.shard(number))

    def join(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Write the index over all shards, and the manifest."""
        write_lists(self._destination, parts, self._origin)
        kept = [part for part in parts if part.shard is not None]
        rows = np.concatenate([part.rows for part in kept])
        keys = KeyTable.of(key for part in kept for key in part.keys)
        rows["shard"] = np.repeat(np.arange(len(kept)), [len(part.rows) for part in kept])
        rows["key_end"] = keys.ends
        sha256 = {}
        for name, array in ((INDEX, rows), (KEYS, keys.blob)):
            file = io.BytesIO()
            np.save(file, array, allow_pickle=False)
            write_whole(self._destination.folder / name, file.getvalue())
            sha256[name] = hashlib.sha256(file.getvalue()).hexdigest()
        shards = [part.shard for part in kept if part.shard is not None]
        return finish(self._destination, parts, self._origin, form=FORMAT, shards=shards, sha256=sha256)

    def describe(self, manifest: dict[str, Any]) -> str:
        """How many shards."""
        return f"in {len(manifest['shards'])} shard(s)"

    def _load(self, number: int) -> Part | None:
        part = load_part(self._destination.part(number))
        if part is None or part.shard is None:
            return part
        path = self._destination.folder / part.shard.name
        return part if path.is_file() and path.stat().st_size == part.shard.bytes else None

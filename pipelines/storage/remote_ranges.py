"""Images that lie as they are in tars and stored zips at a URL as a source."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.names import Url, utf8
from pipelines.runtime import InputError
from pipelines.storage.forms.base import Ranges
from pipelines.storage.image_facts import ImageFacts
from pipelines.storage.manifest import Shard
from pipelines.storage.remote import RemoteShards
from pipelines.storage.remote_objects import RemoteObject, changed
from pipelines.storage.source import KeyTable, fingerprint


class RemoteRanges(RemoteShards):
    """Images in byte ranges of files at a URL, read as those of converted shards are. Implements `Source`.

    What indexing has fetched and cached is not fetched again.
    """

    def __init__(
        self,
        location: Url,
        *,
        keys: KeyTable,
        labels: npt.NDArray[np.int64],
        classes: tuple[str, ...],
        ranges: Ranges,
    ) -> None:
        """Put an index over files; see `RangeSource`. The paths of `ranges` are `RemoteObject`s."""
        self._paths = [path for path in ranges.paths if isinstance(path, RemoteObject)]
        store = self._paths[0].store
        assert store is not None
        self._store = store
        self._connect(store.remote, store.cache, store.options)
        self.location = location
        self.labels, self.classes = labels, tuple(map(utf8, classes))
        self.nbytes = ranges.size
        self.facts = ImageFacts.of(len(keys), checksums=ranges.checksums)
        self.fingerprint = fingerprint(keys, labels=labels, nbytes=self.nbytes, classes=self.classes)
        self._keys, self._shard, self._offset = keys, ranges.file, ranges.offset
        start = len(str(store.root)) + 1
        self._shards = [
            Shard(name=str(path)[start:], bytes=path.size, sha256=path.identity, head="", count=0)
            for path in self._paths
        ]
        self._set_blocks(store.options.block_bytes)

    def __len__(self) -> int:
        return len(self._keys)

    def close(self) -> None:
        """See `RemoteShards`."""
        super().close()
        self._store.close()

    def _part(self, number: int, start: int, end: int) -> bytes:
        found = self._store.cached(self._paths[number], start, end)
        return super()._part(number, start, end) if found is None else found

    def _check_unchanged(self, number: int) -> None:
        self._store.check_unchanged(self._paths[number])
        self._first_facts[number] = {}

    def _damaged(self, name: str, problem: str) -> InputError:
        return changed(self._url(name), problem)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"{self.location} is open in this process: open it again in the other one")

"""From dataset indices to decoded images: read in threads, decode, and tell what failed."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from pipelines.batch import DecodedBatch
from pipelines.decode import Decoder
from pipelines.storage.source import Source

Encoded = np.ndarray | str
"""An image's bytes, uint8 [bytes], or in a few words why they cannot be read."""

_READERS = 8  # reading waits for disks and networks, not for cores
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # this process or machine ran out of something: no image's fault


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What came of a list of indices.

    Attributes:
        batch: the images that could be read and decoded, in the order asked for.
        failures: position in the list -> reason, of the others.
        encoded: the bytes, which must live as long as a decoder on the GPU may read them.
    """

    batch: DecodedBatch
    failures: Mapping[int, str]
    encoded: Sequence[np.ndarray]


class Fetcher:
    """Reads and decodes. One thread may read ahead while another one decodes.

    Attributes:
        reading_seconds, decoding_seconds: what `read`, and what calls, have taken so far (monotonic clock).
    """

    def __init__(self, source: Source, decoder: Decoder) -> None:
        self._source = source
        self._decoder = decoder
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="mvssl-read")
        self.reading_seconds = 0.0
        self.decoding_seconds = 0.0

    @property
    def decoder_name(self) -> str:
        """Which decoder is in use."""
        return self._decoder.name

    def read(self, indices: Sequence[int]) -> dict[int, Encoded]:
        """Read the images of these dataset indices; to be called from one thread at a time.

        Raises:
            InputError: the storage itself is damaged. A file that cannot be read is a reason and no exception.
            OSError: no more files can be opened, or there is no memory.
        """
        began = time.monotonic()
        read = self._read(indices)
        self.reading_seconds += time.monotonic() - began
        return read

    def __call__(self, indices: Sequence[int], read: Mapping[int, Encoded] = MappingProxyType({})) -> Fetched:
        """Decode the images of these dataset indices; to be called from one thread at a time.

        Args:
            indices: what to decode, in this order.
            read: what has been read of it already; the rest is read now.

        Raises:
            InputError: the decoder fails, or as `read`.
            OSError: as `read`.
        """
        began = time.monotonic()
        late = self._read([index for index in indices if index not in read])
        items = [read[index] if index in read else late[index] for index in indices]
        failures = {n: item for n, item in enumerate(items) if isinstance(item, str)}
        positions = [n for n in range(len(items)) if n not in failures]
        encoded = [item for item in items if not isinstance(item, str)]
        decoded = self._decoder(encoded)
        self.decoding_seconds += time.monotonic() - began
        failures.update((positions[n], reason) for n, reason in decoded.failures.items())
        index = np.array([i for n, i in enumerate(indices) if n not in failures], dtype=np.int64)
        batch = DecodedBatch.packed(
            decoded.pixels,
            sizes=decoded.sizes,
            index=torch.from_numpy(index),
            labels=torch.from_numpy(np.asarray(self._source.labels, dtype=np.int64)[index]),
        )
        return Fetched(batch=batch, failures=failures, encoded=encoded)

    def close(self) -> None:
        """End the reading threads and close the decoder."""
        self._pool.shutdown()
        self._decoder.close()

    def _read(self, indices: Sequence[int]) -> dict[int, Encoded]:
        share = -(-len(indices) // _READERS) or 1
        parts = self._pool.map(self._read_some, [indices[at : at + share] for at in range(0, len(indices), share)])
        return {index: item for part in parts for index, item in part}

    def _read_some(self, indices: Sequence[int]) -> list[tuple[int, Encoded]]:
        read: list[tuple[int, Encoded]] = []
        for index in indices:
            try:
                read.append((index, self._source.read(index)))
            except OSError as error:
                if error.errno in _OURS:
                    raise
                read.append((index, f"it cannot be read: {error.strerror or error}"))
        return read

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
from numpy.typing import NDArray

from pipelines.batch import DecodedBatch
from pipelines.decode import Decoder
from pipelines.loading.pixel_store import KeptSource, PixelStore
from pipelines.storage.source import ReadsTogether, Source
from pipelines.storage.together import READERS

Encoded = np.ndarray | str
"""An image's bytes, uint8 [bytes], or in a few words why they cannot be read."""

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
        self._store = source.store if isinstance(source, KeptSource) else None
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="mvssl-read")
        self.reading_seconds = 0.0
        self.decoding_seconds = 0.0

    @property
    def decoder_name(self) -> str:
        """Which decoder is in use."""
        return self._decoder.name

    def read(self, indices: Sequence[int]) -> dict[int, Encoded]:
        """Read the images of these dataset indices, but for those that are kept decoded; from one thread at a time.

        Raises:
            InputError: the storage itself is damaged. A file that cannot be read is a reason and no exception.
            OSError: no more files can be opened, or there is no memory.
        """
        began = time.monotonic()
        read = self._read(self._missing(indices))
        self.reading_seconds += time.monotonic() - began
        return read

    def __call__(self, indices: Sequence[int], read: Mapping[int, Encoded] = MappingProxyType({})) -> Fetched:
        """Decode the images of these dataset indices, or take those that are kept; from one thread at a time.

        Args:
            indices: what to decode, in this order.
            read: what has been read of it already; the rest is read now.

        Raises:
            InputError: the decoder fails, or as `read`.
            OSError: as `read`.
        """
        began = time.monotonic()
        fetched = self._decode(indices, read) if self._store is None else self._kept(self._store, indices, read)
        self.decoding_seconds += time.monotonic() - began
        return fetched

    def _kept(self, store: PixelStore, indices: Sequence[int], read: Mapping[int, Encoded]) -> Fetched:
        """Decode what is not kept yet and keep it; the whole batch from where it is kept."""
        missing = self._missing(indices)
        if not missing:
            return Fetched(batch=store.batch(indices, self._labels(indices)), failures={}, encoded=())
        fetched = self._decode(missing, read)
        store.add(fetched.batch)
        reasons = {missing[n]: reason for n, reason in fetched.failures.items()}
        failures = {n: reasons[index] for n, index in enumerate(indices) if index in reasons}
        good = [index for index in indices if index not in reasons]
        kept = [index for index in good if index in store]
        batch = store.batch(kept, self._labels(kept))
        if len(kept) < len(good):  # images that no room was made for
            batch = _chosen(batch, fetched.batch, good)
        return Fetched(batch=batch, failures=failures, encoded=fetched.encoded)

    def _missing(self, indices: Sequence[int]) -> list[int]:
        """What is not kept, each once."""
        if self._store is None:
            return list(indices)
        return [index for index in dict.fromkeys(indices) if index not in self._store]

    def _decode(self, indices: Sequence[int], read: Mapping[int, Encoded]) -> Fetched:
        late = self._read([index for index in indices if index not in read])
        items = [read[index] if index in read else late[index] for index in indices]
        failures = {n: item for n, item in enumerate(items) if isinstance(item, str)}
        positions = [n for n in range(len(items)) if n not in failures]
        encoded = [item for item in items if not isinstance(item, str)]
        decoded = self._decoder(encoded)
        failures.update((positions[n], reason) for n, reason in decoded.failures.items())
        good = [i for n, i in enumerate(indices) if n not in failures]
        batch = DecodedBatch.packed(
            decoded.pixels,
            sizes=decoded.sizes,
            index=torch.tensor(good, dtype=torch.int64),
            labels=torch.from_numpy(self._labels(good)),
        )
        return Fetched(batch=batch, failures=failures, encoded=encoded)

    def _labels(self, indices: Sequence[int]) -> NDArray[np.int64]:
        return np.asarray(self._source.labels, dtype=np.int64)[np.asarray(indices, dtype=np.int64)]

    def close(self) -> None:
        """End the reading threads and close the decoder."""
        self._pool.shutdown()
        self._decoder.close()

    def _read(self, indices: Sequence[int]) -> dict[int, Encoded]:
        together = self._source.read_together(indices) if isinstance(self._source, ReadsTogether) else ()
        read: dict[int, Encoded] = {i: data for i, data in zip(indices, together, strict=False) if data is not None}
        rest = [index for index in indices if index not in read]
        share = -(-len(rest) // READERS) or 1
        for part in self._pool.map(self._read_some, [rest[at : at + share] for at in range(0, len(rest), share)]):
            read.update(part)
        return read

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


def _chosen(kept: DecodedBatch, decoded: DecodedBatch, order: Sequence[int]) -> DecodedBatch:
    """One batch of the images of two, in this order of dataset indices, each copied."""
    found = {
        index: (batch.image(n).reshape(-1).to(decoded.device), batch.sizes[n], batch.labels[n])
        for batch in (decoded, kept)
        for n, index in enumerate(batch.index.tolist())
    }
    pixels, sizes, labels = zip(*(found[index] for index in order), strict=True)
    return DecodedBatch.packed(
        torch.cat(pixels), sizes=torch.stack(sizes), index=torch.tensor(order), labels=torch.stack(labels)
    )

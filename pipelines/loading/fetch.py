"""From dataset indices to decoded images: read in threads, decode, and tell what failed.

What takes the place of an image that cannot be decoded: the next of the epoch's order that can.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import DecodedBatch
from pipelines.decode import Decoder
from pipelines.loading.pixel_cache import KeptSource, PixelStore
from pipelines.order import replacement
from pipelines.runtime import InputError
from pipelines.storage.batch_read import READERS
from pipelines.storage.source import ReadsTogether, Source

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


_TOLERATED = 0.1  # of the data set may be bad
_DEVIATIONS = 6  # beyond what chance adds to a batch, see the tests for how seldom
_SMALL = 3  # images; in a batch of so few it may happen that all are bad
_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Complete:
    """A batch without gaps.

    Attributes:
        batch: one image per position; where one was replaced, index and label are the replacement's.
        replaced: how many were replaced.
        held: bytes and pixels that must live as long as a decoder on the GPU may read them.
    """

    batch: DecodedBatch
    replaced: int
    held: Sequence[object]


def fetch_complete(
    fetch: Callable[[Sequence[int]], Fetched],
    permutation: NDArray[np.int64],
    positions: slice,
    *,
    bad: MutableMapping[int, str],
    found_bad: Callable[[int, str], None],
    key: Callable[[int], str],
) -> Complete:
    """Fetch the images at these places of the epoch's order, and replacements for the bad ones.

    The result, and whether there is one, depends on the permutation and on which images are bad, not on how many of
    those are known already: a known one is only replaced without decoding it again. One image may replace two (or stand
    in the batch itself).

    Args:
        fetch: reads and decodes images by dataset index.
        permutation: int64 [num_images].
        positions: places in the permutation.
        bad: dataset index -> reason of the images known to be bad; new ones are added.
        found_bad: called with (dataset index, reason) for each new one.
        key: name of an image by dataset index, for the message.

    Raises:
        InputError: too many of these places hold a bad image (see `too_many_bad`), no image of the data set can be
            used, or the storage is damaged.
    """
    places = list(range(*positions.indices(len(permutation))))
    wanted = [_usable(permutation, place, bad) for place in places]  # (index, place) of each slot
    slots = list(range(len(places)))  # still without an image
    lost: list[int] = []  # bad images that the order put here
    parts: list[tuple[list[int], Fetched]] = []
    while slots:
        fetched = fetch([wanted[slot][0] for slot in slots])
        parts.append(([slot for n, slot in enumerate(slots) if n not in fetched.failures], fetched))
        failed = [slots[n] for n in sorted(fetched.failures)]
        for n, reason in fetched.failures.items():
            index = wanted[slots[n]][0]
            if index not in bad:
                bad[index] = reason
                found_bad(index, reason)
        if len(parts) == 1:  # now it is known of every place whether its own image is bad
            lost = [index for index in permutation[places].tolist() if index in bad]
            if too_many_bad(len(lost), len(places)):
                raise _mostly_bad([f"{key(index)} ({bad[index]})" for index in lost], len(places))
        for slot in failed:
            wanted[slot] = _usable(permutation, wanted[slot][1], bad)
        slots = failed
    batch = parts[0][1].batch if len(parts) == 1 else _merge(parts)
    return Complete(batch=batch, replaced=len(lost), held=[(fetched.encoded, fetched.batch) for _, fetched in parts])


def usable_indices(permutation: NDArray[np.int64], positions: slice, *, bad: MutableMapping[int, str]) -> list[int]:
    """What `fetch_complete` asks for first, as far as bad images are known: dataset indices, some perhaps twice."""
    return [_usable(permutation, place, bad)[0] for place in range(*positions.indices(len(permutation)))]


def too_many_bad(bad: int, images: int) -> bool:
    """Whether a batch shows that the data is mostly broken, which replacing would only hide.

    That is: more of its images are bad than chance would make it if a tenth of the data set were (11 of 20, 55 of 256),
    or all of them, if they are more than 3. The batch alone decides, so a run stops at the same one wherever it began.

    Args:
        bad: images of the batch that cannot be decoded.
        images: all of the batch.
    """
    deviation = math.sqrt(images * _TOLERATED * (1 - _TOLERATED))  # of a binomial distribution
    return bad > images * _TOLERATED + _DEVIATIONS * deviation or bad == images > _SMALL


def _mostly_bad(reasons: Sequence[str], images: int) -> InputError:
    return InputError(
        f"{len(reasons)} of the {images} images of a batch cannot be decoded, for example "
        f"{'; '.join(reasons[:_EXAMPLES])}: check the data, or run mvssl-convert on it, which puts the bad images into "
        "quarantine."
    )


def _usable(permutation: NDArray[np.int64], place: int, bad: MutableMapping[int, str]) -> tuple[int, int]:
    index = int(permutation[place])
    return replacement(permutation, place, bad) if index in bad else (index, place)


def _merge(parts: Sequence[tuple[list[int], Fetched]]) -> DecodedBatch:
    """One batch of several, in the order of their slots: the buffers one behind the other, the offsets say the rest."""
    batches = [fetched.batch for _, fetched in parts]
    order = torch.tensor([slot for slots, _ in parts for slot in slots]).argsort()  # [N]
    starts = np.cumsum([0] + [batch.pixels.numel() for batch in batches])
    return DecodedBatch(
        pixels=torch.cat([batch.pixels for batch in batches]),
        offset=torch.cat([batch.offset + int(start) for batch, start in zip(batches, starts, strict=False)])[order],
        sizes=torch.cat([batch.sizes for batch in batches])[order],
        row_stride=torch.cat([batch.row_stride for batch in batches])[order],
        index=torch.cat([batch.index for batch in batches])[order],
        labels=torch.cat([batch.labels for batch in batches])[order],
    )

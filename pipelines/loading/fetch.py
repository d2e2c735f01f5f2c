"""Fetching: dataset indices to decoded images. Reads in threads, decodes, caches pixels, replaces bad images."""

from __future__ import annotations

import errno
import logging
import math
import time
import zlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import DecodedBatch
from pipelines.decode import Decoder
from pipelines.decode.damage import ODD, can_find_damage, find_damage, refused_jpegs
from pipelines.decode.limits import beyond_bytes
from pipelines.loading.pixel_cache import CachedSource, PixelCache
from pipelines.order import replacement
from pipelines.runtime import InputError
from pipelines.storage.batch_read import READERS
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import ReadsBatches, Source

Encoded = np.ndarray | str
"""An image's bytes, uint8 [bytes], or in a few words why they cannot be read."""

_log = logging.getLogger("mvssl.data")
_NOT_THE_IMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the process or machine ran out of something
_TOLERATED = 0.1  # fraction of the data set that may be bad
_DEVIATIONS = 6  # standard deviations above it that a batch may have; the tests compute how rarely chance exceeds them
_SMALL = 3  # images; in a batch of so few all may be bad by chance
_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Images fetched for a list of indices.

    Attributes:
        batch: those that could be read and decoded, in the order of the list.
        failures: position in the list -> reason, for the others.
        encoded: the bytes, which must live as long as a decoder on the GPU may read them.
    """

    batch: DecodedBatch
    failures: Mapping[int, str]
    encoded: Sequence[np.ndarray]


class Fetcher:
    """Reads and decodes images. One thread may read ahead while another one decodes.

    A JPEG is examined for damage when it is decoded for the first time, unless `mvssl-convert` has examined it. The log
    names damaged ones once. Pillow decodes them every time, so that all decoders agree on which are bad images and on
    the pixels of the others; and it is silent, where libjpeg in DALI writes to standard error.

    Attributes:
        reading_seconds, decoding_seconds: time spent in `read` and in calls (monotonic clock).
    """

    def __init__(self, source: Source, decoder: Decoder, *, threads: int = 1) -> None:
        """`threads` examine JPEGs for damage."""
        self._source = source
        self._decoder = decoder
        self._threads = threads
        self._facts = facts_of(source)
        self._cache = source.cache if isinstance(source, CachedSource) else None
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="mvssl-read")
        self.reading_seconds = 0.0
        self.decoding_seconds = 0.0

    @property
    def decoder_name(self) -> str:
        """The decoder in use."""
        return self._decoder.name

    def read(self, indices: Sequence[int]) -> dict[int, Encoded]:
        """Read the images of these dataset indices, except those whose pixels are cached; from one thread at a time.

        Raises:
            InputError: the storage itself is damaged. A file that cannot be read is a reason, not an exception.
            OSError: no more files can be opened, or memory is full.
        """
        began = time.monotonic()
        read = self._read(self._not_cached(indices))
        self.reading_seconds += time.monotonic() - began
        return read

    def __call__(self, indices: Sequence[int], read: Mapping[int, Encoded] = MappingProxyType({})) -> Fetched:
        """Decode the images of these dataset indices, or take their cached pixels; from one thread at a time.

        Args:
            indices: what to decode, in this order.
            read: what has been read already; the rest is read now.

        Raises:
            InputError, OSError: as `read`, or the decoder fails.
        """
        began = time.monotonic()
        fetched = self._decode(indices, read) if self._cache is None else self._cached(self._cache, indices, read)
        self.decoding_seconds += time.monotonic() - began
        return fetched

    def close(self) -> None:
        """End the reading threads and close the decoder."""
        self._pool.shutdown()
        self._decoder.close()

    def _read(self, indices: Sequence[int]) -> dict[int, Encoded]:
        """Encoded bytes by dataset index: all in one call if the storage can do that, the others in threads."""
        sizes, limits = self._source.nbytes, self._facts.limits
        read: dict[int, Encoded] = {i: beyond_bytes(int(sizes[i]), limits) for i in indices if sizes[i] > limits.bytes}
        wanted = [index for index in indices if index not in read]
        at_once = self._source.read_batch(wanted) if isinstance(self._source, ReadsBatches) else ()
        read.update((i, data) for i, data in zip(wanted, at_once, strict=False) if data is not None)
        rest = [index for index in indices if index not in read]
        share = -(-len(rest) // READERS) or 1
        for part in self._pool.map(self._read_each, [rest[at : at + share] for at in range(0, len(rest), share)]):
            read.update(part)
        sums = self._facts.checksums
        if sums is not None:
            for index, data in read.items():
                if not isinstance(data, str) and zlib.crc32(data.data) != sums[index]:
                    read[index] = "its bytes are not those that were written (checksum)"
        return read

    def _read_each(self, indices: Sequence[int]) -> list[tuple[int, Encoded]]:
        read: list[tuple[int, Encoded]] = []
        for index in indices:
            try:
                read.append((index, self._source.read(index)))
            except OSError as error:
                if error.errno in _NOT_THE_IMAGE:
                    raise
                read.append((index, f"it cannot be read: {error.strerror or error}"))
        return read

    def _decode(self, indices: Sequence[int], read: Mapping[int, Encoded]) -> Fetched:
        late = self._read([index for index in indices if index not in read])
        items = [read[index] if index in read else late[index] for index in indices]
        failures = {n: item for n, item in enumerate(items) if isinstance(item, str)}
        positions = [n for n in range(len(items)) if n not in failures]
        encoded = [item for item in items if not isinstance(item, str)]
        damaged = self._damaged([indices[n] for n in positions], encoded)
        decoded = self._decoder(encoded, damaged)
        failures.update((positions[n], reason) for n, reason in decoded.failures.items())
        good = [i for n, i in enumerate(indices) if n not in failures]
        self._name_damaged([indices[positions[n]] for n in damaged if n not in decoded.failures])
        batch = DecodedBatch.packed(
            decoded.pixels,
            sizes=decoded.sizes,
            index=torch.tensor(good, dtype=torch.int64),
            labels=torch.from_numpy(self._labels(good)),
        )
        return Fetched(batch=batch, failures=failures, encoded=encoded)

    def _damaged(self, indices: Sequence[int], encoded: Sequence[np.ndarray]) -> list[int]:
        """Positions of damaged JPEGs among the images of these dataset indices, which are examined if need be."""
        facts = self._facts
        new = [n for n, index in enumerate(indices) if not facts.examined[index]]
        if new:
            unknown = [encoded[n] for n in new]
            found = find_damage(unknown, threads=self._threads)
            if not can_find_damage() and self._decoder.name == "ffcv":  # its libjpeg smooths damaged blocks otherwise
                found = dict.fromkeys(range(len(new)), ODD) | found
            elif not can_find_damage() and self._decoder.name != "pillow":
                found = refused_jpegs(unknown, threads=self._threads, limits=facts.limits) | found
            for n, damage in found.items():
                facts.damage[indices[new[n]]] = damage
            facts.examined[[indices[n] for n in new]] = True
        return [n for n, index in enumerate(indices) if index in facts.damage] if facts.damage else []

    def _name_damaged(self, indices: Sequence[int]) -> None:
        facts = self._facts
        for index in indices:
            if index not in facts.named and facts.damage[index] != ODD:
                facts.named.add(index)
                key, damage = self._source.key(index), facts.damage[index]
                _log.warning("Image %s is damaged (%s): it is used as it decodes.", key, damage)

    def _cached(self, cache: PixelCache, indices: Sequence[int], read: Mapping[int, Encoded]) -> Fetched:
        """Decode and cache what is not cached yet; the whole batch from the cache."""
        missing = self._not_cached(indices)
        if not missing:
            return Fetched(batch=cache.batch(indices, self._labels(indices)), failures={}, encoded=())
        fetched = self._decode(missing, read)
        cache.add(fetched.batch)
        reasons = {missing[n]: reason for n, reason in fetched.failures.items()}
        failures = {n: reasons[index] for n, index in enumerate(indices) if index in reasons}
        good = [index for index in indices if index not in reasons]
        cached = [index for index in good if index in cache]
        batch = cache.batch(cached, self._labels(cached))
        if len(cached) < len(good):  # images without room in the cache
            batch = _in_order(batch, fetched.batch, good)
        return Fetched(batch=batch, failures=failures, encoded=fetched.encoded)

    def _not_cached(self, indices: Sequence[int]) -> list[int]:
        """Indices that are not cached, each once."""
        if self._cache is None:
            return list(indices)
        return [index for index in dict.fromkeys(indices) if index not in self._cache]

    def _labels(self, indices: Sequence[int]) -> NDArray[np.int64]:
        return np.asarray(self._source.labels, dtype=np.int64)[np.asarray(indices, dtype=np.int64)]


def _in_order(cached: DecodedBatch, decoded: DecodedBatch, order: Sequence[int]) -> DecodedBatch:
    """One batch of the images of two, in this order of dataset indices, each copied."""
    found = {
        index: (batch.image(n).reshape(-1).to(decoded.device), batch.sizes[n], batch.labels[n])
        for batch in (decoded, cached)
        for n, index in enumerate(batch.index.tolist())
    }
    pixels, sizes, labels = zip(*(found[index] for index in order), strict=True)
    return DecodedBatch.packed(
        torch.cat(pixels), sizes=torch.stack(sizes), index=torch.tensor(order), labels=torch.stack(labels)
    )


@dataclass(frozen=True, kw_only=True)
class CompleteBatch:
    """A batch in which bad images are replaced.

    Attributes:
        batch: one image per position; a replacement has its own index and label.
        replaced: number of replacements.
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
) -> CompleteBatch:
    """Fetch the images at these positions of the epoch's order, and replacements for bad ones.

    The result depends on the permutation and on which images are bad, not on how many of them are known already: those
    are replaced without being decoded again. One image may replace two, or be in the batch itself.

    Args:
        fetch: fetches images by dataset index.
        permutation: int64 [num_images].
        positions: slice of the permutation.
        bad: dataset index -> reason of known bad images; new ones are added.
        found_bad: called with (dataset index, reason) for each new one.
        key: name of an image by dataset index, for messages.

    Raises:
        InputError: too many of these images are bad (see `too_many_bad`), no image of the data set can be used, or the
            storage is damaged.
    """
    own = list(range(*positions.indices(len(permutation))))  # position of each slot of the batch
    wanted = [_usable(permutation, position, bad) for position in own]  # (index, position) to fetch for each slot
    empty = list(range(len(own)))  # slots without an image so far
    replaced = 0
    rounds: list[tuple[list[int], Fetched]] = []  # the slots that each fetch filled
    while empty:
        fetched = fetch([wanted[slot][0] for slot in empty])
        rounds.append(([slot for n, slot in enumerate(empty) if n not in fetched.failures], fetched))
        for n, reason in fetched.failures.items():
            index = wanted[empty[n]][0]
            if index not in bad:
                bad[index] = reason
                found_bad(index, reason)
        if len(rounds) == 1:  # now all bad images of these positions are known
            lost = [index for index in permutation[own].tolist() if index in bad]
            if too_many_bad(len(lost), len(own)):
                raise _mostly_bad([f"{key(index)} ({bad[index]})" for index in lost], len(own))
            replaced = len(lost)
        empty = [empty[n] for n in sorted(fetched.failures)]
        for slot in empty:
            wanted[slot] = _usable(permutation, wanted[slot][1], bad)
    batch = rounds[0][1].batch if len(rounds) == 1 else _merge(rounds)
    held = [(fetched.encoded, fetched.batch) for _, fetched in rounds]
    return CompleteBatch(batch=batch, replaced=replaced, held=held)


def usable_indices(permutation: NDArray[np.int64], positions: slice, *, bad: MutableMapping[int, str]) -> list[int]:
    """The dataset indices that `fetch_complete` asks for first, given the known bad images; may repeat some."""
    return [_usable(permutation, position, bad)[0] for position in range(*positions.indices(len(permutation)))]


def too_many_bad(bad: int, images: int) -> bool:
    """Whether a batch shows that the data is mostly broken, which replacing would only hide.

    True if more of its images are bad than would happen by chance if a tenth of the data set were (11 of 20, 55 of
    256), or all of them, if they are more than 3. The batch alone decides, so a run stops at the same one wherever it
    began.
    """
    deviation = math.sqrt(images * _TOLERATED * (1 - _TOLERATED))  # of a binomial distribution
    return bad > images * _TOLERATED + _DEVIATIONS * deviation or bad == images > _SMALL


def _usable(permutation: NDArray[np.int64], position: int, bad: MutableMapping[int, str]) -> tuple[int, int]:
    index = int(permutation[position])
    return replacement(permutation, position, bad) if index in bad else (index, position)


def _mostly_bad(reasons: Sequence[str], images: int) -> InputError:
    return InputError(
        f"{len(reasons)} of the {images} images of a batch cannot be decoded, for example "
        f"{'; '.join(reasons[:_EXAMPLES])}: check the data, or run mvssl-convert on it, which quarantines bad images."
    )


def _merge(rounds: Sequence[tuple[list[int], Fetched]]) -> DecodedBatch:
    """One batch of several, in the order of their slots: concatenated buffers, reordered offsets."""
    batches = [fetched.batch for _, fetched in rounds]
    order = torch.tensor([slot for slots, _ in rounds for slot in slots]).argsort()  # [N]
    starts = np.cumsum([0] + [batch.pixels.numel() for batch in batches])
    return DecodedBatch(
        pixels=torch.cat([batch.pixels for batch in batches]),
        offset=torch.cat([batch.offset + int(start) for batch, start in zip(batches, starts, strict=False)])[order],
        sizes=torch.cat([batch.sizes for batch in batches])[order],
        row_stride=torch.cat([batch.row_stride for batch in batches])[order],
        index=torch.cat([batch.index for batch in batches])[order],
        labels=torch.cat([batch.labels for batch in batches])[order],
    )

"""What takes the place of an image that cannot be decoded: the next of the epoch's order that can."""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import DecodedBatch
from pipelines.errors import InputError
from pipelines.loading.fetch import Fetched
from pipelines.order import replacement

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

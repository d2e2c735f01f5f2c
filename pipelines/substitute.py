"""What takes the place of an image that cannot be decoded: the next of the epoch's order that can."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import DecodedBatch
from pipelines.errors import InputError
from pipelines.fetch import Fetched
from pipelines.order import replacement

_STRIKES = 3
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
) -> Complete:
    """Fetch the images at these places of the epoch's order, and replacements for the bad ones.

    The result depends on the permutation and on which images are bad, not on how many of those are known already: a
    known one is only replaced without decoding it again. One image may replace two (or stand in the batch itself).

    Args:
        fetch: reads and decodes images by dataset index.
        permutation: int64 [num_images].
        positions: places in the permutation.
        bad: dataset index -> reason of the images known to be bad; new ones are added.
        found_bad: called with (dataset index, reason) for each new one.

    Raises:
        InputError: no image of the data set can be used, or the storage is damaged.
    """
    places = list(range(*positions.indices(len(permutation))))
    wanted = [_usable(permutation, place, bad) for place in places]  # (index, place) of each slot
    slots = list(range(len(places)))  # still without an image
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
        if len(failed) == len(places) > _STRIKES:
            break  # nothing of a whole batch: the guard stops here instead of searching on
        for slot in failed:
            wanted[slot] = _usable(permutation, wanted[slot][1], bad)
        slots = failed
    replaced = sum(int(permutation[place]) in bad for place in places)
    batch = parts[0][1].batch if len(parts) == 1 else _merge(parts)
    return Complete(batch=batch, replaced=replaced, held=[(fetched.encoded, fetched.batch) for _, fetched in parts])


class FailureGuard:
    """Stops a run whose data is mostly broken, which replacing would only hide.

    A strike is a batch of which more than a tenth (and more than 8 images, and more than half of a small batch) had to
    be replaced; three in a row stop, and a batch without a single good image does at once.
    """

    def __init__(self) -> None:
        self._strikes = 0

    def __call__(self, *, decoded: int, replaced: int, reasons: Sequence[str]) -> None:
        """Look at a batch of which `decoded` images came out, `replaced` of them as replacements.

        Raises:
            InputError: too many fail; `reasons` are the examples.
        """
        limit = min(max(8, decoded // 10), decoded // 2)
        self._strikes = self._strikes + 1 if replaced > limit else 0
        if decoded and self._strikes < _STRIKES:
            return
        share = f"{replaced} of {decoded} images in each of {_STRIKES} batches" if decoded else "All images of a batch"
        raise InputError(
            f"{share} cannot be decoded, for example {'; '.join(reasons[:_EXAMPLES])}: check the data, or run "
            "mvssl-convert on it, which puts the bad images into quarantine."
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

"""The order of images: a pure function of (seed, epoch, step, rank, number of ranks)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.runtime import InputError, invalid
from pipelines.views import randomness

_KEYS = 1 << 15  # images whose keys are computed at once: what fits in a core's cache


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that share each batch. The default is a single process.

    Attributes:
        rank: of this process, 0 to size - 1.
        size: number of processes.
        on_host: the ranks on this host, which share its page cache; None for all.
    """

    rank: int = 0
    size: int = 1
    on_host: range | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise invalid("world_size", self.size, "1 or more", "give the number of processes")
        if not 0 <= self.rank < self.size:
            raise invalid("rank", self.rank, f"between 0 and {self.size - 1}", "give the rank of this process")


SINGLE = Ranks()
"""A run of one process."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of the images of every epoch.

    An epoch is one permutation of the data set. Global batch k is its k-th slice, and each rank takes a contiguous part
    of that slice: the same seed gives the same global batches on any number of ranks. The short last batch is dropped.

    With `chunk`, for data that does not fit in memory on a disk with slow random access: blocks of `chunk` consecutive
    images are shuffled within a shuffle buffer of `window` images. Reading is one buffer ahead then, block by block
    (see `reading`), so the disk reads long sequences, and memory holds the encoded bytes of two buffers.

    Attributes:
        num_images: images in the data set.
        batch_size: images per step over all ranks.
        seed: in [0, 2**64).
        chunk: images of a block; 0 shuffles all images.
        window: images of the shuffle buffer, with `chunk`; whole blocks, so up to `chunk - 1` fewer.
    """

    num_images: int
    batch_size: int
    seed: int
    chunk: int = 0
    window: int = 32_768

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise invalid("num_images", self.num_images, "at least 1", "give a data set with images")
        if self.batch_size < 1:
            raise invalid("batch_size", self.batch_size, "at least 1", "give the images per step over all ranks")
        if self.batch_size > self.num_images:
            one = self.num_images == 1
            remedy = "give" if one else f"lower batch_size to at most {self.num_images} or give"
            raise InputError(
                f"batch_size is {self.batch_size} but the data set has only {self.num_images} image{'s' * (not one)}: "
                f"{remedy} more images.",
                field="batch_size",
            )
        if not 0 <= self.seed < 2**64:
            raise invalid("seed", self.seed, "between 0 and 2**64 - 1", "give another seed")
        if self.chunk < 0:
            raise invalid("chunk", self.chunk, "0 or more images", "give 0 to shuffle all images")
        if self.window < max(1, self.chunk):
            raise invalid(
                "window",
                self.window,
                f"at least the {max(1, self.chunk)} images of a block",
                "enlarge the shuffle buffer, or shorten the blocks",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch."""
        return self.num_images // self.batch_size

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """All images in the order of the epoch: int64 [num_images]. Takes about 0.3 s per million images.

        Raises:
            InputError: the epoch is negative.
        """
        order = self._shuffled(self.num_images, epoch, block=0)
        if self.chunk:
            order = order[np.argsort(self._buffer_of(order, epoch), kind="stable")]
        return order

    def positions(self, step: int, ranks: Ranks = SINGLE) -> slice:
        """This rank's slice of the epoch's permutation in a step.

        Raises:
            InputError: the step does not exist, or the batch does not divide among the ranks.
        """
        if self.batch_size % ranks.size:
            raise invalid(
                "batch_size", self.batch_size, f"a multiple of the {ranks.size} ranks", "give each rank as many images"
            )
        if not 0 <= step < self.steps_per_epoch:
            raise invalid("step", step, f"between 0 and {self.steps_per_epoch - 1}", "count steps within the epoch")
        share = self.batch_size // ranks.size
        start = step * self.batch_size + ranks.rank * share
        return slice(start, start + share)

    def batch(self, epoch: int, step: int, ranks: Ranks = SINGLE) -> NDArray[np.int64]:
        """Images of this rank in a step: int64 [batch_size // ranks.size].

        Shuffles the whole epoch for one batch; a loop calls `permutation` once and slices it by `positions`.
        """
        return self.permutation(epoch)[self.positions(step, ranks)]

    @property
    def buffer_steps(self) -> int:
        """Batches that `reading` must be ahead so that a full shuffle buffer has been read; 0 without `chunk`."""
        return 1 + -(-min(self.window, self.num_images) // self.batch_size) if self.chunk else 0

    def reading(
        self, permutation: NDArray[np.int64], epoch: int, ranks: Ranks = SINGLE, *, first_step: int = 0
    ) -> NDArray[np.int64]:
        """What a rank should read ahead in an epoch: int64 [steps, per-rank batch].

        Without `chunk`, its own images in the order of use. With it, its part of all images that the ranks on its host
        use (they share the page cache): one shuffle buffer after another, each in the order of the data set.

        Args:
            permutation: int64 [num_images], that of the epoch.
            epoch: its number.
            ranks: this process.
            first_step: images of earlier steps are left out.
        """
        share = self.positions(0, ranks)
        size = share.stop - share.start
        used = permutation[first_step * self.batch_size : self.steps_per_epoch * self.batch_size]
        used = used.reshape(-1, self.batch_size)  # [steps, batch]
        if not self.chunk:
            return used[:, share]
        here = range(ranks.size) if ranks.on_host is None else ranks.on_host
        used = used[:, here.start * size : here.stop * size].reshape(-1)
        used = used[np.lexsort((used, self._buffer_of(used, epoch)))]
        return used.reshape(-1, len(here), size)[:, ranks.rank - here.start]

    def _buffer_of(self, index: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Number of the shuffle buffer of each of these images in an epoch: int64, the shape of `index`."""
        blocks = -(-self.num_images // self.chunk)
        position = np.argsort(self._shuffled(blocks, epoch, block=1))  # [blocks]
        buffers: NDArray[np.int64] = position[index // self.chunk] // (self.window // self.chunk)
        return buffers

    def _shuffled(self, count: int, epoch: int, *, block: int) -> NDArray[np.int64]:
        """The numbers below `count` in random order: int64 [count]; `block` is that of the counter-based generator."""
        keys = []
        for start in range(0, count, _KEYS):
            high, low, _, _ = randomness.words(
                seed=self.seed,
                epoch=epoch,
                index=torch.arange(start, min(start + _KEYS, count)),
                view=torch.tensor(randomness.ORDER_VIEW),
                block=torch.tensor(block),
            )
            keys.append(high << 32 | low)  # one random 64-bit key each
        order: NDArray[np.int64] = torch.argsort(torch.cat(keys), stable=True).numpy()  # stable: one order for ties
        return order


def replacement(permutation: NDArray[np.int64], position: int, bad: Collection[int]) -> tuple[int, int]:
    """The image to take instead of the one at `position`: the next of the epoch's order, wrapping, that is not bad.

    Args:
        permutation: int64 [num_images], the epoch's order.
        position: of the image to replace.
        bad: dataset indices that cannot be used; a set is fastest.

    Returns:
        (dataset index, its position).

    Raises:
        InputError: every other image is bad.
    """
    for step in range(1, len(permutation)):
        candidate = (position + step) % len(permutation)
        if int(permutation[candidate]) not in bad:
            return int(permutation[candidate]), candidate
    raise InputError(
        f"None of the {len(permutation)} images of the data set can be used: check the first reasons in the log and "
        "convert the data set again."
    )

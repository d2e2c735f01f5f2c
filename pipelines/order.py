"""Which image comes when: a pure function of (seed, epoch, step, rank, world size)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.runtime import InputError, invalid
from pipelines.views import randomness as rng

_KEYS = 1 << 15  # images whose keys are made at once: what fits in a core's cache


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of the images of every epoch.

    An epoch is one permutation of the data set; global batch k is its k-th slice and each rank takes a contiguous share
    of that slice, so that the same seed gives the same global batches on any number of ranks. The short last batch is
    dropped.

    With `chunk`, for data that does not fit in memory on a disk that is slow at random places: runs of `chunk` images
    that lie one behind the other are put in a random order, and only the images of the runs of one window after the
    other are mixed. Reading is a window ahead then, run by run (see `reading`), so that a disk reads in long pieces
    and memory has to hold two windows' encoded bytes.

    Attributes:
        num_images: images in the data set.
        batch_size: images per step over all ranks.
        seed: in [0, 2**64).
        chunk: images of a run; 0 mixes all images.
        window: images that are mixed at a time where `chunk` is given; whole runs, so up to `chunk - 1` fewer.
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
            raise InputError(
                f"batch_size is {self.batch_size} but the data set has only {self.num_images} images: lower batch_size "
                f"to at most {self.num_images} or give more images."
            )
        if not 0 <= self.seed < 2**64:
            raise invalid("seed", self.seed, "between 0 and 2**64 - 1", "give another seed")
        if self.chunk < 0:
            raise invalid("chunk", self.chunk, "0 or more images", "give 0 to mix all images")
        if self.window < max(1, self.chunk):
            raise invalid(
                "window", self.window, f"at least the {max(1, self.chunk)} images of a run", "mix more, or shorter runs"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.num_images // self.batch_size

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """All images in the order of the epoch: int64 [num_images]. Takes about 0.3 s per million images.

        Raises:
            InputError: the epoch is negative.
        """
        order = self._shuffled(self.num_images, epoch, block=0)
        if self.chunk:
            order = order[np.argsort(self._window_of(order, epoch), kind="stable")]
        return order

    @property
    def window_steps(self) -> int:
        """Batches that `reading` must be ahead of their use so that a window is there when it is needed; 0 of none."""
        return 1 + -(-min(self.window, self.num_images) // self.batch_size) if self.chunk else 0

    def reading(
        self,
        permutation: NDArray[np.int64],
        epoch: int,
        *,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        beside: range | None = None,
    ) -> NDArray[np.int64]:
        """What a rank should read ahead in an epoch from a step on: int64 [steps, share of a batch].

        That are its own images in the order of their use. In a chunked order it is its part of all that the ranks on
        its machine use, which share a cache of files: one window after the other, each in the data set's order.

        Args:
            permutation: int64 [num_images], that of the epoch.
            epoch: its number.
            first_step: images of earlier steps are left out.
            rank, world_size: whose.
            beside: the ranks on its machine; None takes all.

        Raises:
            InputError: as `positions`.
        """
        share = self.positions(0, rank=rank, world_size=world_size)
        size = share.stop - share.start
        used = permutation[first_step * self.batch_size : self.steps_per_epoch * self.batch_size]
        used = used.reshape(-1, self.batch_size)  # [steps, batch]
        if not self.chunk:
            return used[:, share]
        here = range(world_size) if beside is None else beside
        used = used[:, here.start * size : here.stop * size].reshape(-1)
        used = used[np.lexsort((used, self._window_of(used, epoch)))]
        return used.reshape(-1, len(here), size)[:, rank - here.start]

    def _window_of(self, index: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """In which window of a chunked epoch each of these images is: int64, the shape of `index`."""
        runs = -(-self.num_images // self.chunk)
        place = np.argsort(self._shuffled(runs, epoch, block=1))  # [runs]
        windows: NDArray[np.int64] = place[index // self.chunk] // (self.window // self.chunk)
        return windows

    def _shuffled(self, count: int, epoch: int, *, block: int) -> NDArray[np.int64]:
        """The numbers below `count` in a random order: int64 [count]."""
        keys = []
        for start in range(0, count, _KEYS):
            index = torch.arange(start, min(start + _KEYS, count))
            high, low, _, _ = rng.words(
                seed=self.seed,
                epoch=epoch,
                index=index,
                view=torch.tensor(rng.ORDER_VIEW),
                block=torch.tensor(block),
            )
            keys.append(high << 32 | low)  # one random 64-bit key each
        # Stable, so that even equal keys have one order.
        order: NDArray[np.int64] = torch.argsort(torch.cat(keys), stable=True).numpy()
        return order

    def positions(self, step: int, *, rank: int = 0, world_size: int = 1) -> slice:
        """Where in the epoch's permutation a rank's share of a step's batch lies.

        Raises:
            InputError: the step or the rank does not exist, or the batch does not divide among the ranks.
        """
        if self.batch_size % world_size:
            raise invalid(
                "batch_size", self.batch_size, f"a multiple of the {world_size} ranks", "give each rank as many images"
            )
        if not 0 <= rank < world_size:
            raise invalid("rank", rank, f"between 0 and {world_size - 1}", "give the rank of this process")
        if not 0 <= step < self.steps_per_epoch:
            raise invalid("step", step, f"between 0 and {self.steps_per_epoch - 1}", "count steps within the epoch")
        share = self.batch_size // world_size
        start = step * self.batch_size + rank * share
        return slice(start, start + share)

    def batch(self, epoch: int, step: int, *, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """The images of a rank's share of a step: int64 [batch_size // world_size].

        Sorts the whole epoch for one batch; a loop takes `permutation` once and slices it by `positions`.

        Raises:
            InputError: as `permutation` and `positions`.
        """
        return self.permutation(epoch)[self.positions(step, rank=rank, world_size=world_size)]


def replacement(permutation: NDArray[np.int64], position: int, bad: Collection[int]) -> tuple[int, int]:
    """The image to take instead of the one at `position`: the next of the epoch's order, wrapping, that is not bad.

    Args:
        permutation: int64 [num_images], the epoch's order.
        position: place of the image to be replaced.
        bad: dataset indices that cannot be used; a set is fastest.

    Returns:
        (dataset index, its place in the permutation).

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

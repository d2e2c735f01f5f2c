"""Decoded batches in the epoch's order: while one is decoded, the next one is read."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.loading.doing import Doing
from pipelines.loading.fetch import Encoded, Fetcher
from pipelines.loading.prefetch import Prefetcher
from pipelines.loading.read_ahead import BATCHES_AHEAD, ReadAhead
from pipelines.loading.side_stream import SideStream
from pipelines.loading.stats import LoaderStats
from pipelines.loading.substitute import Complete, fetch_complete, usable_indices
from pipelines.order import Order
from pipelines.storage.source import Source

_log = logging.getLogger("mvssl.data")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which batch it is.

    Attributes:
        epoch, step: its number.
        permutation: int64 [num_images], the epoch's order.
        positions: its places there.
    """

    epoch: int
    step: int
    permutation: NDArray[np.int64]
    positions: slice


class DecodedAhead:
    """Reads and decodes one rank's share of every batch; bad images are named once and replaced."""

    def __init__(
        self,
        source: Source,
        order: Order,
        fetch: Fetcher,
        *,
        side: SideStream,
        doing: Doing,
        stats: LoaderStats,
        rank: int,
        world_size: int,
        beside: range,
    ) -> None:
        """Nothing is read yet.

        Args:
            source: the encoded images.
            order: which image comes when.
            fetch: reads and decodes.
            side: where a decoder on the GPU works.
            doing: told what is being done.
            stats: told which images are bad.
            rank: of this process among `world_size`.
            beside: the ranks on this machine, which share its cache of files.
        """
        self._source = source
        self._order = order
        self._fetch = fetch
        self._side = side
        self._doing = doing
        self._stats = stats
        self._rank = rank
        self._world_size = world_size
        self._beside = beside
        self._bad: dict[int, str] = {}

    def batches(self, epochs: Sequence[int], first_step: int) -> Generator[tuple[Place, Complete], None, None]:
        """Decodes batch after batch, of one epoch after the other from step `first_step` of the first one on.

        To be run in a thread of its own; reading has another one.
        """
        reading = Prefetcher(self._read(epochs, first_step), depth=1, name="mvssl-encoded", room_first=True)
        with closing(reading):
            for place, read in reading:
                at = self._doing.during("decoding", epoch=place.epoch, step=place.step)
                with at, self._side.use(), torch.no_grad():
                    complete = fetch_complete(
                        partial(self._fetch, read=read),
                        place.permutation,
                        place.positions,
                        bad=self._bad,
                        found_bad=self._found_bad,
                        key=self._source.key,
                    )
                del read
                yield place, complete
                del complete

    def _read(self, epochs: Sequence[int], first_step: int) -> Generator[tuple[Place, dict[int, Encoded]], None, None]:
        """Reads encoded bytes; runs in a thread of its own, one batch ahead of the decoder."""
        window = self._order.window_steps
        reading = self._reading(epochs, first_step)
        with closing(ReadAhead(self._source, reading, lead=window + BATCHES_AHEAD, late=window)) as ahead:
            for epoch in epochs:
                permutation = self._order.permutation(epoch)
                for step in range(first_step, self._order.steps_per_epoch):
                    ahead.advance()
                    place = Place(
                        epoch=epoch,
                        step=step,
                        permutation=permutation,
                        positions=self._order.positions(step, rank=self._rank, world_size=self._world_size),
                    )
                    with self._doing.during("reading", epoch=epoch, step=step):
                        read = self._fetch.read(usable_indices(permutation, place.positions, bad=self._bad))
                    yield place, read
                    del read
                first_step = 0

    def _reading(self, epochs: Iterable[int], first_step: int) -> Iterator[list[int]]:
        """A batch's worth of dataset indices after the other, as they are best read ahead."""
        for epoch in epochs:
            permutation = self._order.permutation(epoch)
            for indices in self._order.reading(
                permutation,
                epoch,
                first_step=first_step,
                rank=self._rank,
                world_size=self._world_size,
                beside=self._beside,
            ):
                yield indices.tolist()
            first_step = 0

    def _found_bad(self, index: int, reason: str) -> None:
        key = self._source.key(index)
        self._stats.bad[key] = reason
        _log.warning("Image %s cannot be decoded (%s): the next image of the order takes its place.", key, reason)

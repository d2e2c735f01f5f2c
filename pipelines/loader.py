"""The loader: batches of views, prepared in a thread while the model trains.

Threads. While the views of one batch are made, the next one is decoded and the one after that is read: three threads,
one after the other, each at most one batch ahead of the next. Reading and decoding use small pools of their own
(`threads` for decoding, see `pipelines.decode.default_threads`). On the CPU the views take as many threads as torch has
for its operations, beside those of the training step: both teams share the cores through the operating system. Nobody
here calls `torch.set_num_threads`, which would change the training step too.

What a loader counts: waiting, bad images, and where its time goes.

What the loader's threads are at, for the words about what goes wrong or hangs.

Decoded batches in the epoch's order: while one is decoded, the next one is read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import ViewBatch, with_index
from pipelines.decode import DecodeOptions, decoder_of
from pipelines.loading.fetch import Complete, Encoded, Fetcher, fetch_complete, usable_indices
from pipelines.loading.threads import BATCHES_AHEAD, Prefetcher, ReadAhead, SideStream, receive
from pipelines.order import Order
from pipelines.runtime import InputError, invalid
from pipelines.storage.source import Source
from pipelines.views.engine import ViewEngine
from pipelines.views.sampling import draw
from pipelines.views.spec import ViewSpec


@dataclass(kw_only=True)
class StageSeconds:
    """Seconds spent so far on each stage of preparing batches, each in a thread of its own (on a GPU: the host's).

    Attributes:
        storage: reading encoded bytes.
        decode: bytes to pixels.
        views: draws and views.
    """

    storage: float = 0.0
    decode: float = 0.0
    views: float = 0.0


@dataclass(kw_only=True)
class LoaderStats:
    """What happened so far.

    Attributes:
        wait_seconds: time the consumer waited for batches (monotonic clock): the data stall.
        first_wait_seconds: of it, the time for the first batch after a start, when none can be ready.
        batches: batches handed to the consumer.
        bad: key -> reason of the images that cannot be decoded, as found by the decoding thread.
        replaced: places in batches that were given to another image, as prepared.
        prepared: images prepared.
        stages: where its time went.
    """

    wait_seconds: float = 0.0
    first_wait_seconds: float = 0.0
    batches: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    replaced: int = 0
    prepared: int = 0
    stages: StageSeconds = field(default_factory=StageSeconds)


_log = logging.getLogger("mvssl.data")


class Doing:
    """Which batch each stage is at. Stages run in threads of their own."""

    def __init__(self, location: Path) -> None:
        """`location` is where the images are."""
        self._location = location
        self._batches: dict[str, str] = {}  # by stage

    @contextmanager
    def during(self, stage: str, *, epoch: int, step: int) -> Iterator[None]:
        """Note what is being done to which batch, and name it in what goes wrong unexpectedly."""
        batch = f"batch {step} of epoch {epoch} of {self._location}"
        self._batches[stage] = batch
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            error.add_note(f"while {batch} was prepared")
            raise
        finally:
            del self._batches[stage]

    def complain(self, seconds: float) -> None:
        """Say that no batch has come for so long, and what it hangs on."""
        doing = " and ".join(f"{stage} {batch}" for stage, batch in self._batches.copy().items()) or "doing nothing"
        _log.warning(
            "No batch has come for %.0f s: the loader is %s. If that does not end, a disk or network does not answer "
            "or the decoder hangs (--decoder pillow does without other libraries); stop the run and --resume it.",
            seconds,
            doing,
        )


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


_Prepared = tuple[ViewBatch, torch.cuda.Event | None]


class Loader:
    """Batches of views of a data set.

    The batch of (epoch, step) is a function of the data, the order's seed, epoch, step and rank alone: it does not
    matter where a run was resumed, how far ahead batches are prepared or what was decoded before. A bad image is named
    in a warning once and replaced by the next image of the epoch's order that decodes; a batch of mostly bad images
    stops the epoch.

    One epoch runs at a time: starting another ends the one before.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        order: Order,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        decode: DecodeOptions | None = None,
        backend: str = "auto",
        prefetch: int = 2,
        rank: int = 0,
        world_size: int = 1,
        beside: range | None = None,
    ) -> None:
        """Make a loader; nothing is read before an epoch is iterated.

        Args:
            source: the encoded images.
            specs: the views to make of each image.
            order: which image comes when; for `len(source)` images.
            device: where the views are made and handed over.
            dtype: of the views.
            decode: who decodes; None takes `DecodeOptions()`.
            backend: of the view engine.
            prefetch: finished batches that may wait.
            rank: of this process among `world_size`.
            beside: the ranks on this machine, which share its cache of files; None takes all.

        Raises:
            InputError: `order` is for another number of images, a number is below 1, or an argument is unknown.
        """
        if order.num_images != len(source):
            raise invalid("Order.num_images", order.num_images, f"the {len(source)} images of the source", "rebuild it")
        if prefetch < 1:
            raise invalid("prefetch", prefetch, "1 or more", "give the number of finished batches that may wait")
        share = order.positions(0, rank=rank, world_size=world_size)
        self.stats = LoaderStats()
        self._specs = tuple(specs)
        self._order = order
        self._prefetch = prefetch
        self._device = with_index(device)
        self._engine = ViewEngine(self._specs, device=self._device, backend=backend, dtype=dtype)
        self._side = SideStream(self._device)
        made = decoder_of(decode, device=self._device, batch_size=share.stop - share.start)
        self._fetch = Fetcher(source, made)
        self._doing = Doing(source.location)
        self._decoded = DecodedAhead(
            source,
            order,
            self._fetch,
            side=self._side,
            doing=self._doing,
            stats=self.stats,
            rank=rank,
            world_size=world_size,
            beside=range(world_size) if beside is None else beside,
        )
        self._producer: Prefetcher[_Prepared] | None = None
        self._ahead: tuple[int, int] | None = None  # the epoch that the running producer gives next, and its `until`
        self._next = (0, 0)
        self._closed = False

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self._order.steps_per_epoch

    @property
    def decoder_name(self) -> str:
        """Which decoder is in use: "dali-cpu", "dali-mixed", "ffcv" or "pillow"."""
        return self._fetch.decoder_name

    def epoch(self, epoch: int, *, first_step: int = 0, until: int | None = None) -> Iterator[ViewBatch]:
        """Iterate over the batches of an epoch.

        Leaving the loop early ends the producer's thread, and so does the end of the epoch, unless more epochs follow
        up to `until`: then the next one's first batches are prepared meanwhile, for an `epoch(epoch + 1, until=until)`
        that starts at once.

        Args:
            epoch: 0 or more.
            first_step: step to begin with, up to `steps_per_epoch` (then there is no batch).
            until: prepare the epochs up to this one (exclusive) without a pause; None stops behind this epoch.

        Raises:
            InputError: `epoch` or `first_step` does not exist; while iterating, too many images of a batch are bad,
                the decoder fails or the storage is damaged. Anything that goes wrong in the producer is raised to the
                consumer.
        """
        if epoch < 0:
            raise invalid("epoch", epoch, "0 or more", "count epochs from 0")
        if not 0 <= first_step <= self.steps_per_epoch:
            raise invalid("first_step", first_step, f"in [0, {self.steps_per_epoch}]", "count steps within the epoch")
        if self._closed:
            raise RuntimeError("The loader is closed.")
        return self._consume(epoch, first_step, epoch + 1 if until is None else until)

    def state_dict(self) -> dict[str, int]:
        """Epoch and step of the batch that comes next."""
        return {"epoch": self._next[0], "step": self._next[1]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over a position; go on with `epoch(state["epoch"], first_step=state["step"])`.

        Raises:
            InputError: the position does not exist in this loader's order.
        """
        epoch, step = state["epoch"], state["step"]
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise invalid("loader state", dict(state), f"a step below {self.steps_per_epoch}", "resume the same data")
        self._next = (epoch, step)

    def close(self) -> None:
        """End all threads and free the decoder; may be called twice."""
        self._stop()
        if not self._closed:
            self._closed = True
            self._fetch.close()

    def _stop(self) -> None:
        producer, self._producer, self._ahead = self._producer, None, None
        if producer is not None:
            producer.close()

    def _start(self, epoch: int, first_step: int, until: int) -> Prefetcher[_Prepared]:
        if self._producer is not None and self._ahead == (epoch, until) and first_step == 0:
            return self._producer
        self._stop()
        self._producer = Prefetcher(
            self._produce(range(epoch, until), first_step),
            depth=self._prefetch,
            name="mvssl-loader",
            complain=self._doing.complain,
        )
        return self._producer

    def _consume(self, epoch: int, first_step: int, until: int) -> Generator[ViewBatch, None, None]:
        began, producer = self._producer, self._start(epoch, first_step, until)
        first = producer is not began
        self._ahead = None
        complete = False
        try:
            for step in range(first_step, self.steps_per_epoch):
                waited = producer.wait_seconds
                prepared = next(producer, None)
                waited = producer.wait_seconds - waited
                self.stats.wait_seconds += waited
                self.stats.first_wait_seconds += waited if first else 0.0
                first = False
                if prepared is None:
                    raise RuntimeError("This epoch was ended: the loader was closed or another epoch was started.")
                batch, event = prepared
                del prepared  # or its views would live until the next batch is there
                receive(batch.views, event)
                self.stats.batches += 1
                self._next = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
                yield batch
                del batch
            complete = True
        finally:
            if self._producer is producer:
                if complete and epoch + 1 < until:
                    self._ahead = (epoch + 1, until)
                else:
                    self._stop()

    def _produce(self, epochs: Sequence[int], first_step: int) -> Generator[_Prepared, None, None]:
        """Makes views; runs in the thread whose finished batches wait for the training."""
        decoding = Prefetcher(self._decoded.batches(epochs, first_step), depth=1, name="mvssl-decode", room_first=True)
        with closing(decoding):
            for place, complete in decoding:
                with self._doing.during("making the views of", epoch=place.epoch, step=place.step):
                    prepared = self._make(place, complete)
                del complete  # or its pixels would live until the next ones are there
                yield prepared
                del prepared

    @torch.no_grad()
    def _make(self, place: Place, complete: Complete) -> _Prepared:
        """The views of a decoded batch."""
        began = time.monotonic()
        with self._side.use():
            batch = self._side.upload(complete.batch)
            params = draw(self._specs, batch.sizes, seed=self._order.seed, epoch=place.epoch, index=batch.index)
            views = self._engine(batch, params)
            event = self._side.mark(complete.held, batch, params)
        stages = self.stats.stages
        stages.storage, stages.decode = self._fetch.reading_seconds, self._fetch.decoding_seconds
        stages.views += time.monotonic() - began
        self.stats.replaced += complete.replaced
        self.stats.prepared += len(batch)
        return ViewBatch(views=views, index=batch.index, labels=batch.labels), event

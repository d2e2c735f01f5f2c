"""The loader: batches of views, prepared in threads while the model trains.

Three stages run in a thread each, one batch ahead of the next: read encoded bytes, decode them, make views. Reading and
decoding use thread pools of their own (`pipelines.decode.default_threads`); on the CPU, views use torch's threads. The
loader never calls `torch.set_num_threads`, which would change the training step too.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.batch import ViewBatch, with_index
from pipelines.checks import typed, whole
from pipelines.decode import DecodeOptions, decoder_of, thread_count
from pipelines.loading.deep_images import state_value_range
from pipelines.loading.fetch import CompleteBatch, Encoded, Fetcher, fetch_complete, usable_indices
from pipelines.loading.threads import BATCHES_AHEAD, Prefetcher, ReadAhead, SideStream, receive
from pipelines.order import SINGLE, Order, Ranks
from pipelines.runtime import InputError, invalid
from pipelines.storage.given import source_of
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source
from pipelines.views.engine import ViewEngine
from pipelines.views.sampling import draw
from pipelines.views.spec import ViewSpec

_log = logging.getLogger("mvssl.data")


@dataclass(kw_only=True)
class StageSeconds:
    """Host seconds spent so far in each stage, each in its own thread.

    Attributes:
        storage: reading encoded bytes.
        decode: bytes to pixels.
        views: augmentation parameters and views.
    """

    storage: float = 0.0
    decode: float = 0.0
    views: float = 0.0


@dataclass(kw_only=True)
class LoaderStats:
    """Counters since the loader was created.

    Attributes:
        wait_seconds: time the consumer waited for batches (monotonic clock): the data stall.
        first_wait_seconds: its part for the first batch after a start, when none can be ready.
        batches: batches handed to the consumer.
        bad: key -> reason of images that cannot be decoded.
        replaced: images that were replaced, in prepared batches.
        prepared: images prepared.
        stages: time per stage.
    """

    wait_seconds: float = 0.0
    first_wait_seconds: float = 0.0
    batches: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    replaced: int = 0
    prepared: int = 0
    stages: StageSeconds = field(default_factory=StageSeconds)


@dataclass(frozen=True, kw_only=True)
class BatchPosition:
    """Which batch of which epoch.

    Attributes:
        epoch, step: its number.
        permutation: int64 [num_images], the epoch's order.
        positions: the batch's slice of the permutation, on this rank.
    """

    epoch: int
    step: int
    permutation: NDArray[np.int64]
    positions: slice


_Prepared = tuple[ViewBatch, torch.cuda.Event | None]


class Loader:
    """Batches of views of a data set.

    The batch of (epoch, step) is a function of the data, the order's seed, epoch, step and rank alone: it does not
    depend on where a run was resumed, how far ahead batches are prepared or what was decoded before. A bad image is
    named in a warning once and replaced by the next image of the epoch's order that decodes; a batch of mostly bad
    images stops the epoch.

    One epoch runs at a time: starting another one stops the one before. In loops of others, `for batch in loader` is
    one epoch, and the next time the next one.
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
        ranks: Ranks = SINGLE,
    ) -> None:
        """Nothing is read before an epoch is iterated.

        Args:
            source: the encoded images.
            specs: the views to make of each image.
            order: the order of `len(source)` images.
            device: where the views are made and handed over.
            dtype: of the views.
            decode: decoder options; None for the defaults.
            backend: of the view engine.
            prefetch: finished batches that may wait.
            ranks: this process among those that share each batch.

        Raises:
            InputError: `order` is for another number of images, a number is below 1, or an argument is unknown.
        """
        if order.num_images != len(source):
            raise invalid("Order.num_images", order.num_images, f"the {len(source)} images of the source", "rebuild it")
        if prefetch < 1:
            raise invalid("prefetch", prefetch, "1 or more", "give the number of finished batches that may wait")
        share = order.positions(0, ranks)
        self.stats = LoaderStats()
        self._source = source
        self._specs = tuple(specs)
        self._order = order
        self._ranks = ranks
        self._prefetch = prefetch
        self._device = with_index(device)
        self._engine = ViewEngine(self._specs, device=self._device, backend=backend, dtype=dtype)
        self._stream = SideStream(self._device)
        facts = facts_of(source)
        decoder = decoder_of(
            decode,
            device=self._device,
            batch_size=share.stop - share.start,
            value_range=facts.value_range,
            limits=facts.limits,
        )
        self._fetch = Fetcher(source, decoder, threads=thread_count(decode))
        self._bad: dict[int, str] = {}  # dataset index -> reason
        self._activity = _Activity(source.location)
        self._producer: Prefetcher[_Prepared] | None = None
        self._ahead: tuple[int, int] | None = None  # the epoch that the running producer prepares next, and its `until`
        self._next = (0, 0)
        self._restored = False  # whether `_next` was loaded, and no batch has been given since
        self._closed = False
        self._process = os.getpid()
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)  # before the decoder's libraries end, which were imported above

    @classmethod
    @typed
    def of(
        cls,
        data: object,
        specs: Sequence[ViewSpec],
        *,
        batch_size: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        decode: DecodeOptions | None = None,
        prefetch: int = 2,
        ranks: Ranks = SINGLE,
    ) -> Loader:
        """A loader of data in any form (`source_of`), in random order, for a training loop of your own.

        Args:
            data: a folder of images, converted data, a list of paths or images, a dataset, ...
            specs: the views to make of each image, such as `paper_views(num_local=2, num_cutout=1)`.
            batch_size: images per batch over all ranks; a short last batch is left out.
            seed: of order and views.
            device: where the views are made and handed over; on "cuda" they are made there.
            dtype: of the views.
            decode: decoder options; None for the defaults.
            prefetch: finished batches that may wait.
            ranks: this process among those that share each batch, `Ranks(rank=..., size=...)`.

        Raises:
            InputError: the data cannot be used, or an argument is wrong.
        """
        source = source_of(data)
        state_value_range(source, None)
        order = Order(num_images=len(source), batch_size=batch_size, seed=seed)
        return cls(source, specs, order, device=device, dtype=dtype, decode=decode, prefetch=prefetch, ranks=ranks)

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[ViewBatch]:
        """One epoch, and the next time the next one, as of PyTorch's DataLoader: a loop that was left is not continued.

        After `load_state_dict` it is the rest of that epoch.
        """
        epoch, step = self._next
        return self.epoch(epoch + 1) if step and not self._restored else self.epoch(epoch, first_step=step)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A Loader holds threads and cannot be pickled or copied: make one in each process with Loader.of(...), and "
            "pass on its state_dict()."
        )

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self._order.steps_per_epoch

    @property
    def decoder_name(self) -> str:
        """The decoder in use: "dali-cpu", "dali-mixed", "ffcv" or "pillow"."""
        return self._fetch.decoder_name

    def epoch(self, epoch: int, *, first_step: int = 0, until: int | None = None) -> Iterator[ViewBatch]:
        """Iterate over the batches of an epoch.

        Leaving the loop early stops the threads, and so does the end of the epoch, unless more epochs follow up to
        `until`: then the first batches of the next one are prepared meanwhile, for `epoch(epoch + 1, until=until)`.

        Args:
            epoch: 0 or more.
            first_step: step to start from, up to `steps_per_epoch` (then there is no batch).
            until: prepare epochs up to this one (exclusive) without a pause; None for this epoch alone.

        Raises:
            InputError: `epoch` or `first_step` does not exist; while iterating, too many images of a batch are bad, the
                decoder fails or the storage is damaged. Exceptions in the threads are raised here.
        """
        epoch, first_step = whole("epoch", epoch), whole("first_step", first_step)
        if epoch < 0:
            raise invalid("epoch", epoch, "0 or more", "count epochs from 0")
        if until is not None and whole("until", until) <= epoch:
            raise invalid("until", until, f"above the epoch {epoch}", "give the number of epochs, or leave it out")
        if not 0 <= first_step <= self.steps_per_epoch:
            raise invalid("first_step", first_step, f"in [0, {self.steps_per_epoch}]", "count steps within the epoch")
        if self._closed:
            raise RuntimeError("The loader is closed: make another one.")
        if os.getpid() != self._process:
            raise RuntimeError(
                "The loader belongs to the process that was forked, as its threads do: make one in this process."
            )
        return self._consume(epoch, first_step, epoch + 1 if until is None else until)

    def state_dict(self) -> dict[str, int]:
        """Epoch and step of the next batch."""
        return {"epoch": self._next[0], "step": self._next[1]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore a position: iterating gives the rest of its epoch, as does `epoch(epoch, first_step=step)`.

        Raises:
            InputError: the position does not exist in this loader's order.
        """
        if not isinstance(state, Mapping) or not {"epoch", "step"} <= set(state):
            raise invalid("loader state", state, "a mapping with epoch and step", "give what state_dict() returned")
        epoch, step = whole("epoch", state["epoch"]), whole("step", state["step"])
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise invalid("loader state", dict(state), f"a step below {self.steps_per_epoch}", "resume the same data")
        self._next, self._restored = (epoch, step), True

    def close(self) -> None:
        """Stop all threads and free the decoder; may be called twice."""
        if os.getpid() != self._process:  # a fork has no threads to stop
            return
        atexit.unregister(self._at_exit)
        self._stop()
        if not self._closed:
            self._closed = True
            self._fetch.close()

    # The consumer: hands finished batches to the training loop and measures how long it waits.

    def _consume(self, epoch: int, first_step: int, until: int) -> Generator[ViewBatch, None, None]:
        running, producer = self._producer, self._start(epoch, first_step, until)
        first = producer is not running
        self._ahead = None
        finished = False
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
                self._restored = False
                yield batch
                del batch
            finished = True
        finally:
            if self._producer is producer:
                if finished and epoch + 1 < until:
                    self._ahead = (epoch + 1, until)
                else:
                    self._stop()

    def _start(self, epoch: int, first_step: int, until: int) -> Prefetcher[_Prepared]:
        if self._producer is not None and self._ahead == (epoch, until) and first_step == 0:
            return self._producer
        self._stop()
        self._producer = Prefetcher(
            self._make_views(range(epoch, until), first_step),
            depth=self._prefetch,
            name="mvssl-loader",
            warn_slow=self._activity.warn_slow,
        )
        return self._producer

    def _stop(self) -> None:
        producer, self._producer, self._ahead = self._producer, None, None
        if producer is not None:
            producer.close()

    # The three stages, each a generator in a thread of its own that takes its input from the next one.

    def _make_views(self, epochs: Sequence[int], first_step: int) -> Generator[_Prepared, None, None]:
        """Stage 3: views of decoded batches."""
        decoded = Prefetcher(self._decode(epochs, first_step), depth=1, name="mvssl-decode", room_first=True)
        with closing(decoded):
            for position, complete in decoded:
                with self._activity.during("making the views of", position):
                    prepared = self._views_of(position, complete)
                del complete  # or its pixels would live until the next ones are there
                yield prepared
                del prepared

    @torch.no_grad()
    def _views_of(self, position: BatchPosition, complete: CompleteBatch) -> _Prepared:
        began = time.monotonic()
        with self._stream.use():
            batch = self._stream.upload(complete.batch)
            params = draw(self._specs, batch.sizes, seed=self._order.seed, epoch=position.epoch, index=batch.index)
            views = self._engine(batch, params)
            event = self._stream.mark(complete.held, batch, params)
        stages = self.stats.stages
        stages.storage, stages.decode = self._fetch.reading_seconds, self._fetch.decoding_seconds
        stages.views += time.monotonic() - began
        self.stats.replaced += complete.replaced
        self.stats.prepared += len(batch)
        return ViewBatch(views=views, index=batch.index, labels=batch.labels), event

    def _decode(
        self, epochs: Sequence[int], first_step: int
    ) -> Generator[tuple[BatchPosition, CompleteBatch], None, None]:
        """Stage 2: decoded batches, with bad images replaced."""
        encoded = Prefetcher(self._read(epochs, first_step), depth=1, name="mvssl-encoded", room_first=True)
        with closing(encoded):
            for position, read in encoded:
                with self._activity.during("decoding", position), self._stream.use(), torch.no_grad():
                    complete = fetch_complete(
                        partial(self._fetch, read=read),
                        position.permutation,
                        position.positions,
                        bad=self._bad,
                        found_bad=self._found_bad,
                        key=self._source.key,
                    )
                del read
                yield position, complete
                del complete

    def _read(
        self, epochs: Sequence[int], first_step: int
    ) -> Generator[tuple[BatchPosition, dict[int, Encoded]], None, None]:
        """Stage 1: encoded bytes. Upcoming reads are announced to the storage."""
        lag = self._order.buffer_steps
        announced = self._announced(epochs, first_step)
        with closing(ReadAhead(self._source, announced, lead=lag + BATCHES_AHEAD, late=lag)) as ahead:
            for epoch in epochs:
                permutation = self._order.permutation(epoch)
                for step in range(first_step, self._order.steps_per_epoch):
                    ahead.advance()
                    positions = self._order.positions(step, self._ranks)
                    position = BatchPosition(epoch=epoch, step=step, permutation=permutation, positions=positions)
                    with self._activity.during("reading", position):
                        read = self._fetch.read(usable_indices(permutation, positions, bad=self._bad))
                    yield position, read
                    del read
                first_step = 0

    def _announced(self, epochs: Sequence[int], first_step: int) -> Iterator[list[int]]:
        """Dataset indices, one batch's worth after another, in the best order to read them ahead."""
        for epoch in epochs:
            permutation = self._order.permutation(epoch)
            for indices in self._order.reading(permutation, epoch, self._ranks, first_step=first_step):
                yield indices.tolist()
            first_step = 0

    def _found_bad(self, index: int, reason: str) -> None:
        key = self._source.key(index)
        self.stats.bad[key] = reason
        _log.warning("Image %s cannot be decoded (%s): the next image of the order takes its place.", key, reason)


def _close(loader: weakref.ref[Loader]) -> None:
    """Close a loader that is still there."""
    found = loader()
    if found is not None:
        found.close()


class _Activity:
    """Which batch each stage is working on, for error notes and hang warnings."""

    def __init__(self, location: Path) -> None:
        self._location = location
        self._batches: dict[str, str] = {}  # by stage

    @contextmanager
    def during(self, stage: str, position: BatchPosition) -> Iterator[None]:
        """Record the batch, and name it in unexpected exceptions."""
        batch = f"batch {position.step} of epoch {position.epoch} of {self._location}"
        self._batches[stage] = batch
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            error.add_note(f"while preparing {batch}")
            raise
        finally:
            del self._batches[stage]

    def warn_slow(self, seconds: float) -> None:
        """Warn that no batch has come for so long, and what the stages are doing."""
        activity = " and ".join(f"{stage} {batch}" for stage, batch in self._batches.copy().items()) or "idle"
        _log.warning(
            "No batch for %.0f s: the loader is %s. If this does not end, a disk or network does not respond or the "
            "decoder hangs (--decoder pillow uses no other library); stop the run and --resume it.",
            seconds,
            activity,
        )

"""The loader: batches of views, prepared in a thread while the model trains.

Threads. While the views of one batch are made, the next one is decoded and the one after that is read: three threads,
one after the other, each at most one batch ahead of the next. Reading and decoding use small pools of their own
(`threads` for decoding, see `pipelines.decode.default_threads`). On the CPU the views take as many threads as torch has
for its operations, beside those of the training step: both teams share the cores through the operating system. Nobody
here calls `torch.set_num_threads`, which would change the training step too.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing

import torch

from pipelines.batch import ViewBatch
from pipelines.decode import DecodeOptions, decoder_of
from pipelines.errors import invalid
from pipelines.loading.decoded_ahead import DecodedAhead, Place
from pipelines.loading.doing import Doing
from pipelines.loading.fetch import Fetcher
from pipelines.loading.prefetch import Prefetcher
from pipelines.loading.side_stream import SideStream, receive, with_index
from pipelines.loading.stats import LoaderStats
from pipelines.loading.substitute import Complete
from pipelines.order import Order
from pipelines.storage.source import Source
from pipelines.views.draw import draw
from pipelines.views.engine import ViewEngine
from pipelines.views.spec import ViewSpec

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

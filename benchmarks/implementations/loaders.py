"""Implementations of loading batches of views: our loader, a DataLoader, DALI alone, and FFCV."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.harness.page_cache import cached_fraction, drop, files_of
from benchmarks.harness.processes import Trials, cpu_seconds
from pipelines.batch import with_index
from pipelines.decode import DecodeOptions, DecoderName, default_threads, make_decoder
from pipelines.loader import Loader
from pipelines.loading.fetch import Fetcher
from pipelines.loading.pixel_cache import free_memory, with_cache
from pipelines.order import Order
from pipelines.runtime import InputError
from pipelines.storage import open_source, split_paths
from pipelines.storage.source import Source
from pipelines.views.engine import choose_backend
from pipelines.views.spec import ViewSpec


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What an implementation loads.

    Attributes:
        name: of the implementation.
        data: the data set.
        specs: V views.
        batch_size: images of a batch.
        num_batches: batches of a trial.
        device: of the finished views.
        decoder: of our loader.
        threads: of our loader's decoder; None takes its default.
        workers: processes of the DataLoader, threads of FFCV.
        cold: whether the data set's files are dropped from the page cache before each trial.
        chunk, window: block and shuffle buffer of our loader's order, in images.
        photometric: whether FFCV's views are complete; else they are crops, flips and normalisation only.
        cached: whether our loader starts from decoded images, as in a later epoch with --cache.
    """

    name: str
    data: Path
    specs: tuple[ViewSpec, ...]
    batch_size: int
    num_batches: int
    device: str
    decoder: DecoderName = "auto"
    threads: int | None = None
    workers: int = 2
    cold: bool = False
    chunk: int = 0
    window: int = 32_768
    photometric: bool = True
    cached: bool = False

    def order(self, source: Source) -> Order:
        """Of our loader and, without blocks, of everyone."""
        return Order(num_images=len(source), batch_size=self.batch_size, seed=0, chunk=self.chunk, window=self.window)

    @property
    def dtype(self) -> torch.dtype:
        """Of our views and DALI's."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def open_train(data: Path) -> Source:
    """The training images of a data set."""
    return open_source(split_paths(data)[0])


def check_fits(data: Path, *batch_sizes: int) -> None:
    """Refuse data with fewer images than a batch."""
    with closing(open_train(data)) as source:
        for batch_size in batch_sizes:
            Order(num_images=len(source), batch_size=batch_size, seed=0)


@contextmanager
def needs(remedy: str) -> Iterator[None]:
    """Turn a missing package in the imports of the body into an InputError with this remedy."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"a package is missing ({error}): {remedy}.") from error


@contextmanager
def our_loader(setup: Setup) -> Iterator[Trials]:
    """Our loader with the views of the setup."""
    source = _decoded(setup) if setup.cached else open_train(setup.data)
    order = setup.order(source)
    decode = DecodeOptions(decoder=setup.decoder, threads=setup.threads)
    loader = Loader(source, setup.specs, order, device=setup.device, dtype=setup.dtype, decode=decode)
    epochs = count(0, -(-setup.num_batches // order.steps_per_epoch))

    def trial() -> dict[str, Any]:
        passes = passes_of_trial(order, num_batches=setup.num_batches, first_epoch=next(epochs))
        stages = stage_clock(loader, setup.device)
        return timed(views_of(loader, passes, until=passes[-1][0] + 1), setup, source) | stages()

    yield {setup.name: trial}
    loader.close()
    source.close()


def _decoded(setup: Setup) -> Source:
    """The images, all decoded and cached where the views are made."""
    device = with_index(setup.device)
    place: Literal["device", "host"] = "device" if device.type == "cuda" else "host"
    memory = free_memory(device, processes=1)
    source, _ = with_cache(open_train(setup.data), place, device=device, memory=memory)
    decoder = make_decoder(setup.decoder, device=device, batch_size=setup.batch_size, threads=default_threads())
    fetch = Fetcher(source, decoder)
    for start in range(0, len(source), setup.batch_size):
        fetch(range(start, min(start + setup.batch_size, len(source))))
    fetch.close()
    return source


def stage_clock(loader: Loader, device: str) -> Callable[[], dict[str, Any]]:
    """Start counting; the function returns decoder, view engine, seconds by stage since then, and bad images."""
    before = asdict(loader.stats.stages)

    def report() -> dict[str, Any]:
        now = asdict(loader.stats.stages)
        return {
            "decoder": loader.decoder_name,
            "view_engine": choose_backend("auto", torch.device(device)),
            "stage_seconds": {name: seconds - before[name] for name, seconds in now.items()},
            "bad": len(loader.stats.bad),
        }

    return report


def views_of(loader: Loader, passes: Iterable[tuple[int, int]], *, until: int) -> Generator[list[Tensor], None, None]:
    """The views of passes (epoch, first step) without a pause; `until` is the epoch before which the loader stops."""
    for epoch, first_step in passes:
        for batch in loader.epoch(epoch, first_step=first_step, until=until):
            views = batch.views
            del batch  # or they would live until the next ones are there
            yield views
            del views


def passes_of_trial(order: Order, *, num_batches: int, first_epoch: int) -> list[tuple[int, int]]:
    """(epoch, first step) of the passes of a trial: whole epochs, and of the first one only the end if that is enough.

    Every pass goes to the end of its epoch, so that no loader prepares batches that nobody takes.
    """
    epochs = -(-num_batches // order.steps_per_epoch)
    skipped = epochs * order.steps_per_epoch - num_batches
    return [(first_epoch + n, skipped if n == 0 else 0) for n in range(epochs)]


def indices_of(order: Order, steps: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The dataset indices of the batches of some steps, each (epoch, step in it)."""
    permutations = {epoch: order.permutation(epoch) for epoch in {epoch for epoch, _ in steps}}
    return [permutations[epoch][order.positions(step)].tolist() for epoch, step in steps]


@contextmanager
def data_loader(setup: Setup) -> Iterator[Trials]:
    """The DataLoader baseline with the same batches."""
    with needs("install torchvision to measure the DataLoader"):
        from benchmarks.implementations.torchvision_baseline import WorkerLoader, torchvision_views
    with closing(open_train(setup.data)) as source:
        make = torchvision_views(setup.specs)
        loader = WorkerLoader(source, make, workers=setup.workers, device=torch.device(setup.device))
        yield _baseline(setup, source, lambda passes: loader([*chain(*passes)]), decoder="PIL", workers=setup.workers)


@contextmanager
def peer_loader(setup: Setup) -> Iterator[Trials]:
    """Another library's transforms in a DataLoader, with the same batches; `setup.name` is a key of `PEERS`."""
    from benchmarks.implementations.peers import PEERS

    peer = PEERS[setup.name]
    version = peer.version()
    with needs(f"reinstall {peer.package} to measure it"):
        make = peer.make(setup.specs)
        from benchmarks.implementations.torchvision_baseline import WorkerLoader
    with closing(open_train(setup.data)) as source:
        loader = WorkerLoader(source, make, workers=setup.workers, device=torch.device(setup.device))
        about = {"workers": setup.workers, "what": peer.what, "version": version, "decoder": "its own"}
        yield _baseline(setup, source, lambda passes: loader([*chain(*passes)]), **about)


DALI_WHAT = (
    "DALI decodes once and makes the views with its own operators, whose jitter and resize are not torchvision's"
)


@contextmanager
def dali_loader(setup: Setup) -> Iterator[Trials]:
    """All in one DALI graph, with the same batches."""
    with needs("install nvidia-dali-cuda120 to measure DALI"):
        from benchmarks.implementations.dali_baseline import DaliLoader
    with closing(open_train(setup.data)) as source:
        loader = DaliLoader(
            source,
            setup.specs,
            batch_size=setup.batch_size,
            threads=default_threads() if setup.threads is None else setup.threads,
            device=torch.device(setup.device),
            dtype=setup.dtype,
        )
        with closing(loader):
            yield _baseline(setup, source, lambda passes: loader([*chain(*passes)]), decoder="dali", what=DALI_WHAT)


FFCV_WHAT = {
    True: "FFCV decodes every image once per view, crops by area and flips; torchvision does the rest image by image",
    False: "FFCV decodes every image once per view, crops by area, flips and normalises: LESS work than all others, no "
    "cutout, jitter, grayscale, blur or solarize",
}
"""What FFCV's implementations do, by whether they are photometric."""


@contextmanager
def ffcv_loader(setup: Setup) -> Iterator[Trials]:
    """FFCV on a .beton file with the same batches."""
    with needs("run tools/install_ffcv.sh to measure FFCV"):
        from benchmarks.implementations.ffcv_baseline import FfcvLoader
    with closing(open_train(setup.data)) as source:
        loader = FfcvLoader(
            source.location,
            setup.specs,
            batch_size=setup.batch_size,
            workers=setup.workers,
            device=torch.device(setup.device),
            photometric=setup.photometric,
        )
        what = FFCV_WHAT[setup.photometric]
        yield _baseline(
            setup, source, lambda passes: chain(*map(loader, passes)), decoder="ffcv", workers=setup.workers, what=what
        )


def _baseline(
    setup: Setup, source: Source, load: Callable[[list[list[list[int]]]], Iterator[list[Tensor]]], **about: Any
) -> Trials:
    """Trials of a function from the dataset indices of passes of batches to their views; `about` joins the reports."""
    order = setup.order(source)
    epochs = count(0, -(-setup.num_batches // order.steps_per_epoch))

    def trial() -> dict[str, Any]:
        passes = passes_of_trial(order, num_batches=setup.num_batches, first_epoch=next(epochs))
        steps = [[(epoch, step) for step in range(first, order.steps_per_epoch)] for epoch, first in passes]
        return timed(load([indices_of(order, each) for each in steps]), setup, source) | about

    return {setup.name: trial}


def timed(batches: Iterator[Sequence[Tensor]], setup: Setup, source: Source) -> dict[str, Any]:
    """Take all batches and keep none, on CUDA until the last one is finished; loading begins with the clock.

    Raises:
        InputError: other batches came than the setup says.
    """
    report: dict[str, Any] = {}
    if setup.cold:
        files = files_of(source)
        drop(files)
        report["cached_fraction"] = cached_fraction(files)
    wait = waiter(setup.device)
    spent = cpu_seconds()
    began = time.perf_counter()
    images, shapes = 0, set()
    for views in batches:
        images += len(views[0])
        shapes.add(tuple(tuple(view.shape) for view in views))
        del views
    wait()
    report |= {"seconds": time.perf_counter() - began, "images": images}
    report["cpu_seconds"] = cpu_seconds() - spent
    expected = tuple((setup.batch_size, 3, spec.size, spec.size) for spec in setup.specs)
    if images != setup.batch_size * setup.num_batches or shapes != {expected}:
        raise InputError(f"{images} images in views of {shapes} came instead of {expected}: this is a bug, report it.")
    if setup.device == "cuda":
        report["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return report


def waiter(device: str) -> Callable[[], None]:
    """A function that waits for the device, called once now."""
    if device != "cuda":
        return lambda: None
    torch.cuda.synchronize()
    return torch.cuda.synchronize

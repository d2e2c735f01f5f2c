"""What loads batches of views in the benchmark of loaders: our loader, a DataLoader, DALI alone, and FFCV."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.measuring.isolated import Turns
from benchmarks.measuring.page_cache import cached_share, drop, files_of
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
    """What a contender loads.

    Attributes:
        name: of the contender.
        data: the data set.
        specs: V views.
        batch_size: images of a batch.
        num_batches: batches of a turn.
        device: where the views are handed over.
        decoder: of our loader.
        threads: of our loader's decoder; None takes its default.
        workers: processes of the DataLoader, threads of FFCV.
        cold: whether the data set's files are dropped from the system's cache before each turn.
        chunk, window: of the order that our loader takes.
        photometric: whether FFCV's views are completed; without, they are crops, flips and normalisation only.
        kept: whether our loader takes images that are decoded already, as in a later epoch with --cache.
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
    kept: bool = False


def batches_of_turn(order: Order, *, num_batches: int, first_epoch: int) -> list[tuple[int, int]]:
    """(epoch, first step) of the passes of a turn: whole epochs, of the first one as much as is needed, its end.

    Every pass goes to its epoch's end, so that no loader prepares batches that nobody takes.
    """
    epochs = -(-num_batches // order.steps_per_epoch)
    skipped = epochs * order.steps_per_epoch - num_batches
    return [(first_epoch + n, skipped if n == 0 else 0) for n in range(epochs)]


def indices_of_turns(order: Order, *, num_batches: int) -> Iterator[list[list[list[int]]]]:
    """For turn after turn, the dataset indices of each batch of each of its passes."""
    for first_epoch in count(0, -(-num_batches // order.steps_per_epoch)):
        passes = batches_of_turn(order, num_batches=num_batches, first_epoch=first_epoch)
        yield [
            indices_of(order, [(epoch, step) for step in range(first, order.steps_per_epoch)])
            for epoch, first in passes
        ]


@contextmanager
def our_loader(setup: Setup) -> Iterator[Turns]:
    """Our loader with the views of the setup."""
    source = _kept(setup) if setup.kept else open_train(setup.data)
    order = Order(num_images=len(source), batch_size=setup.batch_size, seed=0, chunk=setup.chunk, window=setup.window)
    loader = Loader(
        source,
        setup.specs,
        order,
        device=setup.device,
        dtype=torch.bfloat16 if setup.device == "cuda" else torch.float32,
        decode=DecodeOptions(decoder=setup.decoder, threads=setup.threads),
    )
    epochs = count(0, -(-setup.num_batches // order.steps_per_epoch))

    def turn() -> dict[str, Any]:
        passes = batches_of_turn(order, num_batches=setup.num_batches, first_epoch=next(epochs))
        before = replace(loader.stats.stages)
        views = _views(loader, passes)
        report = timed(views, setup, source)
        stages = {name: value - asdict(before)[name] for name, value in asdict(loader.stats.stages).items()}
        return report | {
            "decoder": loader.decoder_name,
            "view_engine": choose_backend("auto", torch.device(setup.device)),
            "stage_seconds": stages,
            "bad": len(loader.stats.bad),
        }

    yield {setup.name: turn}
    loader.close()
    source.close()


def _kept(setup: Setup) -> Source:
    """The images, all decoded and kept where the views are made."""
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


def _views(loader: Loader, passes: Sequence[tuple[int, int]]) -> Iterator[list[Tensor]]:
    """The views of some passes (epoch, first step), one after the other without a pause."""
    for epoch, first_step in passes:
        for batch in loader.epoch(epoch, first_step=first_step, until=passes[-1][0] + 1):
            views = batch.views
            del batch  # or they would live until the next ones are there
            yield views
            del views


@contextmanager
def data_loader(setup: Setup) -> Iterator[Turns]:
    """The DataLoader baseline with the same batches."""
    try:
        from benchmarks.contenders.baselines.torchvision_loader import TorchvisionLoader
    except ImportError as error:
        raise InputError(f"torchvision is missing ({error}): install it to measure the baseline.") from error
    source = open_train(setup.data)
    order = Order(num_images=len(source), batch_size=setup.batch_size, seed=0)
    loader = TorchvisionLoader(source, setup.specs, workers=setup.workers, device=torch.device(setup.device))
    turns = indices_of_turns(order, num_batches=setup.num_batches)

    def turn() -> dict[str, Any]:
        return timed(loader(list(chain.from_iterable(next(turns)))), setup, source) | {
            "decoder": "PIL",
            "workers": setup.workers,
        }

    yield {setup.name: turn}
    source.close()


DALI_WHAT = (
    "DALI decodes once and makes the views with its own operators, whose jitter and resize are not torchvision's"
)


@contextmanager
def dali_loader(setup: Setup) -> Iterator[Turns]:
    """All in one DALI graph, with the same batches."""
    try:
        from benchmarks.contenders.baselines.dali_loader import DaliLoader
    except ImportError as error:
        raise InputError(f"DALI is missing ({error}): install nvidia-dali-cuda120 to measure it.") from error
    source = open_train(setup.data)
    order = Order(num_images=len(source), batch_size=setup.batch_size, seed=0)
    loader = DaliLoader(
        source,
        setup.specs,
        batch_size=setup.batch_size,
        threads=default_threads() if setup.threads is None else setup.threads,
        device=torch.device(setup.device),
        dtype=torch.bfloat16 if setup.device == "cuda" else torch.float32,
    )
    turns = indices_of_turns(order, num_batches=setup.num_batches)

    def turn() -> dict[str, Any]:
        return timed(loader(list(chain.from_iterable(next(turns)))), setup, source) | {
            "decoder": "dali",
            "what": DALI_WHAT,
        }

    yield {setup.name: turn}
    loader.close()
    source.close()


FFCV_WHAT = {
    True: "FFCV decodes every image once per view, crops by area and flips; torchvision does the rest image by image",
    False: "FFCV decodes every image once per view, crops by area, flips and normalises: LESS work than all others, no "
    "cutout, jitter, grayscale, blur or solarize",
}
"""What FFCV's contenders do, by whether they are photometric."""


@contextmanager
def ffcv_loader(setup: Setup) -> Iterator[Turns]:
    """FFCV on a .beton file with the same batches."""
    try:
        from benchmarks.contenders.baselines.ffcv_loader import FfcvLoader
    except ImportError as error:
        raise InputError(f"FFCV is missing ({error}): run tools/install_ffcv.sh to measure it.") from error
    source = open_train(setup.data)
    order = Order(num_images=len(source), batch_size=setup.batch_size, seed=0)
    loader = FfcvLoader(
        source.location,
        setup.specs,
        batch_size=setup.batch_size,
        workers=setup.workers,
        device=torch.device(setup.device),
        photometric=setup.photometric,
    )
    turns = indices_of_turns(order, num_batches=setup.num_batches)

    def turn() -> dict[str, Any]:
        views = chain.from_iterable(map(loader, next(turns)))
        what = FFCV_WHAT[setup.photometric]
        return timed(views, setup, source) | {"decoder": "ffcv", "workers": setup.workers, "what": what}

    yield {setup.name: turn}
    source.close()


def indices_of(order: Order, steps: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The dataset indices of the batches of some steps, each (epoch, step in it)."""
    permutations = {epoch: order.permutation(epoch) for epoch in {epoch for epoch, _ in steps}}
    return [permutations[epoch][order.positions(step)].tolist() for epoch, step in steps]


def open_train(data: Path) -> Source:
    """The training images of a data set."""
    return open_source(split_paths(data)[0])


def timed(batches: Iterator[Sequence[Tensor]], setup: Setup, source: Source) -> dict[str, Any]:
    """Take all batches, which begin to be made with the clock, and keep none; on CUDA until the last one is there.

    Raises:
        InputError: other batches came than the setup says.
    """
    report: dict[str, Any] = {}
    if setup.cold:
        files = files_of(source)
        drop(files)
        report["cached_share"] = cached_share(files)
    wait = waiter(setup.device)
    began = time.perf_counter()
    images, shapes = 0, set()
    for views in batches:
        images += len(views[0])
        shapes.add(tuple(tuple(view.shape) for view in views))
        del views
    wait()
    report |= {"seconds": time.perf_counter() - began, "images": images}
    expected = tuple((setup.batch_size, 3, spec.size, spec.size) for spec in setup.specs)
    if images != setup.batch_size * setup.num_batches or shapes != {expected}:
        raise InputError(f"{images} images in views of {shapes} came instead of {expected}: this is a bug, report it.")
    if setup.device == "cuda":
        report["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return report


def waiter(device: str) -> Callable[[], None]:
    """A function that waits until the device has done what it was given, called once now."""
    if device != "cuda":
        return lambda: None
    torch.cuda.synchronize()
    return torch.cuda.synchronize

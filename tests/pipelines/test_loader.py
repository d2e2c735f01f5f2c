"""The loader: batches are a function of (seed, epoch, step, data) alone; bad images, errors, ends."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from decode_samples import MemorySource, encode, jpegs, picture

from pipelines.batch import DecodedBatch, ViewBatch
from pipelines.decode.pillow import decode_one
from pipelines.errors import InputError
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.views.draw import draw
from pipelines.views.engine import ViewEngine
from pipelines.views.spec import ViewSpec

SPECS = (
    ViewSpec(name="a", task="global", size=16, blur_kernel=3, is_target=True),
    ViewSpec(name="b", task="local", size=8, area=(0.1, 0.4), blur_kernel=3),
)
BATCH, COUNT, SEED = 8, 45, 5
BAD = (3, 4, 17, 30, 31, 32)


def source_with(bad: tuple[int, ...] = BAD, count: int = COUNT) -> MemorySource:
    files = jpegs(count)
    files[1], files[2] = encode(picture(20, 30), "PNG"), encode(picture(22, 18)[..., 0])
    for n in bad:
        files[n] = files[n][: n % 3 * 100]
    return MemorySource(files)


def loader_of(source: MemorySource, *, batch_size: int = BATCH, **options: Any) -> Loader:
    order = Order(num_images=len(source), batch_size=batch_size, seed=SEED)
    return Loader(source, SPECS, order, **{"threads": 1, "decoder": "pillow", **options})


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def same(a: ViewBatch, b: ViewBatch) -> bool:
    return (
        torch.equal(a.index, b.index)
        and torch.equal(a.labels, b.labels)
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    )


@pytest.fixture(scope="module")
def expected() -> list[list[ViewBatch]]:
    """Two epochs made without a loader: one image at a time, replacements by the rule as the design words it."""
    source = source_with()
    order = Order(num_images=COUNT, batch_size=BATCH, seed=SEED)
    engine = ViewEngine(SPECS)
    epochs = []
    for epoch in range(2):
        permutation = order.permutation(epoch).tolist()
        good = [next(i for i in permutation[p:] + permutation if i not in BAD) for p in range(COUNT)]
        batches = []
        for step in range(COUNT // BATCH):
            chosen = good[step * BATCH : (step + 1) * BATCH]
            images = [np.array(decode_one(source.read(i))) for i in chosen]
            batch = DecodedBatch.from_images(images, index=chosen, labels=[i % 2 for i in chosen])
            params = draw(SPECS, batch.sizes, seed=SEED, epoch=epoch, index=chosen)
            batches.append(ViewBatch(views=engine(batch, params), index=batch.index, labels=batch.labels))
        epochs.append(batches)
    return epochs


@pytest.mark.parametrize(("decoder", "prefetch"), [("pillow", 1), ("dali", 3)])
def test_batches_are_those_made_by_hand(expected: list[list[ViewBatch]], decoder: str, prefetch: int) -> None:
    loader = loader_of(source_with(), decoder=decoder, prefetch=prefetch)
    assert loader.steps_per_epoch == COUNT // BATCH
    for epoch, want in enumerate(expected):
        got = list(loader.epoch(epoch))
        assert len(got) == len(want)
        assert all(map(same, got, want))
    assert [view.dtype for view in got[0].views] == [torch.float32] * 2
    assert not got[0].views[0].requires_grad
    loader.close()


def test_a_resumed_loader_gives_the_same_batches(expected: list[list[ViewBatch]]) -> None:
    for epoch, step in [(0, 3), (1, 1), (1, 4)]:
        loader = loader_of(source_with(), decoder="dali")
        loader.load_state_dict({"epoch": epoch, "step": step})
        assert loader.state_dict() == {"epoch": epoch, "step": step}
        got = list(loader.epoch(epoch, first_step=step))
        assert len(got) == len(expected[epoch]) - step
        assert all(map(same, got, expected[epoch][step:]))
        assert loader.state_dict() == {"epoch": epoch + 1, "step": 0}
        assert list(loader.epoch(epoch, first_step=loader.steps_per_epoch)) == []
        loader.close()


def test_the_state_is_the_batch_that_comes_next() -> None:
    loader = loader_of(source_with())
    batches = loader.epoch(4)
    for step in range(2):
        next(batches)
        assert loader.state_dict() == {"epoch": 4, "step": step + 1}
    loader.close()


def test_ranks_share_the_global_batch(expected: list[list[ViewBatch]]) -> None:
    for rank in range(2):
        loader = loader_of(source_with(), rank=rank, world_size=2)
        half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        for got, want in zip(loader.epoch(1), expected[1], strict=True):
            part = ViewBatch(
                views=[view[half] for view in want.views], index=want.index[half], labels=want.labels[half]
            )
            assert same(got, part)
        loader.close()


def test_reading_ahead_changes_nothing_but_the_wait(expected: list[list[ViewBatch]]) -> None:
    loader = loader_of(source_with())
    assert all(map(same, loader.epoch(0, read_ahead=True), expected[0]))
    producer = loader._producer
    assert producer is not None
    assert all(map(same, loader.epoch(1, read_ahead=True), expected[1]))
    assert loader._producer is producer  # the same thread went on
    assert all(map(same, loader.epoch(0, read_ahead=True), expected[0]))  # not the epoch that was read ahead
    loader.close()


def test_bad_images_are_named_once_counted_and_not_read_again(caplog: pytest.LogCaptureFixture) -> None:
    source = source_with()
    loader = loader_of(source)
    with caplog.at_level(logging.WARNING, logger="mvssl.data"):
        for epoch in range(4):
            list(loader.epoch(epoch))
    assert loader.stats.bad.keys() == {f"image{n}.jpg" for n in BAD}
    assert sorted(record.getMessage().split()[1] for record in caplog.records) == sorted(loader.stats.bad)
    assert "the file is empty (0 bytes)" in caplog.text
    assert "truncated" in caplog.text
    assert [source.reads[n] for n in BAD] == [1] * len(BAD)
    assert loader.stats.batches == 4 * loader.steps_per_epoch
    order = Order(num_images=COUNT, batch_size=BATCH, seed=SEED)
    places = [order.permutation(epoch)[: COUNT // BATCH * BATCH] for epoch in range(4)]
    assert loader.stats.replaced == int(np.isin(places, BAD).sum())
    loader.close()


def test_a_file_that_cannot_be_read_is_a_bad_image() -> None:
    class Vanishing(MemorySource):
        def read(self, index: int) -> np.ndarray:
            if index == 6:
                raise FileNotFoundError(2, "No such file or directory")
            return super().read(index)

    loader = loader_of(Vanishing(jpegs(16)))
    assert all(6 not in batch.index for batch in loader.epoch(0))
    assert loader.stats.bad == {"image6.jpg": "it cannot be read: No such file or directory"}
    loader.close()


@pytest.mark.parametrize(("good", "message"), [(0, "All images of a batch"), (20, "images in each of 3 batches")])
def test_data_that_is_mostly_bad_stops_with_the_remedy(good: int, message: str) -> None:
    files = jpegs(100)
    source = MemorySource([data if n < good else data[:50] for n, data in enumerate(files)])
    loader = loader_of(source, batch_size=20)
    with pytest.raises(InputError, match=message) as caught:
        list(loader.epoch(0))
    assert "image" in str(caught.value)
    assert "truncated" in str(caught.value)
    assert "mvssl-convert" in str(caught.value)
    loader.close()


def test_without_one_good_image_even_a_small_batch_stops() -> None:
    loader = loader_of(MemorySource([np.empty(0, np.uint8)] * 3), batch_size=2)
    with pytest.raises(InputError, match=r"None of the 3 images|All images"):
        list(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize("error", [InputError("shard-000001.tar is truncated: copy it again."), RuntimeError("boom")])
def test_errors_of_the_producer_reach_the_consumer_at_once(error: Exception) -> None:
    class Failing(MemorySource):
        def read(self, index: int) -> np.ndarray:
            if sum(self.reads) >= 2 * BATCH:
                raise error
            return super().read(index)

    loader = loader_of(Failing(jpegs(COUNT)))
    batches = loader.epoch(0)
    for _ in range(2):
        next(batches)
    start = time.monotonic()
    with pytest.raises(type(error)) as caught:
        next(batches)
    assert time.monotonic() - start < 1
    assert caught.value is error
    notes = getattr(error, "__notes__", [])
    assert notes == ([] if isinstance(error, InputError) else ["while batch 2 of epoch 0 of memory was prepared"])
    del batches, caught  # their tracebacks hold the loader
    loader.close()


def test_leaving_early_ends_the_threads_many_times_over() -> None:
    source = source_with()
    loader = loader_of(source, decoder="dali")
    handles = 0
    for start in range(30):
        for step, _ in enumerate(loader.epoch(start)):
            if step == start % 4:
                break
        assert not [thread for thread in threading.enumerate() if thread.name == "mvssl-loader"]
        if sys.platform == "linux":
            handles = handles or len(os.listdir("/proc/self/fd"))
            assert len(os.listdir("/proc/self/fd")) == handles
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.epoch(0)


def test_epochs_leave_no_tensors_behind() -> None:
    loader = loader_of(source_with(), decoder="dali")
    alive = []
    for epoch in range(5):
        for _ in loader.epoch(epoch):
            pass
        del _
        gc.collect()
        alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert len(set(alive[2:])) == 1
    loader.close()


def test_an_exception_in_the_loop_ends_the_thread() -> None:
    loader = loader_of(source_with())
    with pytest.raises(ZeroDivisionError):
        sum(len(batch) / 0 for batch in loader.epoch(0))
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "mvssl-loader"]
    loader.close()


def test_another_epoch_ends_the_one_before() -> None:
    loader = loader_of(source_with())
    first, second = loader.epoch(0), loader.epoch(1)
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="another epoch was started"):
        list(first)
    assert len(list(second)) == loader.steps_per_epoch - 1
    loader.close()


def test_the_wait_for_a_slow_source_is_counted() -> None:
    class Slow(MemorySource):
        def read(self, index: int) -> np.ndarray:
            time.sleep(0.05)
            return super().read(index)

    loader = loader_of(Slow(jpegs(16)))
    list(loader.epoch(0))
    assert 0.05 < loader.stats.wait_seconds < 10
    loader.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefetch": 0}, "prefetch is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"decoder": "turbo"}, "decoder is 'turbo'"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"world_size": 3}, "multiple of the 3 ranks"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        loader_of(source_with(), **options)


def test_wrong_positions_are_named() -> None:
    with pytest.raises(InputError, match="num_images is 44"):
        Loader(source_with(), SPECS, Order(num_images=44, batch_size=8, seed=0))
    loader = loader_of(source_with())
    with pytest.raises(InputError, match="epoch is -1"):
        loader.epoch(-1)
    with pytest.raises(InputError, match="first_step is 6"):
        loader.epoch(0, first_step=6)
    with pytest.raises(InputError, match="loader state"):
        loader.load_state_dict({"epoch": 0, "step": 99})
    loader.close()


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_on_a_gpu_the_views_are_the_cpus_almost(expected: list[list[ViewBatch]], decoder: str) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI cannot be imported here")
    loader = loader_of(source_with(), decoder=decoder, device="cuda")
    for got, want in zip(loader.epoch(0), expected[0], strict=True):
        assert torch.equal(got.index, want.index)
        for a, b in zip(got.views, want.views, strict=True):
            assert a.is_cuda
            assert (a.cpu() - b).abs().mean() < 0.05
    loader.close()

"""Bad images are replaced and named; mostly bad data stops the epoch; errors reach the consumer."""

from __future__ import annotations

import errno
import logging
import os

import numpy as np
import pytest

from pipelines.order import Order
from pipelines.runtime import InputError
from tests.samples.decode_samples import MemorySource, jpegs
from tests.samples.loader_samples import BAD, BATCH, COUNT, SEED, loader_of, source_with

pytestmark = pytest.mark.usefixtures("no_thread_left")


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


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_running_out_of_files_or_memory_is_not_a_bad_image(number: int) -> None:
    class Exhausted(MemorySource):
        def read(self, index: int) -> np.ndarray:
            if index == 6:
                raise OSError(number, os.strerror(number))
            return super().read(index)

    loader = loader_of(Exhausted(jpegs(16)))
    with pytest.raises(OSError, match=os.strerror(number)):
        list(loader.epoch(0))
    assert loader.stats.bad == {}
    loader.close()


@pytest.mark.parametrize(
    ("good", "message"), [(0, "20 of the 20 images of a batch"), (20, "of the 20 images of a batch")]
)
def test_mostly_bad_data_is_an_error_with_a_remedy(good: int, message: str) -> None:
    files = jpegs(100)
    source = MemorySource([data if n < good else data[:50] for n, data in enumerate(files)])
    loader = loader_of(source, batch_size=20)
    with pytest.raises(InputError, match=message) as caught:
        list(loader.epoch(0))
    assert "image" in str(caught.value)
    assert "truncated" in str(caught.value)
    assert "mvssl-convert" in str(caught.value)
    loader.close()


def test_no_good_image_at_all_is_an_error_even_in_small_batches() -> None:
    loader = loader_of(MemorySource([np.empty(0, np.uint8)] * 3), batch_size=2)
    with pytest.raises(InputError, match="None of the 3 images"):
        list(loader.epoch(0))
    loader.close()


@pytest.mark.parametrize("error", [InputError("shard-000001.tar is truncated: copy it again."), RuntimeError("boom")])
def test_errors_of_the_threads_are_raised_in_their_place(error: Exception) -> None:
    class Failing(MemorySource):
        def read(self, index: int) -> np.ndarray:
            if sum(self.reads) >= 2 * BATCH:
                raise error
            return super().read(index)

    loader = loader_of(Failing(jpegs(COUNT)))
    batches = loader.epoch(0)
    for _ in range(2):
        next(batches)
    with pytest.raises(type(error)) as caught:
        next(batches)
    assert caught.value is error
    notes = getattr(error, "__notes__", [])
    assert notes == ([] if isinstance(error, InputError) else ["while preparing batch 2 of epoch 0 of memory"])
    del batches, caught  # their tracebacks hold the loader
    loader.close()

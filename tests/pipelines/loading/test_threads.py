"""Prefetcher: order, bound, errors in place, and no thread left. ReadAhead: announces batches in order and in time."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence

import pytest

from pipelines.loading.threads import Prefetcher, ReadAhead
from pipelines.runtime import InputError
from tests.samples.decode_samples import MemorySource, jpegs
from tests.samples.loader_samples import Clock

pytestmark = pytest.mark.usefixtures("no_thread_left")


def threads_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "test-prefetch"]


class Counting:
    """A generator of numbers that records how many it has made and whether it was closed."""

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self.made = 0
        self.closed = False
        self._count, self._error = count, error

    def __call__(self) -> Generator[int, None, None]:
        try:
            for n in range(self._count):
                self.made = n + 1
                yield n
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


def wait_for(counting: Counting, made: int) -> None:
    deadline = time.monotonic() + 30
    while counting.made < made:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_come_in_order_and_production_is_bounded(depth: int) -> None:
    counting = Counting(20)
    prefetcher = Prefetcher(counting(), depth=depth, name="test-prefetch")
    for taken in range(20):
        ahead = min(20, taken + depth + 1)  # the queue, and the item that waits for room in it
        wait_for(counting, ahead)
        time.sleep(0.005)  # a chance to go too far
        assert counting.made == ahead
        assert next(prefetcher) == taken
    assert next(prefetcher, "end") == "end"
    prefetcher.close()
    assert counting.closed
    assert not threads_alive()


def test_the_producers_error_is_raised_after_the_items_before_it() -> None:
    error = KeyError("image7.jpg")
    prefetcher = Prefetcher(Counting(2, error)(), depth=2, name="test-prefetch")
    assert [next(prefetcher), next(prefetcher)] == [0, 1]
    with pytest.raises(KeyError) as caught:
        next(prefetcher)
    assert caught.value is error
    assert next(prefetcher, "end") == "end"
    prefetcher.close()


def test_close_on_a_full_queue_ends_the_thread_and_the_generator() -> None:
    for _ in range(50):
        counting = Counting(1000)
        prefetcher = Prefetcher(counting(), depth=2, name="test-prefetch")
        next(prefetcher)
        prefetcher.close()
        prefetcher.close()
        assert counting.closed
        assert not threads_alive()


def test_garbage_collection_ends_the_thread() -> None:
    counting = Counting(1000)
    prefetcher = Prefetcher(counting(), depth=2, name="test-prefetch")
    next(prefetcher)
    del prefetcher
    gc.collect()
    assert counting.closed
    assert not threads_alive()


@pytest.mark.parametrize("awaited", [True, False])
def test_wait_seconds_counts_waiting_only(monkeypatch: pytest.MonkeyPatch, awaited: bool) -> None:
    clock, counting = Clock(), Counting(3)
    monkeypatch.setattr("pipelines.loading.threads.time", clock)

    def items() -> Generator[int, None, None]:
        numbers = counting()
        for _ in range(3):
            clock.tick(0.5, awaited=awaited)
            yield next(numbers)

    prefetcher = Prefetcher(items(), depth=3, name="test-prefetch")
    if not awaited:
        wait_for(counting, 3)
    assert list(prefetcher) == [0, 1, 2]
    assert prefetcher.wait_seconds == (3 * 0.5 if awaited else 0.0)
    prefetcher.close()


def test_a_full_queue_does_not_keep_the_interpreter_alive() -> None:
    program = (
        "import itertools\nfrom pipelines.loading.threads import Prefetcher\n"
        "p = Prefetcher((n for n in itertools.count()), depth=2, name='full')\nprint(next(p), flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_with_room_first_nothing_is_produced_before_there_is_room() -> None:
    made: list[int] = []

    def items() -> Generator[int, None, None]:
        for n in range(10):
            made.append(n)
            yield n

    prefetcher = Prefetcher(items(), depth=2, name="test-room", room_first=True)
    for taken in range(10):
        deadline = time.monotonic() + 30
        while len(made) < min(10, taken + 2) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.005)
        assert len(made) == min(10, taken + 2)
        assert next(prefetcher) == taken
    assert next(prefetcher, None) is None
    prefetcher.close()


class Announced(MemorySource):
    """Records the batches announced to it; with `held` it blocks in the first call until it is released."""

    def __init__(self, *, held: bool = False, error: Exception | None = None) -> None:
        super().__init__(jpegs(2))
        self.announced: list[list[int]] = []
        self.entered, self.released, self.done = threading.Event(), threading.Event(), threading.Semaphore(0)
        self.error = error
        if not held:
            self.released.set()

    def will_need(self, indices: Sequence[int]) -> None:
        self.entered.set()
        assert self.released.wait(60)
        self.announced.append(list(indices))
        self.done.release()
        if self.error is not None:
            raise self.error


def batches(count: int) -> list[list[int]]:
    return [[n] for n in range(count)]


def finished(source: Announced, count: int) -> None:
    for _ in range(count):
        assert source.done.acquire(timeout=60)


def test_every_batch_is_announced_once_and_in_order() -> None:
    source = Announced()
    ahead = ReadAhead(source, iter(batches(6)), lead=3)
    finished(source, 3)
    assert source.announced == batches(3)
    for n in range(6):
        ahead.advance()
        finished(source, n < 3)
        assert source.announced == batches(min(6, 4 + n))
    ahead.close()


def test_batches_that_have_been_read_are_not_announced() -> None:
    source = Announced(held=True)
    ahead = ReadAhead(source, iter(batches(20)), lead=3)
    assert source.entered.wait(60)  # with batch 0; 1 and 2 are pending
    for _ in range(10):
        ahead.advance()  # batches 3 to 12
    source.released.set()
    finished(source, 4)
    ahead.close()
    assert source.announced == [[0], [10], [11], [12]]


def test_late_batches_are_still_announced() -> None:
    source = Announced(held=True)
    ahead = ReadAhead(source, iter(batches(20)), lead=3, late=5)
    assert source.entered.wait(60)
    for _ in range(10):
        ahead.advance()
    source.released.set()
    finished(source, 9)
    ahead.close()
    assert source.announced == [[0], *batches(13)[5:]]


def test_read_ahead_does_not_keep_the_interpreter_alive() -> None:
    code = (
        "import threading, time; from pipelines.loading.threads import ReadAhead\n"
        "class Slow:\n"
        "    def will_need(self, indices): began.set(); time.sleep(60)\n"
        "began = threading.Event()\n"
        "ahead = ReadAhead(Slow(), iter([[n] for n in range(100)]), lead=100); began.wait()\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=50, check=True)


def test_closing_waits_for_the_current_batch_only() -> None:
    source = Announced(held=True)
    ahead = ReadAhead(source, iter(batches(20)), lead=10)
    assert source.entered.wait(60)
    timer = threading.Timer(0.2, source.released.set)
    timer.start()
    ahead.close()
    timer.join()
    assert source.announced == [[0]]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), InputError("shard-000001.tar is missing")])
def test_errors_of_an_announcement_are_left_to_the_read(error: Exception) -> None:
    source = Announced(error=error)
    ahead = ReadAhead(source, iter(batches(5)), lead=2)
    finished(source, 2)
    ahead.advance()
    finished(source, 1)
    ahead.close()
    assert source.announced == batches(3)


def test_sources_without_read_ahead_are_accepted() -> None:
    ahead = ReadAhead(MemorySource(jpegs(2)), iter(batches(5)), lead=2)
    ahead.advance()
    ahead.close()

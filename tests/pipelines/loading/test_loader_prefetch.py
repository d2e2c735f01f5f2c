"""The prefetching thread: order, bound, errors in their place, and an end in every case."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Generator

import pytest

from pipelines.loading.threads import Prefetcher
from tests.samples.loader_samples import Clock


def threads_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "test-prefetch"]


class Counting:
    """A generator's makings, observed."""

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
def test_items_come_in_order_and_the_producer_stays_within_its_bound(depth: int) -> None:
    counting = Counting(20)
    prefetcher = Prefetcher(counting(), depth=depth, name="test-prefetch")
    for taken in range(20):
        ahead = min(20, taken + depth + 1)  # the queue, and the one in the producer's hands
        wait_for(counting, ahead)
        time.sleep(0.005)  # a chance to go too far
        assert counting.made == ahead
        assert next(prefetcher) == taken
    assert next(prefetcher, "end") == "end"
    prefetcher.close()
    assert counting.closed
    assert not threads_alive()


def test_an_error_comes_after_the_items_before_it_and_is_the_same_object() -> None:
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


def test_a_forgotten_prefetcher_ends_its_thread() -> None:
    counting = Counting(1000)
    prefetcher = Prefetcher(counting(), depth=2, name="test-prefetch")
    next(prefetcher)
    del prefetcher
    gc.collect()
    assert counting.closed
    assert not threads_alive()


@pytest.mark.parametrize("awaited", [True, False])
def test_the_consumers_wait_is_measured_and_not_the_producers_work(
    monkeypatch: pytest.MonkeyPatch, awaited: bool
) -> None:
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


def test_the_interpreter_ends_with_a_full_queue() -> None:
    program = (
        "import itertools\nfrom pipelines.loading.threads import Prefetcher\n"
        "p = Prefetcher((n for n in itertools.count()), depth=2, name='full')\nprint(next(p), flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")

"""The prefetching thread: order, bound, errors in their place, and an end in every case."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Generator

import pytest

from pipelines.prefetch import Prefetcher


def threads_alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "test-prefetch"]


class Counting:
    """A generator's makings, observed."""

    def __init__(self, count: int, error: BaseException | None = None, pause: float = 0.0) -> None:
        self.made = 0
        self.closed = False
        self._count, self._error, self._pause = count, error, pause

    def __call__(self) -> Generator[int, None, None]:
        try:
            for n in range(self._count):
                time.sleep(self._pause)
                self.made = n + 1
                yield n
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


def wait_until_still(counting: Counting) -> int:
    """The number of items made once the producer makes no more."""
    made = -1
    while made != counting.made:
        made = counting.made
        time.sleep(0.05)
    return made


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_items_come_in_order_and_the_producer_stays_within_its_bound(depth: int) -> None:
    counting = Counting(20)
    prefetcher = Prefetcher(counting(), depth=depth, name="test-prefetch")
    assert wait_until_still(counting) == depth + 1  # the queue, and the one in the producer's hands
    assert list(prefetcher) == list(range(20))
    assert next(prefetcher, "end") == "end"
    prefetcher.close()
    assert counting.closed
    assert not threads_alive()


def test_an_error_comes_after_the_items_before_it_and_is_the_same_object() -> None:
    error = KeyError("image7.jpg")
    prefetcher = Prefetcher(Counting(2, error)(), depth=2, name="test-prefetch")
    assert [next(prefetcher), next(prefetcher)] == [0, 1]
    start = time.monotonic()
    with pytest.raises(KeyError) as caught:
        next(prefetcher)
    assert time.monotonic() - start < 1
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


def test_the_consumers_wait_is_measured() -> None:
    prefetcher = Prefetcher(Counting(3, pause=0.1)(), depth=1, name="test-prefetch")
    list(prefetcher)
    assert 0.25 < prefetcher.wait_seconds < 2
    ready = Prefetcher(Counting(3)(), depth=3, name="test-prefetch")
    time.sleep(0.2)
    list(ready)
    assert ready.wait_seconds < 0.1


def test_the_interpreter_ends_with_a_full_queue() -> None:
    program = (
        "import itertools\nfrom pipelines.prefetch import Prefetcher\n"
        "p = Prefetcher((n for n in itertools.count()), depth=2, name='full')\nprint(next(p), flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")

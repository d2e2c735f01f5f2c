"""The storage hears of batches in order and in time, or not at all."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence

import pytest

from pipelines.loading.threads import ReadAhead
from pipelines.runtime import InputError
from tests.samples.decode_samples import MemorySource, jpegs

pytestmark = pytest.mark.usefixtures("no_thread_left")


class Told(MemorySource):
    """Notes what it is told, and waits in the first call until it is released."""

    def __init__(self, *, held: bool = False, error: Exception | None = None) -> None:
        super().__init__(jpegs(2))
        self.told: list[list[int]] = []
        self.entered, self.released, self.done = threading.Event(), threading.Event(), threading.Semaphore(0)
        self.error = error
        if not held:
            self.released.set()

    def will_need(self, indices: Sequence[int]) -> None:
        self.entered.set()
        assert self.released.wait(60)
        self.told.append(list(indices))
        self.done.release()
        if self.error is not None:
            raise self.error


def batches(count: int) -> list[list[int]]:
    return [[n] for n in range(count)]


def finished(source: Told, count: int) -> None:
    for _ in range(count):
        assert source.done.acquire(timeout=60)


def test_every_batch_is_named_once_and_in_order() -> None:
    source = Told()
    ahead = ReadAhead(source, iter(batches(6)), lead=3)
    finished(source, 3)
    assert source.told == batches(3)
    for n in range(6):
        ahead.advance()
        finished(source, n < 3)
        assert source.told == batches(min(6, 4 + n))
    ahead.close()


def test_batches_that_are_read_meanwhile_are_left_out() -> None:
    source = Told(held=True)
    ahead = ReadAhead(source, iter(batches(20)), lead=3)
    assert source.entered.wait(60)  # it is at batch 0; 1 and 2 wait
    for _ in range(10):
        ahead.advance()  # batches 3 to 12
    source.released.set()
    finished(source, 4)
    ahead.close()
    assert source.told == [[0], [10], [11], [12]]


def test_what_may_be_used_for_long_is_kept_for_long() -> None:
    source = Told(held=True)
    ahead = ReadAhead(source, iter(batches(20)), lead=3, late=5)
    assert source.entered.wait(60)
    for _ in range(10):
        ahead.advance()
    source.released.set()
    finished(source, 9)
    ahead.close()
    assert source.told == [[0], *batches(13)[5:]]


def test_an_interpreter_ends_although_nobody_closes_it() -> None:
    code = (
        "import threading, time; from pipelines.loading.threads import ReadAhead\n"
        "class Slow:\n"
        "    def will_need(self, indices): began.set(); time.sleep(60)\n"
        "began = threading.Event()\n"
        "ahead = ReadAhead(Slow(), iter([[n] for n in range(100)]), lead=100); began.wait()\n"
    )
    subprocess.run([sys.executable, "-c", code], timeout=50, check=True)


def test_closing_waits_for_one_batch_only() -> None:
    source = Told(held=True)
    ahead = ReadAhead(source, iter(batches(20)), lead=10)
    assert source.entered.wait(60)
    timer = threading.Timer(0.2, source.released.set)
    timer.start()
    ahead.close()
    timer.join()
    assert source.told == [[0]]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), InputError("shard-000001.tar is missing")])
def test_what_cannot_be_named_ends_nothing(error: Exception) -> None:
    source = Told(error=error)
    ahead = ReadAhead(source, iter(batches(5)), lead=2)
    finished(source, 2)
    ahead.advance()
    finished(source, 1)
    ahead.close()
    assert source.told == batches(3)


def test_a_source_that_cannot_read_ahead_is_left_alone() -> None:
    ahead = ReadAhead(MemorySource(jpegs(2)), iter(batches(5)), lead=2)
    ahead.advance()
    ahead.close()

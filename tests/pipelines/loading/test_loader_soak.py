"""Starting and stopping the loader hundreds of times at random steps leaves nothing behind.

    MVSSL_SOAK_ROUNDS=1000 python -m pytest tests/pipelines/loading/test_loader_soak.py     # 200 by default

Every round starts at a random step of a random epoch and leaves it in one of six ways; after eight rounds the loader
and its source are closed and created again. Threads, file handles and memory must not grow.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipelines.conversion.command import Convert, convert
from pipelines.decode import DecodeOptions
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.storage import Source, open_source
from pipelines.views.spec import ViewSpec
from tests.samples.decode_samples import encode, needs_dali, picture
from tests.samples.loader_samples import source_with

ROUNDS = int(os.environ.get("MVSSL_SOAK_ROUNDS", "200"))
RENEWED = 8  # rounds of one loader
WARM_UP = 50  # rounds until threads, handles and memory are constant
MOST_GROWTH = 24.0  # MiB, for any number of rounds; one leaked batch has 0.5 MiB
SPECS = (
    ViewSpec(name="a", task="global", size=64, blur_kernel=5, is_target=True),
    ViewSpec(name="b", task="local", size=32, area=(0.1, 0.4), blur_kernel=5),
)
BATCH, COUNT = 8, 45

pytestmark = [
    pytest.mark.usefixtures("no_thread_left"),
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="handles and memory are read from /proc"),
]


def leave_by_break(loader: Loader, epoch: int, first: int, taken: int) -> None:
    for n, _ in enumerate(loader.epoch(epoch, first_step=first)):
        if n == taken:
            break


def leave_by_an_error(loader: Loader, epoch: int, first: int, taken: int) -> None:
    with contextlib.suppress(KeyError):
        for n, _ in enumerate(loader.epoch(epoch, first_step=first)):
            if n == taken:
                raise KeyError


def leave_by_another_epoch(loader: Loader, epoch: int, first: int, taken: int) -> None:
    batches = loader.epoch(epoch, first_step=first)
    for _ in range(taken):
        next(batches, None)
    next(loader.epoch(epoch + 1))
    with pytest.raises((RuntimeError, StopIteration)):
        next(batches)


def leave_by_dropping(loader: Loader, epoch: int, first: int, taken: int) -> None:
    batches = loader.epoch(epoch, first_step=first)
    for _ in range(taken):
        next(batches, None)


def run_into_the_next_epoch(loader: Loader, epoch: int, first: int, taken: int) -> None:
    assert len(list(loader.epoch(epoch, first_step=first, until=epoch + 2))) == loader.steps_per_epoch - first
    for n, _ in enumerate(loader.epoch(epoch + 1, until=epoch + 2)):
        if n == taken:
            break


def close_in_the_middle(loader: Loader, epoch: int, first: int, taken: int) -> None:
    batches = loader.epoch(epoch, first_step=first)
    for _ in range(taken):
        next(batches, None)
    loader.close()


WAYS = (
    leave_by_break,
    leave_by_an_error,
    leave_by_another_epoch,
    leave_by_dropping,
    run_into_the_next_epoch,
    close_in_the_middle,
)


class Resources(NamedTuple):
    """Number of threads, targets of open file handles, and resident memory in MiB."""

    threads: int
    handles: list[str]
    memory: float


def resources() -> Resources:
    """Resources of this process after garbage collection."""
    gc.collect()
    handles = []
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            handles.append(os.readlink(f"/proc/self/fd/{handle}"))
    resident = int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])
    threads = len(os.listdir("/proc/self/task"))  # those of C libraries too
    return Resources(threads=threads, handles=sorted(handles), memory=resident / 1024)


def memory(_: Path) -> Callable[[], Source]:
    """Images in memory, some of them bad."""
    return source_with


def folder(base: Path) -> Callable[[], Source]:
    """Files."""
    for n in range(COUNT):
        (base / f"{n:02d}.jpg").write_bytes(encode(picture(40 + n, 60, n)).tobytes())
    return lambda: open_source(base)


def shards(base: Path) -> Callable[[], Source]:
    """Tar shards."""
    (base / "images").mkdir()
    folder(base / "images")
    convert(Convert(src=base / "images", dst=base / "shards"))
    return lambda: open_source(base / "shards")


@pytest.mark.parametrize(
    ("storage", "decoder"),
    [(memory, "pillow"), (folder, "pillow"), pytest.param(shards, "dali", marks=needs_dali)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_nothing_is_left_behind(storage: Callable[[Path], Callable[[], Source]], decoder: Any, tmp_path: Path) -> None:
    open_source_again = storage(tmp_path)
    chance = random.Random(0)
    begun: Resources | None = None
    rounds = 0
    while rounds < WARM_UP + ROUNDS:
        source = open_source_again()
        order = Order(num_images=len(source), batch_size=BATCH, seed=0)
        loader = Loader(
            source, SPECS, order, decode=DecodeOptions(decoder=decoder, threads=1), prefetch=chance.randint(1, 3)
        )
        for leave in chance.choices(WAYS, k=RENEWED):
            epoch, first = chance.randrange(1000), chance.randrange(order.steps_per_epoch)
            leave(loader, epoch, first, chance.randint(1, order.steps_per_epoch))
            rounds += 1
            assert not [thread for thread in threading.enumerate() if thread.name == "mvssl-loader"], leave
            if leave is close_in_the_middle:
                break
        loader.close()
        source.close()
        del loader, source
        if begun is None and rounds >= WARM_UP:
            begun = resources()
    assert begun is not None
    ended = resources()
    assert ended.threads == begun.threads
    assert ended.handles == begun.handles
    assert ended.memory - begun.memory < MOST_GROWTH

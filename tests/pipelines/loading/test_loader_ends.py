"""No thread, file handle or tensor is left after an epoch, however it ends; the consumer's wait is counted."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pipelines.order import Order
from tests.samples.decode_samples import MemorySource, jpegs
from tests.samples.loader_samples import Clock, loader_of, source_with

pytestmark = pytest.mark.usefixtures("no_thread_left")


def test_leaving_early_ends_the_threads_every_time() -> None:
    source = source_with()
    loader = loader_of(source, decoder="auto")
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


def tensors_alive() -> list[int]:
    """How many tensors the process holds after each of five epochs."""
    loader = loader_of(source_with(), decoder="auto")
    alive = []
    for epoch in range(5):
        for _ in loader.epoch(epoch):
            pass
        del _
        gc.collect()
        alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    loader.close()
    return alive


def test_epochs_leave_no_tensors_behind() -> None:
    """In a process of its own: tests of the compiler leave tensors in this one that are collected at any time."""
    code = "import test_loader_ends; print(test_loader_ends.tensors_alive())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=200, check=True
    )
    alive = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(alive) == 5
    assert len(set(alive[2:])) == 1


def test_closing_waits_for_one_announcement_only() -> None:
    class Slow(MemorySource):
        def will_need(self, indices: Sequence[int]) -> None:
            announced.append(len(indices))
            closing.wait(60)

    announced: list[int] = []
    closing = threading.Event()
    loader = loader_of(Slow(jpegs(1) * 3000), order=Order(num_images=3000, batch_size=8, seed=0, chunk=10, window=3000))
    batches = loader.epoch(0)
    next(batches)
    timer = threading.Timer(0.3, closing.set)
    timer.start()
    loader.close()
    timer.join()
    assert set(announced) == {8}
    assert len(announced) <= 2  # the current one, and perhaps one more


def test_an_exception_in_the_training_loop_ends_the_thread() -> None:
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


def test_the_wait_for_a_slow_source_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("pipelines.loading.threads.time", clock)

    class Slow(MemorySource):
        def read(self, index: int) -> np.ndarray:
            clock.tick(0.5, awaited=True)
            return super().read(index)

    loader = loader_of(Slow(jpegs(16)), batch_size=1)
    list(loader.epoch(0))
    assert loader.stats.wait_seconds == 16 * 0.5
    assert loader.stats.first_wait_seconds == 0.5
    loader.close()

"""A small loader over images in memory, six of them bad, for the tests of the loader."""

from __future__ import annotations

import threading
from typing import Any

from pipelines.decode import DecodeOptions
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.views.spec import ViewSpec
from tests.samples.decode_samples import MemorySource, encode, jpegs, picture

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


def loader_of(source: MemorySource, *, batch_size: int = BATCH, order: Order | None = None, **options: Any) -> Loader:
    order = order or Order(num_images=len(source), batch_size=batch_size, seed=SEED)
    decoding = {name: options.pop(name) for name in ("decoder", "threads", "dali") if name in options}
    decode = DecodeOptions(**{"decoder": "pillow", "threads": 1, **decoding})
    return Loader(source, SPECS, order, decode=decode, **options)


class Clock:
    """Stands in for the module `time` in `pipelines.loading.threads`: time passes only where a test says so."""

    def __init__(self) -> None:
        self._now = 0.0
        self._readings = 0
        self._consumer = threading.current_thread()
        self._waiting = threading.Semaphore(0)

    def monotonic(self) -> float:
        """Read when a consumer begins to wait for an item and when it has it; the one that made the clock counts."""
        if threading.current_thread() is not self._consumer:
            return self._now
        self._readings += 1
        if self._readings % 2:
            self._waiting.release()
        return self._now

    def tick(self, seconds: float, *, awaited: bool) -> None:
        """In the producer: let time pass, if `awaited` not before the consumer waits for one more item."""
        if awaited:
            assert self._waiting.acquire(timeout=30)
        self._now += seconds

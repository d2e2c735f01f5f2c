"""What a loader counts: waiting, bad images, and where its time goes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class StageSeconds:
    """Seconds spent so far on each stage of preparing batches, each in a thread of its own (on a GPU: the host's).

    Attributes:
        storage: reading encoded bytes.
        decode: bytes to pixels.
        views: draws and views.
    """

    storage: float = 0.0
    decode: float = 0.0
    views: float = 0.0


@dataclass(kw_only=True)
class LoaderStats:
    """What happened so far.

    Attributes:
        wait_seconds: time the consumer waited for batches (monotonic clock): the data stall.
        first_wait_seconds: of it, the time for the first batch after a start, when none can be ready.
        batches: batches handed to the consumer.
        bad: key -> reason of the images that cannot be decoded, as found by the decoding thread.
        replaced: places in batches that were given to another image, as prepared.
        prepared: images prepared.
        stages: where its time went.
    """

    wait_seconds: float = 0.0
    first_wait_seconds: float = 0.0
    batches: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    replaced: int = 0
    prepared: int = 0
    stages: StageSeconds = field(default_factory=StageSeconds)

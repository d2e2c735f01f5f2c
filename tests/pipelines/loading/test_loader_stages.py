"""Reading, decoding and making views at the same time: how far ahead, in which order, and what it saves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch

import pipelines.loader
from pipelines.loading.fetch import Fetcher
from pipelines.loading.threads import Prefetcher
from pipelines.views.engine import ViewEngine
from tests.samples.loader_samples import BATCH, COUNT, loader_of, source_with

STEPS = COUNT // BATCH
SLOW = 0.15  # seconds: many times what a stage takes for such a batch


def at_stages(monkeypatch: pytest.MonkeyPatch, act: Callable[[str, int], object]) -> None:
    """Call `act` with each stage and the number of its batch, in the stage's thread before it begins."""
    counts = {"read": 0, "decode": 0, "views": 0}

    def before(owner: Any, name: str, stage: str) -> None:
        original = getattr(owner, name)

        def acting(*arguments: Any, **options: Any) -> Any:
            counts[stage] += 1
            act(stage, counts[stage])
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, acting)

    before(pipelines.loader, "usable_indices", "read")
    before(pipelines.loader, "fetch_complete", "decode")
    before(pipelines.loader, "draw", "views")


def test_three_batches_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, set[str]] = {"read": set(), "decode": set(), "views": set()}

    def slowly(stage: str, number: int) -> None:
        threads[stage].add(threading.current_thread().name)
        time.sleep(SLOW)

    source = source_with(bad=())
    loader = loader_of(source)
    for _ in loader.epoch(0):  # everything is imported and built now
        pass
    at_stages(monkeypatch, slowly)
    began = time.monotonic()
    assert len(list(loader.epoch(1))) == STEPS
    seconds = time.monotonic() - began
    loader.close()
    assert threads == {"read": {"mvssl-encoded"}, "decode": {"mvssl-decode"}, "views": {"mvssl-loader"}}
    # The first batch passes three stages, each other one is one behind it; one after the other they would be 3 a batch.
    assert (STEPS + 2) * SLOW <= seconds < 0.75 * 3 * STEPS * SLOW


def test_each_stage_is_a_batch_ahead_of_the_next_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = {"read": 0, "decode": 0, "views": 0}
    hold = threading.Event()

    def note(stage: str, number: int) -> None:
        begun[stage] = number
        if stage == "views" and number == 2:
            assert hold.wait(30)

    at_stages(monkeypatch, note)
    loader = loader_of(source_with(bad=()), prefetch=1)
    batches = loader.epoch(0)
    next(batches)
    give_up = time.monotonic() + 30
    while begun != {"read": 4, "decode": 3, "views": 2} and time.monotonic() < give_up:
        time.sleep(0.005)
    time.sleep(0.1)  # a chance to go too far: decoded batches take memory
    assert begun == {"read": 4, "decode": 3, "views": 2}
    hold.set()
    assert len(list(batches)) == STEPS - 1
    loader.close()


def test_bad_images_found_late_are_read_again_and_replaced_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader is ahead of the decoder, which alone finds out what is bad."""
    source = source_with()
    expected = [batch.index.tolist() for batch in loader_of(source, threads=2).epoch(0)]
    chosen: list[int] = []

    def wait_for_the_reader(stage: str, number: int) -> None:
        if stage == "read":
            chosen.append(number)
        elif stage == "decode":
            give_up = time.monotonic() + 5
            while len(chosen) < min(number + 1, STEPS) and time.monotonic() < give_up:
                time.sleep(0.002)

    at_stages(monkeypatch, wait_for_the_reader)
    loader = loader_of(source)
    assert [batch.index.tolist() for batch in loader.epoch(0)] == expected
    loader.close()


@pytest.mark.parametrize("stage", ["read", "decode", "views"])
@pytest.mark.parametrize("error", [ValueError("a fault"), OSError(24, "Too many open files")], ids=["value", "files"])
def test_a_fault_of_any_stage_comes_in_its_place_named_once(
    stage: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(at: str, number: int) -> None:
        if (at, number) == (stage, 3):
            raise error

    at_stages(monkeypatch, fail)
    source = source_with(bad=())
    loader = loader_of(source)
    batches = loader.epoch(0)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(type(error)) as caught:
        next(batches)
    assert caught.value is error
    assert error.__notes__ == [f"while preparing batch 2 of epoch 0 of {source.location}"]
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mvssl-")]
    del error.__notes__


@pytest.mark.parametrize("stage", ["read", "decode", "views"])
def test_leaving_early_ends_all_threads(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_stages(monkeypatch, lambda at, number: time.sleep(0.05 if at == stage else 0))
    loader = loader_of(source_with(bad=()))
    for _ in loader.epoch(0):
        break
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mvssl-")]


def test_gradients_are_off_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[bool]] = {"decode": set(), "views": set()}

    def watch(owner: type, name: str, stage: str) -> None:
        original = getattr(owner, name)

        def watched(self: Any, *arguments: Any) -> Any:
            seen[stage].add(torch.is_grad_enabled())
            return original(self, *arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(Fetcher, "_decode", "decode")
    watch(ViewEngine, "__call__", "views")
    loader = loader_of(source_with(bad=()))
    for batch in loader.epoch(0):
        assert not batch.views[0].requires_grad
    loader.close()
    assert seen == {"decode": {False}, "views": {False}}


@pytest.mark.parametrize(
    ("stage", "words"), [("read", "reading"), ("decode", "decoding"), ("views", "making the views of")]
)
def test_what_hangs_is_named_once(
    stage: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipelines.loading.threads._PATROL", 0.05)
    monkeypatch.setattr("pipelines.loading.threads._LONG", 0.3)
    go_on = threading.Event()

    def hang(at: str, number: int) -> None:
        if (at, number) == (stage, 3):
            assert go_on.wait(30)

    at_stages(monkeypatch, hang)
    source = source_with(bad=())
    loader = loader_of(source)
    batches = loader.epoch(0)
    next(batches), next(batches)
    caplog.clear()
    threading.Timer(1.0, go_on.set).start()
    assert len(list(batches)) == STEPS - 2
    loader.close()
    complaints = [record.getMessage() for record in caplog.records if "No batch for" in record.getMessage()]
    assert len(complaints) == 1
    assert f"the loader is {words} batch 2 of epoch 0 of {source.location}. If this" in complaints[0]


def test_room_comes_first() -> None:
    """Nothing is made before there is room for it."""
    made: list[int] = []

    def items() -> Generator[int, None, None]:
        for n in range(10):
            made.append(n)
            yield n

    prefetcher = Prefetcher(items(), depth=2, name="test-room", room_first=True)
    for taken in range(10):
        give_up = time.monotonic() + 30
        while len(made) < min(10, taken + 2) and time.monotonic() < give_up:
            time.sleep(0.002)
        time.sleep(0.005)
        assert len(made) == min(10, taken + 2)
        assert next(prefetcher) == taken
    assert next(prefetcher, None) is None
    prefetcher.close()

"""The three stages run at the same time, each one batch ahead of the next; errors and hangs name stage and batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pipelines.loader
from pipelines.loading.fetch import Fetcher
from pipelines.views.engine import ViewEngine
from tests.samples.loader_samples import BATCH, COUNT, loader_of, source_with

STEPS = COUNT // BATCH


def before_stages(monkeypatch: pytest.MonkeyPatch, act: Callable[[str, int], object]) -> None:
    """Call `act` with each stage and the number of its batch, in the stage's thread, before it starts."""
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


def test_three_stages_work_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The views of each batch start only while the next one is being decoded and the one after that is being read."""
    threads: dict[str, set[str]] = {"read": set(), "decode": set(), "views": set()}
    meetings = [threading.Barrier(3) for _ in range(STEPS - 2)]
    ahead = {"read": 3, "decode": 2, "views": 1}

    def meet(stage: str, number: int) -> None:
        threads[stage].add(threading.current_thread().name)
        if 0 <= number - ahead[stage] < len(meetings):
            meetings[number - ahead[stage]].wait(60)  # a stage that worked alone would break the barrier

    before_stages(monkeypatch, meet)
    loader = loader_of(source_with(bad=()))
    assert len(list(loader.epoch(0))) == STEPS
    loader.close()
    assert threads == {"read": {"mvssl-encoded"}, "decode": {"mvssl-decode"}, "views": {"mvssl-loader"}}


def test_each_stage_is_exactly_one_batch_ahead_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = {"read": 0, "decode": 0, "views": 0}
    hold = threading.Event()

    def note(stage: str, number: int) -> None:
        begun[stage] = number
        if stage == "views" and number == 2:
            assert hold.wait(30)

    before_stages(monkeypatch, note)
    loader = loader_of(source_with(bad=()), prefetch=1)
    batches = loader.epoch(0)
    next(batches)
    deadline = time.monotonic() + 30
    while begun != {"read": 4, "decode": 3, "views": 2} and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)  # a chance to go too far: decoded batches take memory
    assert begun == {"read": 4, "decode": 3, "views": 2}
    hold.set()
    assert len(list(batches)) == STEPS - 1
    loader.close()


def test_bad_images_found_after_reading_ahead_are_replaced_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader is ahead of the decoder, and only the decoder finds bad images."""
    source = source_with()
    expected = [batch.index.tolist() for batch in loader_of(source, threads=2).epoch(0)]
    chosen: list[int] = []

    def wait_for_the_reader(stage: str, number: int) -> None:
        if stage == "read":
            chosen.append(number)
        elif stage == "decode":
            deadline = time.monotonic() + 5
            while len(chosen) < min(number + 1, STEPS) and time.monotonic() < deadline:
                time.sleep(0.002)

    before_stages(monkeypatch, wait_for_the_reader)
    loader = loader_of(source)
    assert [batch.index.tolist() for batch in loader.epoch(0)] == expected
    loader.close()


@pytest.mark.parametrize("stage", ["read", "decode", "views"])
@pytest.mark.parametrize("error", [ValueError("a fault"), OSError(24, "Too many open files")], ids=["value", "files"])
def test_an_error_of_any_stage_is_raised_in_its_place_with_one_note(
    stage: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(at: str, number: int) -> None:
        if (at, number) == (stage, 3):
            raise error

    before_stages(monkeypatch, fail)
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
    before_stages(monkeypatch, lambda at, number: time.sleep(0.05 if at == stage else 0))
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
def test_a_hang_is_reported_once_with_stage_and_batch(
    stage: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resume = threading.Event()

    def hang(at: str, number: int) -> None:
        if (at, number) == (stage, 3):
            assert resume.wait(60)

    def warnings() -> list[str]:
        return [record.getMessage() for record in caplog.records if "No batch for" in record.getMessage()]

    def resume_after_the_warning() -> None:
        deadline = time.monotonic() + 50
        while not warnings() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)  # a chance to warn again
        monkeypatch.setattr("pipelines.loading.threads._SLOW_AFTER", 60.0)
        resume.set()

    before_stages(monkeypatch, hang)
    source = source_with(bad=())
    loader = loader_of(source)
    batches = loader.epoch(0)
    next(batches), next(batches)
    monkeypatch.setattr("pipelines.loading.threads._CHECK_EVERY", 0.05)
    monkeypatch.setattr("pipelines.loading.threads._SLOW_AFTER", 0.3)
    releasing = threading.Thread(target=resume_after_the_warning)
    releasing.start()
    assert len(list(batches)) == STEPS - 2
    releasing.join()
    loader.close()
    assert len(warnings()) == 1
    assert f"the loader is {words} batch 2 of epoch 0 of {source.location}. If this" in warnings()[0]

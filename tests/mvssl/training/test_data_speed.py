"""Slow data changes no number and is named as the bottleneck; errors of loader threads surface at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipelines.loader
import pipelines.loading.threads
from mvssl.config.recipe import Recipe
from pipelines.decode import Decoded, decoder_of
from tests.samples.data_faults import DAMAGED, SAVED, disk, first_evaluation, last_step, log
from tests.samples.tiny_runs import metrics, train

SLOW = 0.25  # seconds a batch: many times a step of the tiny images, even on a busy machine
PATROL = 1e6  # seconds until a waiting step looks for dead threads: never in a test


def test_a_slow_disk_changes_no_number_and_is_named(
    images: Path, finished: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    with disk(lambda path, offset: time.sleep(2 * SLOW / tiny_recipe.batch_size)):
        train(tiny_recipe, images, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(finished)
    assert "the bottleneck is reading images: convert them" in log(tmp_path / "run")


@contextmanager
def decoder(act: Callable[[int], object]) -> Iterator[None]:
    """Call `act` with the batch number, from 0, in the loader's thread before each batch is decoded for training."""

    def acting(*arguments: Any, **options: Any) -> Any:
        made = decoder_of(*arguments, **options)

        class Acting:
            name, close, calls = made.name, made.close, 0

            def __call__(self, encoded: Sequence[np.ndarray], by_pillow: Collection[int] = ()) -> Decoded:
                self.calls += 1
                act(self.calls - 1)
                return made(encoded, by_pillow)

        return Acting()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.loader, "decoder_of", acting)
        yield


def test_a_slow_decoder_changes_no_number_and_is_named(
    images: Path, finished: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    with decoder(lambda number: time.sleep(SLOW)):
        train(tiny_recipe, images, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(finished)
    assert "the bottleneck is decoding: use more --threads" in log(tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("a fault of the decoder"), "a fault of the decoder"),
        (SystemExit(0), r"'mvssl-decode' was ended by SystemExit\(0\)"),
    ],
    ids=["an error", "an exit"],
)
def test_a_decoders_error_reaches_the_training_loop_at_once(
    images: Path,
    finished: Path,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    words: str,
) -> None:
    monkeypatch.setattr(pipelines.loading.threads, "_CHECK_EVERY", PATROL)  # only being told ends the wait
    out = tmp_path / "run"

    def fail(number: int) -> None:
        if number == DAMAGED:
            assert over.wait(60)
            raise error

    with first_evaluation() as over, decoder(fail), pytest.raises((ValueError, RuntimeError), match=words) as caught:
        train(tiny_recipe, images, out, prefetch=1)
    if caught.value is error:
        assert error.__notes__ == [f"while preparing batch 2 of epoch 1 of {images / 'train'}"]
    assert last_step(out) == SAVED
    train(tiny_recipe, images, out, resume=True)
    assert metrics(out) == metrics(finished)


def test_a_loader_thread_that_dies_silently_is_noticed(
    images: Path, finished: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    produce, out = pipelines.loading.threads._produce, tmp_path / "run"

    def dying(items: Generator[Any, None, None], queue: Any) -> None:
        if threading.current_thread().name != "mvssl-loader":
            return produce(items, queue)
        for _ in range(DAMAGED):
            queue.put(next(items))
        return None

    with monkeypatch.context() as patch:
        patch.setattr(pipelines.loading.threads, "_produce", dying)
        with pytest.raises(RuntimeError, match="Loader thread 'mvssl-loader' died without raising"):
            train(tiny_recipe, images, out)
    assert last_step(out) == SAVED
    train(tiny_recipe, images, out, resume=True)
    assert metrics(out) == metrics(finished)

"""Replacements, and the limit on bad images in a batch, do not depend on which bad images are known already."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import comb

import numpy as np
import pytest
import torch

from pipelines.batch import DecodedBatch
from pipelines.loading.fetch import Fetched, fetch_complete, too_many_bad
from pipelines.runtime import InputError
from tests.samples.decode_samples import (
    MemorySource,
    jpegs,
    needs_dali,
    only_dalis_jpeg,
    only_pillows_jpeg,
    refused_jpeg,
)
from tests.samples.loader_samples import loader_of


class Fetch:
    """Images of one pixel, some of them bad."""

    def __init__(self, bad: Sequence[int]) -> None:
        self._bad = bad

    def __call__(self, indices: Sequence[int]) -> Fetched:
        good = [index for index in indices if index not in self._bad]
        batch = DecodedBatch.from_images([np.full((1, 1, 3), index, np.uint8) for index in good], index=good)
        failures = {n: "broken" for n, index in enumerate(indices) if index in self._bad}
        return Fetched(batch=batch, failures=failures, encoded=[])


def outcome(bad: Sequence[int], known: Sequence[int], batch_size: int) -> list[list[int] | str]:
    """Dataset indices of each batch of 12 images in reversed order, or its error."""
    order, memory = np.arange(12)[::-1], dict.fromkeys(known, "broken")
    batches: list[list[int] | str] = []
    for start in range(0, 12, batch_size):
        try:
            done = fetch_complete(
                Fetch(bad),
                order,
                slice(start, start + batch_size),
                bad=memory,
                found_bad=lambda *_: None,
                key=lambda index: f"image{index}",
            )
            assert [int(done.batch.image(n)[0, 0, 0]) for n in range(batch_size)] == done.batch.index.tolist()
            batches.append(done.batch.index.tolist())
        except InputError as error:
            batches.append(str(error))
    return batches


@pytest.mark.parametrize("batch_size", [1, 2, 4, 6, 12])
@pytest.mark.parametrize("bad", [(7, 6, 5, 4), (11,), (11, 10, 9, 8, 7, 5, 0), (3, 2, 1, 0), tuple(range(12))])
def test_the_batches_do_not_depend_on_known_bad_images(bad: tuple[int, ...], batch_size: int) -> None:
    want = outcome(bad, (), batch_size)
    chosen = list(itertools.combinations(bad, 1)) + [bad[:k] for k in range(2, len(bad) + 1)] + [bad[2:]]
    for known in chosen:
        for got, expected in zip(outcome(bad, known, batch_size), want, strict=True):
            if isinstance(expected, str):
                assert isinstance(got, str)
            assert got == expected or len(bad) == 12  # with no good image at all, one of two errors


def test_a_batch_of_only_bad_images_is_an_error_that_names_them() -> None:
    first, second, third = outcome((7, 6, 5, 4), (6,), 4)
    assert (first, third) == ([11, 10, 9, 8], [3, 2, 1, 0])
    assert isinstance(second, str)
    assert second.startswith("4 of the 4 images of a batch cannot be decoded, for example image7 (broken); image6")


def test_tolerable_data_does_not_stop_a_run_by_chance() -> None:
    """Against the binomial distribution: with 5 % of bad images, fewer than 1 in 100 000 batches would stop."""
    for images in (1, 2, 3, 4, 5, 8, 16, 32, 64, 256, 1024):
        stops = [bad for bad in range(images + 1) if too_many_bad(bad, images)]
        assert stops == list(range(stops[0], images + 1)) if stops else images <= 3
        assert sum(comb(images, bad) * 0.05**bad * 0.95 ** (images - bad) for bad in stops) < 1e-5
        assert too_many_bad(images // 2 + 1, images) or images < 20


@needs_dali
def test_a_resumed_loader_gives_the_batches_of_one_that_never_stopped() -> None:
    files = jpegs(45)
    files[7], files[13], files[21], files[34] = only_dalis_jpeg(), refused_jpeg(), files[21][:90], only_pillows_jpeg()
    ran = loader_of(MemorySource(files), decoder="dali")
    epochs = [list(ran.epoch(epoch)) for epoch in range(2)]
    assert ran.stats.bad.keys() == {"image7.jpg", "image13.jpg", "image21.jpg"}  # 7 is damaged, so Pillow decides
    assert not any(7 in batch.index for epoch in epochs for batch in epoch)
    ran.close()
    for first_step in range(ran.steps_per_epoch):
        resumed = loader_of(MemorySource(files), decoder="dali")
        for got, want in zip(resumed.epoch(1, first_step=first_step), epochs[1][first_step:], strict=True):
            assert torch.equal(got.index, want.index)
            assert all(torch.equal(a, b) for a, b in zip(got.views, want.views, strict=True))
        resumed.close()

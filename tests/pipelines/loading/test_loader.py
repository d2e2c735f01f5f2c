"""The loader's batches are a function of (seed, epoch, step, data) alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.batch import DecodedBatch, ViewBatch
from pipelines.decode.pillow import decode_one
from pipelines.loader import Loader
from pipelines.order import Order, Ranks
from pipelines.runtime import InputError
from pipelines.views.engine import ViewEngine
from pipelines.views.sampling import draw
from tests.samples.decode_samples import MemorySource, needs_dali
from tests.samples.loader_samples import BAD, BATCH, COUNT, SEED, SPECS, loader_of, source_with

pytestmark = pytest.mark.usefixtures("no_thread_left")


def same(a: ViewBatch, b: ViewBatch) -> bool:
    return (
        torch.equal(a.index, b.index)
        and torch.equal(a.labels, b.labels)
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    )


@pytest.mark.parametrize("chunk", [0, 5])
def test_images_are_announced_before_they_are_read(chunk: int) -> None:
    class Announced(MemorySource):
        def will_need(self, indices: Sequence[int]) -> None:
            announced.append(list(indices))

    announced: list[list[int]] = []
    whole = source_with(())
    source = Announced([whole.read(i) for i in range(COUNT)])
    order = Order(num_images=COUNT, batch_size=BATCH, seed=SEED, chunk=chunk, window=10)
    loader, plain = loader_of(source, prefetch=1, order=order), loader_of(whole, order=order)
    batches = [batch for epoch in (0, 1) for batch in loader.epoch(epoch, first_step=1 - epoch, until=2)]
    assert all(map(same, batches, [*plain.epoch(0, first_step=1), *plain.epoch(1)]))
    loader.close()
    plain.close()
    reading = [order.reading(order.permutation(epoch), epoch, first_step=1 - epoch).tolist() for epoch in (0, 1)]
    assert sorted(chain.from_iterable(announced)) == sorted(np.ravel(reading[0] + reading[1]).tolist())


@pytest.fixture(scope="module")
def expected() -> list[list[ViewBatch]]:
    """Two epochs made without a loader: one image at a time, bad ones replaced by the next good one."""
    source = source_with()
    order = Order(num_images=COUNT, batch_size=BATCH, seed=SEED)
    engine = ViewEngine(SPECS)
    epochs = []
    for epoch in range(2):
        permutation = order.permutation(epoch).tolist()
        good = [next(i for i in permutation[p:] + permutation if i not in BAD) for p in range(COUNT)]
        batches = []
        for step in range(COUNT // BATCH):
            chosen = good[step * BATCH : (step + 1) * BATCH]
            images = [np.array(decode_one(source.read(i))) for i in chosen]
            batch = DecodedBatch.from_images(images, index=chosen, labels=[i % 2 for i in chosen])
            params = draw(SPECS, batch.sizes, seed=SEED, epoch=epoch, index=chosen)
            batches.append(ViewBatch(views=engine(batch, params), index=batch.index, labels=batch.labels))
        epochs.append(batches)
    return epochs


@pytest.mark.parametrize(("decoder", "prefetch"), [("pillow", 1), pytest.param("dali", 3, marks=needs_dali)])
def test_batches_equal_those_made_without_a_loader(
    expected: list[list[ViewBatch]], decoder: str, prefetch: int
) -> None:
    loader = loader_of(source_with(), decoder=decoder, prefetch=prefetch)
    assert loader.steps_per_epoch == COUNT // BATCH
    for epoch, want in enumerate(expected):
        got = list(loader.epoch(epoch))
        assert len(got) == len(want)
        assert all(map(same, got, want))
    assert [view.dtype for view in got[0].views] == [torch.float32] * 2
    assert not got[0].views[0].requires_grad
    loader.close()


def test_a_resumed_loader_gives_the_same_batches(expected: list[list[ViewBatch]]) -> None:
    for epoch, step in [(0, 3), (1, 1), (1, 4)]:
        loader = loader_of(source_with(), decoder="auto")
        loader.load_state_dict({"epoch": epoch, "step": step})
        assert loader.state_dict() == {"epoch": epoch, "step": step}
        got = list(loader.epoch(epoch, first_step=step))
        assert len(got) == len(expected[epoch]) - step
        assert all(map(same, got, expected[epoch][step:]))
        assert loader.state_dict() == {"epoch": epoch + 1, "step": 0}
        assert list(loader.epoch(epoch, first_step=loader.steps_per_epoch)) == []
        loader.close()


def test_the_state_is_the_batch_that_comes_next() -> None:
    loader = loader_of(source_with())
    batches = loader.epoch(4)
    for step in range(2):
        next(batches)
        assert loader.state_dict() == {"epoch": 4, "step": step + 1}
    loader.close()


def test_ranks_share_the_global_batch(expected: list[list[ViewBatch]]) -> None:
    for rank in range(2):
        loader = loader_of(source_with(), ranks=Ranks(rank=rank, size=2))
        half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        for got, want in zip(loader.epoch(1), expected[1], strict=True):
            part = ViewBatch(
                views=[view[half] for view in want.views], index=want.index[half], labels=want.labels[half]
            )
            assert same(got, part)
        loader.close()


def test_preparing_the_next_epoch_ahead_does_not_change_batches(expected: list[list[ViewBatch]]) -> None:
    loader = loader_of(source_with())
    assert all(map(same, loader.epoch(0, first_step=2, until=3), expected[0][2:]))
    producer = loader._producer
    assert producer is not None
    assert all(map(same, loader.epoch(1, until=3), expected[1]))  # from its first step
    assert loader._producer is producer  # the same thread continued
    assert all(map(same, loader.epoch(0, until=3), expected[0]))  # not the epoch that was prepared ahead
    assert all(map(same, loader.epoch(1, until=2), expected[1]))
    assert loader._producer is None  # nothing is prepared beyond `until`
    loader.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefetch": 0}, "prefetch is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"decoder": "turbo"}, "decoder is 'turbo'"),
        ({"ranks": Ranks(size=3)}, "multiple of the 3 ranks"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        loader_of(source_with(), **options)


def test_wrong_positions_are_named() -> None:
    with pytest.raises(InputError, match="num_images is 44"):
        Loader(source_with(), SPECS, Order(num_images=44, batch_size=8, seed=0))
    loader = loader_of(source_with())
    with pytest.raises(InputError, match="epoch is -1"):
        loader.epoch(-1)
    with pytest.raises(InputError, match="first_step is 6"):
        loader.epoch(0, first_step=6)
    with pytest.raises(InputError, match="loader state"):
        loader.load_state_dict({"epoch": 0, "step": 99})
    loader.close()


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["pillow", pytest.param("dali", marks=needs_dali)])
def test_views_on_a_gpu_are_close_to_those_of_the_cpu(expected: list[list[ViewBatch]], decoder: str) -> None:
    loader = loader_of(source_with(), decoder=decoder, device="cuda")
    for got, want in zip(loader.epoch(0), expected[0], strict=True):
        assert torch.equal(got.index, want.index)
        for a, b in zip(got.views, want.views, strict=True):
            assert a.is_cuda
            assert (a.cpu() - b).abs().mean() < 0.05
    loader.close()

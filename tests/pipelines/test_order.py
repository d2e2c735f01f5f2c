"""Order: one uniformly random permutation per epoch, and the same global batches on any number of ranks."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import InputError
from pipelines.order import Order, Ranks, replacement


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**32 - 1))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    permutation = Order(num_images=n, batch_size=1, seed=seed).permutation(epoch)
    assert permutation.dtype == np.int64
    assert np.array_equal(np.sort(permutation), np.arange(n))


def test_keys_do_not_depend_on_the_number_of_images() -> None:
    long = Order(num_images=40_000, batch_size=1, seed=0).permutation(0)
    assert np.array_equal(np.sort(long), np.arange(40_000))
    short = Order(num_images=100, batch_size=1, seed=0).permutation(0)
    assert np.array_equal(long[long < 100], short)


def test_changes_with_seed_and_epoch_only() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        order: list[int] = Order(num_images=50, batch_size=10, seed=seed).permutation(epoch).tolist()
        return order

    assert first(0, 0) == first(0, 0)
    assert len({tuple(first(seed, epoch)) for seed in (0, 1, 2**32) for epoch in range(4)}) == 12


CHUNKED = given(
    n=st.integers(1, 3000),
    chunk=st.integers(1, 200),
    blocks=st.integers(1, 20),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 100),
)


@settings(max_examples=50, deadline=None)
@CHUNKED
def test_an_epoch_in_blocks_is_a_permutation_that_reads_one_buffer_after_another(
    n: int, chunk: int, blocks: int, seed: int, epoch: int
) -> None:
    order = Order(num_images=n, batch_size=1, seed=seed, chunk=chunk, window=blocks * chunk + chunk // 2)
    permutation = order.permutation(epoch)
    assert np.array_equal(np.sort(permutation), np.arange(n))
    block = permutation // chunk
    last = {number: place for place, number in enumerate(block.tolist())}  # where each block is used last
    first = {number: n - 1 - place for place, number in enumerate(block[::-1].tolist())}
    for place in range(0, n, max(1, n // 20)):
        reading = sum(first[number] <= place <= last[number] for number in last)
        assert reading <= blocks


def test_blocks_change_with_the_epoch_and_are_mixed() -> None:
    order = Order(num_images=16_000, batch_size=1, seed=0, chunk=100, window=1600)  # 160 blocks, 10 buffers
    epochs = [order.permutation(epoch) for epoch in range(3)]
    beginnings = [frozenset((epoch[:1600] // 100).tolist()) for epoch in epochs]
    assert all(len(blocks) == 16 for blocks in beginnings)
    assert len(set(beginnings)) == 3  # other blocks together in each epoch
    inside = epochs[0][:1600]
    assert abs(float(np.corrcoef(np.arange(1600), inside % 100)[0, 1])) < 0.1  # mixed within the buffer
    whole = Order(num_images=100, batch_size=1, seed=0, chunk=100).permutation(0)
    assert np.array_equal(whole, Order(num_images=100, batch_size=1, seed=0).permutation(0))  # one buffer mixes all


def test_without_blocks_images_are_read_ahead_in_the_order_of_use() -> None:
    order = Order(num_images=50, batch_size=6, seed=1)
    permutation = order.permutation(3)
    for rank in range(3):
        reading = order.reading(permutation, 3, Ranks(rank=rank, size=3), first_step=2)
        assert reading.tolist() == [order.batch(3, step, Ranks(rank=rank, size=3)).tolist() for step in range(2, 8)]
    assert order.buffer_steps == 0


@settings(max_examples=50, deadline=None)
@CHUNKED
@pytest.mark.parametrize("on_host", [range(1), range(3), range(2, 4)])
def test_blocks_are_read_ahead_in_long_sequences_and_in_time(
    on_host: range, n: int, chunk: int, blocks: int, seed: int, epoch: int
) -> None:
    """Checked by loops: a host's ranks have read each image `buffer_steps` batches before they use it."""
    world_size = on_host.stop
    batch = 3 * world_size
    n = max(n, batch)
    order = Order(num_images=n, batch_size=batch, seed=seed, chunk=chunk, window=blocks * chunk)
    permutation = order.permutation(epoch)
    first_step = order.steps_per_epoch // 3
    parts = [
        order.reading(permutation, epoch, Ranks(rank=rank, size=world_size, on_host=on_host), first_step=first_step)
        for rank in on_host
    ]
    assert all(part.shape == (order.steps_per_epoch - first_step, 3) for part in parts)
    reading = np.concatenate(parts, axis=1)  # [steps, images read by the host in a step]
    here: set[int] = set()
    everything: set[int] = set()
    for step in range(first_step, order.steps_per_epoch):
        here.update(reading[: step - first_step + order.buffer_steps].reshape(-1).tolist())
        used = {int(i) for rank in on_host for i in order.batch(epoch, step, Ranks(rank=rank, size=world_size))}
        assert here >= used
        everything |= used
    assert here == everything
    assert len(reading.reshape(-1)) == len(everything)
    backward = int((np.diff(reading.reshape(-1)) < 0).sum())  # once from each buffer to the next
    assert backward <= -(-n // (chunk * blocks))


def test_every_permutation_is_equally_likely() -> None:
    order, epochs = Order(num_images=4, batch_size=1, seed=3), 4800
    counts = Counter(tuple(order.permutation(epoch).tolist()) for epoch in range(epochs))
    expected = epochs / 24
    chi_square = sum((counts[permutation] - expected) ** 2 / expected for permutation in counts)
    assert len(counts) == 24
    assert chi_square < 23 + 5 * math.sqrt(2 * 23)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batches(world_size: int) -> None:
    order = Order(num_images=103, batch_size=20, seed=5)
    assert order.steps_per_epoch == 5
    permutation = order.permutation(2)
    for step in range(order.steps_per_epoch):
        shares = [order.batch(2, step, Ranks(rank=rank, size=world_size)) for rank in range(world_size)]
        assert all(len(share) == 20 // world_size for share in shares)
        assert np.array_equal(np.concatenate(shares), permutation[20 * step : 20 * step + 20])


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="batch_size is 11 but the data set has only 10 images"):
        Order(num_images=10, batch_size=11, seed=0)
    with pytest.raises(InputError, match="batch_size is 2 but the data set has only 1 image: give more images"):
        Order(num_images=1, batch_size=2, seed=0)  # a smaller batch is refused too: BatchNorm needs two images
    for field, values in (("num_images", {"num_images": 0}), ("batch_size", {"batch_size": 0}), ("seed", {"seed": -1})):
        with pytest.raises(InputError, match=field):
            Order(**{"num_images": 10, "batch_size": 2, "seed": 0, **values})
    with pytest.raises(InputError, match="chunk is -1 but must be 0 or more"):
        Order(num_images=10, batch_size=2, seed=0, chunk=-1)
    with pytest.raises(InputError, match="window is 4 but must be at least the 5 images of a block"):
        Order(num_images=10, batch_size=2, seed=0, chunk=5, window=4)
    order = Order(num_images=10, batch_size=4, seed=0)
    with pytest.raises(InputError, match="a multiple of the 3 ranks"):
        order.batch(0, 0, Ranks(size=3))
    with pytest.raises(InputError, match="rank is 2"):
        order.batch(0, 0, Ranks(rank=2, size=2))
    with pytest.raises(InputError, match="step is 2 but must be between 0 and 1"):
        order.batch(0, 2)
    with pytest.raises(InputError, match="epoch"):
        order.batch(-1, 0)


def test_replacement_takes_the_next_good_image_and_wraps() -> None:
    permutation = np.array([4, 2, 0, 3, 1])
    assert replacement(permutation, 0, {4}) == (2, 1)
    assert replacement(permutation, 0, {4, 2, 0}) == (3, 3)
    assert replacement(permutation, 4, {1, 4}) == (2, 1)
    assert replacement(permutation, 3, {3, 1, 4, 2}) == (0, 2)
    with pytest.raises(InputError, match="None of the 5 images"):
        replacement(permutation, 1, {0, 1, 2, 3, 4})

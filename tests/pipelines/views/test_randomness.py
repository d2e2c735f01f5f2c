"""The counter-based generator against Random123's published answers and a plain big-integer version."""

from __future__ import annotations

import math
import random
from decimal import Decimal

import numpy as np
import pytest
import torch

from pipelines import InputError
from pipelines.views import portable_math as exact
from pipelines.views import randomness as rng

ALL = 0xFFFFFFFF

# kat_vectors of Random123 (Salmon et al., SC 2011), philox4x32 with 10 rounds: counter, key, answer.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, which have no width to overflow."""
    a, b, c, d = counter
    for r in range(10):
        k0, k1 = (key[0] + r * 0x9E3779B9) % 2**32, (key[1] + r * 0xBB67AE85) % 2**32
        high_a, low_a = divmod(a * 0xD2511F53, 2**32)
        high_c, low_c = divmod(c * 0xCD9E8D57, 2**32)
        a, b, c, d = high_c ^ b ^ k0, low_c, high_a ^ d ^ k1, low_a
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_published_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    words = rng.philox4x32([torch.tensor(word) for word in counter], key)
    assert tuple(words.tolist()) == answer == plain_philox(counter, key)


def test_equals_plain_integers_at_random_places() -> None:
    places = random.Random(0)
    counters = [[places.getrandbits(32) for _ in range(4)] for _ in range(200)]
    key = (places.getrandbits(32), places.getrandbits(32))
    words = rng.philox4x32(torch.tensor(counters).T.unbind(), key)  # [4, 200]
    assert words.T.tolist() == [list(plain_philox(tuple(counter), key)) for counter in counters]


def test_view_uniforms_read_the_documented_counter() -> None:
    seed, epoch, index = 2**40 + 5, 7, torch.tensor([3, 2**33 + 1])
    u = rng.view_uniforms(seed=seed, epoch=epoch, index=index, num_views=3)
    assert u.shape == (3, rng.NUM_BLOCKS, 4, 2)
    for v, block, n in ((0, 0, 0), (2, rng.NUM_BLOCKS - 1, 1), (1, rng.Slot.BLUR, 1)):
        i = int(index[n])
        words = plain_philox(((v << 16) + block, epoch, i % 2**32, i >> 32), (seed % 2**32, seed >> 32))
        assert u[v, block, :, n].tolist() == [word / 2**32 for word in words]


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    u = rng.view_uniforms(seed=1, epoch=2, index=torch.arange(2000), num_views=2).numpy()  # [2, B, 4, 2000]
    assert u.min() >= 0.0
    assert u.max() < 1.0
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    expected = u.size / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    streams = u.reshape(-1, 2000)  # every view, block and word
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlation).max() < 6 / math.sqrt(2000)
    lagged = [np.corrcoef(stream[1:], stream[:-1])[0, 1] for stream in streams]  # neighbouring dataset indices
    assert np.abs(lagged).max() < 5.5 / math.sqrt(2000)


def test_slots_do_not_overlap() -> None:
    taken = {rng.Slot.CROP: 10, rng.Slot.CUTOUT: 10, rng.Slot.JITTER: 2}  # all others take one block
    blocks = [slot + k for slot in rng.Slot for k in range(taken.get(slot, 1))]
    assert sorted(blocks) == list(range(rng.NUM_BLOCKS))


def test_out_of_range_is_named() -> None:
    index = torch.arange(2)
    for seed, epoch, word in ((-1, 0, "seed"), (2**64, 0, "seed"), (0, -1, "epoch"), (0, 2**32, "epoch")):
        with pytest.raises(InputError, match=word):
            rng.view_uniforms(seed=seed, epoch=epoch, index=index, num_views=1)


def test_exact_exp_and_log() -> None:
    x = torch.cat((torch.linspace(-690, 690, 4001), torch.tensor([0.0, 1e-300, -1e-17]))).to(torch.float64)
    ours = exact.exp(x).tolist()
    for value, result in zip(x.tolist(), ours, strict=True):
        assert result == pytest.approx(math.exp(value), rel=1e-15, abs=0)
    assert exact.exp(torch.tensor([-1e6], dtype=torch.float64)).item() < 1e-300
    for value in (3 / 4, 4 / 3, 0.3, 1.0, 1e-6):
        assert exact.log(value) == pytest.approx(math.log(value), rel=2e-16)
        assert exact.log(value) == float(Decimal(value).ln())


def test_exact_exp_has_the_same_bits_anywhere_in_a_tensor() -> None:
    x = torch.linspace(-3, 3, 77, dtype=torch.float64)
    together = exact.exp(x)
    assert all(torch.equal(exact.exp(x[i : i + 1]), together[i : i + 1]) for i in range(len(x)))

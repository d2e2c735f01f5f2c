"""Counter-based random numbers: every number is a pure function of (seed, epoch, dataset index, view, slot).

There is no state to store or to split among workers: samples have the same bits on any device, in any batch, at any
batch position and on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from pipelines.runtime import invalid
from pipelines.views import portable_math

ATTEMPTS = 10
"""Boxes tried before the central fallback (as torchvision)."""


def random_box(sizes: Tensor, u: Tensor, *, area: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """Sample one box per image, as torchvision.transforms.RandomResizedCrop.get_params, for crops and for cutout.

    A box of a random fraction of the area and a log-uniform aspect ratio is tried ten times; if none fits, the largest
    central box of the nearest allowed ratio is taken.

    Args:
        sizes: int64 [N, 2], (height, width).
        u: float64 [ATTEMPTS, 4, N] uniform in [0, 1): area, ratio, top and left of each attempt.
        area: range of the fraction of the area.
        ratio: range of width / height.

    Returns:
        int64 [N, 4], (top, left, height, width), inside the image, sides of at least one pixel.
    """
    height, width = sizes.to(torch.float64).unbind(dim=1)  # [N]
    target = (area[0] + u[:, 0] * (area[1] - area[0])) * (height * width)  # [10, N] pixels
    low, high = portable_math.log(ratio[0]), portable_math.log(ratio[1])
    aspect = portable_math.exp(low + u[:, 1] * (high - low))  # [10, N]
    w = torch.round(torch.sqrt(target * aspect))  # half to even, like Python's round
    h = torch.round(torch.sqrt(target / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)  # [10, N]
    top = torch.floor(u[:, 2] * (height - h + 1))
    left = torch.floor(u[:, 3] * (width - w + 1))
    tried = torch.stack((top, left, h, w), dim=-1)  # [10, N, 4]

    first = fits.to(torch.uint8).argmax(dim=0)  # [N], first attempt that fits, 0 if none
    chosen = tried[first, torch.arange(len(sizes), device=sizes.device)]  # [N, 4]
    fallback = _central(height, width, ratio)
    return torch.where(fits.any(dim=0)[:, None], chosen, fallback).to(torch.int64)


def _central(height: Tensor, width: Tensor, ratio: tuple[float, float]) -> Tensor:
    """Largest central box with width / height in the range: float64 [N, 4]."""
    low, high = ratio
    aspect = width / height
    # A range without 1 could round a side of a one-pixel image to 0, where torchvision fails.
    h = torch.where(aspect < low, torch.round(width / low).clamp(min=1), height)
    w = torch.where(aspect > high, torch.round(height * high).clamp(min=1), width)
    top = torch.floor((height - h) / 2)
    left = torch.floor((width - w) / 2)
    return torch.stack((top, left, h, w), dim=-1)


# Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Random123's constants).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF

ORDER_VIEW = 0xFFFF
"""View position reserved for the epoch's order."""


class Slot(IntEnum):
    """First block of four words of each operation. A new operation takes the next number; numbers are never reused."""

    CROP = 0  # one block per attempt: area, ratio, top, left
    CUTOUT = 10  # the same
    FLIP = 20
    JITTER = 21  # brightness, contrast, saturation, hue; then: applied or not, order
    GRAYSCALE = 23
    BLUR = 24  # applied or not, sigma
    SOLARIZE = 25
    VERTICAL_FLIP = 26
    QUARTER_TURNS = 27  # applied or not, how many
    ROTATE = 28


NUM_BLOCKS = 29
"""Blocks of four words per view."""


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> Tensor:
    """The Philox4x32-10 block function, in int64 arithmetic so that every device gives the same bits.

    Args:
        counter: four int64 tensors that broadcast to one shape [...], each word in [0, 2**32).
        key: two words in [0, 2**32).

    Returns:
        int64 [4, ...], four words in [0, 2**32).
    """
    c0, c1, c2, c3 = counter  # the rounds broadcast all four
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = c0 * _MULTIPLIERS[0]  # int64 overflow keeps the low 64 bits
        p1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = _high(p1) ^ (c1 ^ k0), p1 & _MASK, _high(p0) ^ (c3 ^ k1), p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3))


def _high(product: Tensor) -> Tensor:
    """Upper 32 bits of a 64-bit product; the mask undoes the sign extension of the shift."""
    return (product >> 32) & _MASK


def words(*, seed: int, epoch: int, index: Tensor, view: Tensor, block: Tensor) -> Tensor:
    """Random words at the given counters.

    Args:
        seed: in [0, 2**64).
        epoch: in [0, 2**32).
        index: int64, dataset index, not negative.
        view: int64, position of the view among the specs, in [0, 2**16).
        block: int64, in [0, 2**16).

    Returns:
        int64 [4, ...] where index, view and block broadcast to [...]; each word in [0, 2**32).

    Raises:
        InputError: the seed or the epoch is out of range.
    """
    check_seed(seed=seed, epoch=epoch)
    counter = (view << 16 | block, index.new_tensor(epoch), index & _MASK, index >> 32)
    return philox4x32(counter, (seed & _MASK, seed >> 32))


def check_seed(*, seed: int, epoch: int) -> None:
    """Raise InputError if the seed or the epoch is out of range."""
    if not 0 <= seed < 2**64:
        raise invalid("seed", seed, "between 0 and 2**64 - 1", "give another seed")
    if not 0 <= epoch < 2**32:
        raise invalid("epoch", epoch, "between 0 and 2**32 - 1", "count epochs from 0")


def view_uniforms(*, seed: int, epoch: int, index: Tensor, num_views: int) -> Tensor:
    """Uniform numbers for all operations of V views (at most 65535) of N images, `index` int64 [N].

    Returns:
        float64 [V, NUM_BLOCKS, 4, N] in [0, 1), multiples of 2**-32; an operation reads the blocks from its `Slot` on.
    """
    view = torch.arange(num_views, device=index.device)[:, None, None]  # [V, 1, 1]
    block = torch.arange(NUM_BLOCKS, device=index.device)[:, None]  # [B, 1]
    drawn = words(seed=seed, epoch=epoch, index=index, view=view, block=block)  # [4, V, B, N]
    return drawn.permute(1, 2, 0, 3).to(torch.float64) * 2.0**-32  # [V, B, 4, N]

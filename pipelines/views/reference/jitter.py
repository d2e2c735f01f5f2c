"""Colour jitter: brightness, contrast, saturation and hue, in a random order for each image."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from pipelines.views.randomness import Slot
from pipelines.views.reference.device import jit, tl, update
from pipelines.views.reference.grayscale import luma, luma_device
from pipelines.views.spec import ViewSpec

_ORDERS = tuple(permutations(range(4)))  # 24
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def sample(spec: ViewSpec, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the colour jitter of one view.

    Args:
        spec: the view.
        u: float64 [blocks, 4, N] uniform in [0, 1).

    Returns:
        on bool [N]; factors float32 [N, 4]: 1 - x to 1 + x for brightness, contrast and saturation, -x to x for hue;
        order int64 [N, 4].
    """
    strength = torch.tensor(spec.jitter, dtype=torch.float64, device=u.device)[:, None]  # [4, 1]
    neutral = torch.tensor(_NEUTRAL, dtype=torch.float64, device=u.device)[:, None]
    factors = neutral - strength + u[Slot.JITTER] * (2 * strength)  # [4, N]
    on = u[Slot.JITTER + 1, 0] < spec.jitter_p
    orders = torch.tensor(_ORDERS, device=u.device)  # [24, 4]
    order = orders[(u[Slot.JITTER + 1, 1] * len(_ORDERS)).to(torch.int64)]  # [N, 4]
    return on, factors.T.to(torch.float32).contiguous(), order


def apply(images: Tensor, on: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Jitter the colours of each image in its own order.

    Args:
        images: float32 [N, 3, S, S] in [0, 1]; may be overwritten.
        on: bool [N] on the CPU.
        factors: float32 [N, 4] on the CPU, as `sample` gives them; operations with a neutral factor are skipped.
        order: int64 [N, 4] on the CPU.

    Returns:
        float32 [N, 3, S, S].
    """
    wanted = operations(on, factors)  # [N, 4]
    for turn in order.unbind(dim=1):  # [N], each image's next operation
        for number, function in enumerate((_brightness, _contrast, _saturation, _hue)):
            images = update(images, wanted[:, number] & (turn == number), function, factors[:, number])
    return images


def operations(on: Tensor, factors: Tensor) -> Tensor:
    """Operations applied to each image: bool [N, 4]; those with a neutral factor are skipped."""
    return on[..., None] & (factors != torch.tensor(_NEUTRAL))


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale, clamped to [0, 1]: images [n, 3, S, S], factor [n, 1, 1, 1]."""
    return (images * factor).clamp_(0.0, 1.0)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean brightness of the image at this point of the order."""
    # Multiples of 2**-24 add up exactly in float64, in any order.
    grid = (luma(images) * 2.0**24).round_().flatten(1)  # [n, S * S]
    mean = grid.sum(dim=1, dtype=torch.float64) / (grid.shape[1] * 2.0**24)  # [n]
    return _blend(images, mean.to(images.dtype)[:, None, None, None], factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the gray image."""
    return _blend(images, luma(images), factor)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * other, clamped to [0, 1]."""
    return (images * factor).add_(other * (1.0 - factor)).clamp_(0.0, 1.0)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by `shift` [n, 1, 1, 1] turns in HSV.

    The conversion back to RGB is torchvision's table of six sectors as one formula: a channel is the largest value
    minus chroma times a clamped distance of the hue from that channel.
    """
    red, green, blue = images.unbind(dim=1)  # [n, S, S]
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    divisor = torch.where(chroma == 0, 1.0, chroma)  # gray has no hue
    # Hue in sixths of a turn, relative to the largest channel.
    hue = torch.where(
        high == red,
        (green - blue).div_(divisor),
        torch.where(high == green, (blue - red).div_(divisor).add_(2.0), (red - green).div_(divisor).add_(4.0)),
    )
    hue.add_(shift[:, 0] * 6.0)
    hue.sub_((hue * (1 / 6)).floor_().mul_(6.0))  # [n, S, S] in [0, 6)
    fall = (
        (hue - 3.0).abs_().neg_().add_(2.0),  # red lies at 0, the far side is 3
        (hue - 2.0).abs_().sub_(1.0),
        (hue - 4.0).abs_().sub_(1.0),
    )
    return torch.stack([high - channel.clamp_(0.0, 1.0).mul_(chroma) for channel in fall], dim=1)


@jit
def jitter_device(
    red: tl.tensor,
    green: tl.tensor,
    blue: tl.tensor,
    wanted: tl.tensor,
    order: tl.tensor,
    factors: tl.tensor,
    mean: tl.tensor,
    before_contrast: tl.constexpr,
) -> tl.tensor:
    """As `apply`, for the channels of pixels of one image.

    Args:
        red, green, blue: pixels, float32.
        wanted: bit k is set if operation k is.
        order: pointer to the four operations in their order.
        factors: pointer to their factors.
        mean: the mean brightness that the contrast blends with.
        before_contrast: whether to stop where the contrast would come, for the mean it needs.
    """
    for turn in tl.static_range(4):
        operation = tl.load(order + turn)
        if before_contrast and operation == 1:
            wanted = wanted * 0
        if (wanted >> operation) & 1 != 0:
            red, green, blue = _operation_device(red, green, blue, operation, tl.load(factors + operation), mean)
    return red, green, blue


@jit
def _operation_device(
    red: tl.tensor, green: tl.tensor, blue: tl.tensor, operation: tl.tensor, factor: tl.tensor, mean: tl.tensor
) -> tl.tensor:
    """One operation: 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    if operation == 3:
        red, green, blue = _hue_device(red, green, blue, factor)
    else:
        other = luma_device(red, green, blue)
        if operation == 0:
            other = other * 0.0
        if operation == 1:
            other = other * 0.0 + mean
        other = other * (1.0 - factor)
        red = _clamp_device(red * factor + other)
        green = _clamp_device(green * factor + other)
        blue = _clamp_device(blue * factor + other)
    return red, green, blue


@jit
def _clamp_device(x: tl.tensor) -> tl.tensor:
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@jit
def _hue_device(red: tl.tensor, green: tl.tensor, blue: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """As `_hue`, for the channels of pixels."""
    high = tl.maximum(tl.maximum(red, green), blue)
    chroma = high - tl.minimum(tl.minimum(red, green), blue)
    divisor = tl.where(chroma == 0.0, 1.0, chroma)
    green_high = tl.where(high == green, tl.div_rn(blue - red, divisor) + 2.0, tl.div_rn(red - green, divisor) + 4.0)
    hue = tl.where(high == red, tl.div_rn(green - blue, divisor), green_high) + shift * 6.0
    hue = hue - tl.floor(hue * 0.16666666666666666) * 6.0
    red = high - _clamp_device(2.0 - tl.abs(hue - 3.0)) * chroma
    green = high - _clamp_device(tl.abs(hue - 2.0) - 1.0) * chroma
    blue = high - _clamp_device(tl.abs(hue - 4.0) - 1.0) * chroma
    return red, green, blue

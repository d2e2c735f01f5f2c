"""Colour jitter: brightness, contrast, saturation and hue, in a random order for each image."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from pipelines.views.ops._update import update
from pipelines.views.ops.grayscale import luma
from pipelines.views.rng import Slot
from pipelines.views.spec import ViewSpec

_ORDERS = tuple(permutations(range(4)))  # 24
_NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def draw(spec: ViewSpec, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the colour jitter of one view.

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
        factors: float32 [N, 4] on the CPU, as `draw` gives them; a neutral one leaves its operation out.
        order: int64 [N, 4] on the CPU.

    Returns:
        float32 [N, 3, S, S].
    """
    wanted = on[:, None] & (factors != torch.tensor(_NEUTRAL))  # [N, 4]
    for turn in order.unbind(dim=1):  # [N], which operation is each image's next
        for number, function in enumerate((_brightness, _contrast, _saturation, _hue)):
            images = update(images, wanted[:, number] & (turn == number), function, factors[:, number])
    return images


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale, clamped to [0, 1]: images [n, 3, S, S], factor [n, 1, 1, 1]."""
    return (images * factor).clamp_(0.0, 1.0)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean brightness of the image at this point of the order."""
    # Whole multiples of 2**-24 add up exactly in float64, in whatever order a device takes them.
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
    """Turn the hue by `shift` [n, 1, 1, 1] turns in HSV.

    The way back to RGB is torchvision's table of six sectors as one formula: a channel falls from the largest value by
    the chroma times how far the hue is from that channel.
    """
    red, green, blue = images.unbind(dim=1)  # [n, S, S]
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    divisor = torch.where(chroma == 0, 1.0, chroma)  # gray has no hue and stays as it is
    # Hue in sixths of a turn, from the channel that is largest.
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

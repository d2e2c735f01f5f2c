"""Grayscale: luma in all three channels."""

from __future__ import annotations

from torch import Tensor

from pipelines.views.randomness import Slot
from pipelines.views.reference.device import jit, tl, update
from pipelines.views.spec import ViewSpec


def sample(spec: ViewSpec, u: Tensor) -> Tensor:
    """Which images of one view become gray, from u float64 [blocks, 4, N]: bool [N]."""
    return u[Slot.GRAYSCALE, 0] < spec.grayscale


def apply(images: Tensor, gray: Tensor) -> Tensor:
    """Make the images gray where gray (bool [N] on the CPU): float32 [N, 3, S, S] to the same; may overwrite."""
    return update(images, gray, lambda chosen: luma(chosen).repeat(1, 3, 1, 1))


def luma(images: Tensor) -> Tensor:
    """Brightness as torchvision weighs it (ITU-R BT.601): [N, 3, S, S] to [N, 1, S, S]."""
    red, green, blue = images.unbind(dim=1)  # [N, S, S]
    return (red * 0.2989).add_(green * 0.587).add_(blue * 0.114)[:, None]


@jit
def luma_device(red: tl.tensor, green: tl.tensor, blue: tl.tensor) -> tl.tensor:
    """As `luma`, for the channels of pixels."""
    return red * 0.2989 + green * 0.587 + blue * 0.114


@jit
def grayscale_device(red: tl.tensor, green: tl.tensor, blue: tl.tensor, gray: tl.tensor) -> tl.tensor:
    """As `apply`, for the channels of pixels of one image; `gray` is 0 or 1."""
    luma = luma_device(red, green, blue)
    return tl.where(gray != 0, luma, red), tl.where(gray != 0, luma, green), tl.where(gray != 0, luma, blue)

"""Apply a function to those images of a batch that were chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipelines.views.ops._device import upload


def update(images: Tensor, chosen: Tensor, function: Callable[..., Tensor], *per_image: Tensor) -> Tensor:
    """Replace the chosen images by `function(images, *per_image)`.

    Args:
        images: [N, 3, S, S]; may be overwritten.
        chosen: bool [N] on the CPU.
        function: gets the chosen images [n, 3, S, S] and the rows of `per_image` that belong to them, as
            [n, 1, 1, 1] on the images' device; must return as many images.
        per_image: one number per image each, [N] on the CPU.

    Returns:
        [N, 3, S, S].
    """
    where = chosen.nonzero().squeeze(1)  # [n]
    if len(where) == 0:
        return images
    numbers: tuple[Tensor, ...] = ()
    if per_image:  # [K, n], so that one copy takes them all
        rows = torch.stack([values[where].to(images.dtype) for values in per_image])
        numbers = upload(rows, images.device)[..., None, None, None].unbind()  # [n, 1, 1, 1] each
    if len(where) == len(images):
        return function(images, *numbers)
    where = upload(where, images.device)
    return images.index_copy_(0, where, function(images.index_select(0, where), *numbers))

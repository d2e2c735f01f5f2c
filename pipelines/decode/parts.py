"""Images of one call that were decoded in several ways, put back into the order of the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.decode.decoder import Decoded

Part = tuple[Sequence[int], Tensor, Tensor]
"""Images decoded together: positions in the call, pixels uint8 (packed), sizes int64 [n, 2]."""


def completed(
    parts: Sequence[Part],
    encoded: Sequence[np.ndarray],
    *,
    pillow: Callable[[Sequence[np.ndarray]], Decoded],
    upload: Callable[[Tensor], Tensor] = lambda pixels: pixels,
) -> Decoded:
    """All images of a call: those of `parts`, and the others as Pillow decodes them, whose rules are ours.

    Args:
        parts: what is decoded, in the order of the call each.
        encoded: the whole call, N images uint8 [bytes].
        pillow: decodes the rest.
        upload: brings its pixels to where those of the parts lie.
    """
    done = {n for positions, _, _ in parts for n in positions}
    if len(parts) == 1 and len(done) == len(encoded):
        return Decoded(pixels=parts[0][1], sizes=parts[0][2], failures={})
    odd = [n for n in range(len(encoded)) if n not in done]
    slow = pillow([encoded[n] for n in odd])
    failures = {odd[n]: reason for n, reason in slow.failures.items()}
    return _merged([*parts, ([n for n in odd if n not in failures], upload(slow.pixels), slow.sizes)], failures)


def _merged(parts: Sequence[Part], failures: Mapping[int, str]) -> Decoded:
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for positions, pixels, sizes in parts:
        lengths: list[int] = (sizes.prod(dim=1) * 3).tolist()
        found.update(zip(positions, zip(torch.split(pixels, lengths), sizes, strict=True), strict=True))
    if not found:
        return Decoded(pixels=parts[-1][1], sizes=parts[-1][2], failures=failures)
    order = sorted(found)
    return Decoded(
        pixels=torch.cat([found[n][0] for n in order]),
        sizes=torch.stack([found[n][1] for n in order]),
        failures=failures,
    )

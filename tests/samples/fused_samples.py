"""What the tests of the fused backend share: a batch, its decisions, and both backends' views of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines import DecodedBatch, ViewEngine, ViewSpec, draw
from pipelines.views.params import ViewParams

EVERYTHING: dict[str, Any] = {
    "jitter_p": 1.0,
    "jitter": (0.8, 0.8, 0.8, 0.5),
    "grayscale": 0.3,
    "blur": 0.8,
    "solarize": 0.5,
    "cutout": (0.1, 0.5),
}


def spec(size: int, **changes: Any) -> ViewSpec:
    """A view that every operation takes part in, but for `changes`."""
    options = {"area": (0.05, 1.0), "blur_kernel": 9, **EVERYTHING, **changes}
    return ViewSpec(name=f"v{size}", task="t", size=size, **options)


def noise(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Random images uint8 [H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8) for size in sizes]


def decided(
    images: Sequence[Tensor], specs: Sequence[ViewSpec], *, seed: int = 0, **overrides: Tensor
) -> tuple[DecodedBatch, ViewParams]:
    """A batch of the images and decisions for it; `overrides` replaces fields of the decisions."""
    batch = DecodedBatch.from_images(images, index=range(len(images)))
    params = draw(specs, batch.sizes, seed=seed, epoch=0, index=batch.index)
    return batch, dataclasses.replace(params, **overrides)


def largest_difference(
    batch: DecodedBatch, params: ViewParams, specs: Sequence[ViewSpec], *, device: str = "cpu"
) -> float:
    """Largest difference of any value between the fused backend and the reference on the CPU, float32 views."""
    ours = ViewEngine(specs, device=device, backend="fused")(batch, params)
    expected = ViewEngine(specs, backend="reference")(batch, params)
    assert [view.shape for view in ours] == [view.shape for view in expected]
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in ours)
    return max((a.cpu() - b).abs().max().item() if a.numel() else 0.0 for a, b in zip(ours, expected, strict=True))

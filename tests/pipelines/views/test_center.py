"""Evaluation views of extreme panoramas: torchvision's pixels, without torchvision's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from pipelines.batch import DecodedBatch
from pipelines.views.reference.center import center_views
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, Interpolation


def noise(height: int, width: int) -> Tensor:
    """uint8 [height, width, 3] of the full range: the kernel overshoots everywhere."""
    pixels = np.random.default_rng(height * width).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    return torch.from_numpy(pixels)


def levels(views: Tensor) -> Tensor:
    """Undo the normalisation: float64 [N, 3, S, S] in 0 to 255."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (views.double() * std + mean) * 255


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="here torchvision resizes in float, without rounding between the two axes",
)
@pytest.mark.parametrize(
    ("height", "width"),
    [
        *[(30, 900), (900, 30)],  # not extreme enough: exactly torchvision's
        *[(10, 1000), (1000, 10), (1, 200), (200, 1), (7, 1001), (1001, 7)],
        *[(101, 10_200), (10_200, 101)],  # made smaller
    ],
)
@pytest.mark.parametrize(("resize", "crop"), [(64, 56), (33, 33), (100, 17)])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_equals_torchvision(interpolation: Interpolation, height: int, width: int, resize: int, crop: int) -> None:
    image = noise(height, width)
    mode = v2.InterpolationMode(interpolation)
    composed = v2.Compose([v2.Resize(resize, mode, antialias=True), v2.CenterCrop(crop)])
    expected = composed(image.permute(2, 0, 1))  # uint8 [3, crop, crop]
    batch = DecodedBatch.from_images([image], index=[0])
    views = center_views(batch, resize=resize, crop=crop, interpolation=interpolation)
    difference = (levels(views)[0] - expected.double()).abs()
    assert difference.max() < (0.01 if max(height, width) < 100 * min(height, width) else 1.01)
    few = {"bicubic": 0.05, "bilinear": 0.15}[interpolation]  # a rounding here and there, not a shift
    assert (difference > 0.5).double().mean() < few


@pytest.mark.parametrize("shape", [(10, 100_000), (100_000, 10)])
def test_the_whole_resized_image_is_never_made(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    interpolate = F.interpolate

    def watching(source: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
        made.append(size[0] * size[1])
        return interpolate(source, size=size, **options)

    monkeypatch.setattr(F, "interpolate", watching)
    views = center_views(DecodedBatch.from_images([noise(*shape)], index=[0]), resize=256, crop=224)
    assert views.shape == (1, 3, 224, 224)
    assert made
    assert max(made) <= 256 * 256  # of 256 x 2,560,000

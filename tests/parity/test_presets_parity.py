"""The ablation presets equal torchvision compositions of exactly the operations they are named for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from benchmarks.implementations.torchvision_baseline import BICUBIC, MEAN
from pipelines import (
    DecodedBatch,
    ViewEngine,
    ViewSpec,
    asymmetric,
    byol_views,
    crop_only_views,
    cutout_only_views,
    draw,
    mocov3_views,
    no_crop_views,
    simsiam_views,
)
from tests.samples.hard_images import FLOAT_BAR, IMAGES, unnormalised, worst

BATCH = DecodedBatch.from_images(IMAGES, index=range(len(IMAGES)))
EXACT = 1e-6  # far below 1/255: every byte is the same


@pytest.mark.parametrize(
    "views",
    [
        byol_views(size=64),
        mocov3_views(size=64),
        simsiam_views(size=64),
        no_crop_views(size=64),
        asymmetric(byol_views(size=64)),
    ],
    ids=["byol", "mocov3", "simsiam", "no crop", "asymmetric"],
)
def test_presets_with_photometrics(views: tuple[ViewSpec, ViewSpec]) -> None:
    assert worst(views, seed=5) < FLOAT_BAR


def whole(image: Tensor) -> Tensor:
    """The whole image resized to a square, in [0, 1]: [3, 64, 64]."""
    small = F.resize(image.permute(2, 0, 1), [64, 64], interpolation=BICUBIC, antialias=True)
    scaled: Tensor = F.to_dtype(small, torch.float64, scale=True)
    return scaled


def test_crop_only_is_torchvisions_resized_crop() -> None:
    specs = crop_only_views(size=64)
    params = draw(specs, BATCH.sizes, seed=6, epoch=0, index=BATCH.index)
    for v, view in enumerate(ViewEngine(specs)(BATCH, params)):
        for n, image in enumerate(IMAGES):
            box = params.crop[v, n].tolist()
            crop = F.resized_crop(image.permute(2, 0, 1), *box, [64, 64], interpolation=BICUBIC, antialias=True)
            assert (unnormalised(view[n]) - F.to_dtype(crop, torch.float64, scale=True)).abs().max() < EXACT


@pytest.mark.parametrize("both", [False, True])
def test_cutout_only_is_torchvisions_resize_and_erase(both: bool) -> None:
    specs = cutout_only_views(both=both, size=64)
    params = draw(specs, BATCH.sizes, seed=7, epoch=0, index=BATCH.index)
    mean = torch.tensor(MEAN, dtype=torch.float64)[:, None, None]
    for v, view in enumerate(ViewEngine(specs)(BATCH, params)):
        for n, image in enumerate(IMAGES):
            i, j, h, w = params.cutout[v, n].tolist()
            has_box = both or v == 0
            assert (0.15 < h * w / 64**2 < 0.45) == has_box
            expected = F.erase(whole(image), i, j, h, w, mean) if has_box else whole(image)
            assert (unnormalised(view[n]) - expected).abs().max() < EXACT

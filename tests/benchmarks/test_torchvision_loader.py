"""The DataLoader baseline does the work that ours does: the same batches, shapes, and views alike in distribution."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.contenders.baselines.torchvision_loader import TorchvisionLoader, ViewDataset, view_transform
from pipelines.decode import DecodeOptions
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.storage import open_source
from pipelines.views.presets import paper_views
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

COUNT = 12
SPECS = paper_views(size=64, local_size=32, blur_kernel=7)
PLAIN = ViewSpec(name="plain", task="global", size=64, flip=0.0, jitter_p=0.0, grayscale=0.0, blur=0.0, is_target=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen pictures of 64 pixels: waves of several colours."""
    root = tmp_path_factory.mktemp("pictures")
    y, x = np.mgrid[0:64, 0:64]
    for n in range(COUNT):
        waves = [np.sin(x / (5 + n)), np.cos(y / (4 + n)), np.sin((x + y) / 9 + n)]
        Image.fromarray((128 + 100 * np.stack(waves, -1)).astype(np.uint8)).save(root / f"{n:02d}.jpg", quality=95)
    return root


def test_batches_come_in_the_order_asked_for_pass_after_pass(folder: Path) -> None:
    source = open_source(folder)
    fixed = tuple(dataclasses.replace(PLAIN, name=str(size), size=size, area=None) for size in (64, 32))
    loader = TorchvisionLoader(source, fixed, workers=2, device=torch.device("cpu"))
    assert loader.ahead == 4
    dataset = ViewDataset(source, fixed)
    for batches in ([[3, 1], [0, 5], [11, 2]], [[7, 8]]):
        loaded = list(loader(batches))
        assert [[tuple(view.shape) for view in views] for views in loaded] == [
            [(2, 3, 64, 64), (2, 3, 32, 32)] for _ in batches
        ]
        for views, indices in zip(loaded, batches, strict=True):
            for v, view in enumerate(views):
                assert torch.equal(view, torch.stack([dataset[index][v] for index in indices]))


def test_workers_draw_differently(folder: Path) -> None:
    loader = TorchvisionLoader(open_source(folder), SPECS, workers=2, device=torch.device("cpu"))
    first, second = loader([[0], [0]])  # one from each worker
    (third, _) = loader([[0], [0]])
    for one, other in ((first, second), (first, third)):
        assert not torch.equal(one[0], other[0])


def test_views_are_distributed_as_ours(folder: Path) -> None:
    source = open_source(folder)
    order = Order(num_images=COUNT, batch_size=COUNT, seed=0)
    epochs = 15
    loader = Loader(source, SPECS, order, decode=DecodeOptions(decoder="pillow"))
    ours = [next(loader.epoch(epoch)).views for epoch in range(epochs)]
    loader.close()
    torch.manual_seed(0)
    dataset = ViewDataset(source, SPECS)
    theirs = [[torch.stack(views) for views in zip(*(dataset[n] for n in range(COUNT)), strict=True)] for _ in ours]
    for v, spec in enumerate(SPECS):
        mine, peers = (_numbers(torch.cat([views[v] for views in batches])) for batches in (ours, theirs))
        assert peers == pytest.approx(mine, abs=0.08), spec.name


def _numbers(views: Tensor) -> list[float]:
    """Mean by channel, contrast, sharpness, and the share of gray images of views [N, 3, S, S]."""
    pixels = views * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    gray = ((pixels - pixels.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 0.02).float().mean()
    contrast = pixels.std(dim=(2, 3)).mean() * 4
    sharpness = (pixels[..., 1:] - pixels[..., :-1]).abs().mean() * 10
    return [*pixels.mean(dim=(0, 2, 3)).tolist(), float(contrast), float(sharpness), float(gray)]


def test_cutout_fills_a_box_of_the_mean(folder: Path) -> None:
    spec = dataclasses.replace(PLAIN, cutout=(0.2, 0.4))
    image = Image.new("RGB", (80, 70), (255, 0, 255))
    views = torch.stack([view_transform(spec)(image) for _ in range(50)])  # [50, 3, 64, 64]
    share = (views.abs().amax(dim=1) < 1e-5).float().mean(dim=(1, 2))  # the mean is 0 once it is normalised
    assert 0.18 <= float(share.min()) < 0.25
    assert 0.35 < float(share.max()) <= 0.42

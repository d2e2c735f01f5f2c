"""The baselines make the views and load the batches that they claim, so that their speed is that of the same work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.implementations.compiled_views import compile_photometric, make_views, photometric
from benchmarks.implementations.torchvision_baseline import (
    ViewDataset,
    WorkerLoader,
    torchvision_view,
    torchvision_views,
    view_transform,
)
from pipelines import DecodedBatch, ViewSpec, draw, paper_views
from pipelines.decode import DecodeOptions
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.storage import open_source
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD

COUNT = 12
LOADED = paper_views(size=64, local_size=32, blur_kernel=7)
PLAIN = ViewSpec(name="plain", task="global", size=64, flip=0.0, jitter_p=0.0, grayscale=0.0, blur=0.0, is_target=True)
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [torch.randint(0, 256, (64 + n, 90 - n, 3), dtype=torch.uint8, generator=GENERATOR) for n in range(6)]
BATCH = DecodedBatch.from_images(IMAGES, index=range(len(IMAGES)))
SPECS = paper_views(size=64, local_size=32)
EVERYTHING = ViewSpec(name="a", task="t", size=40, jitter_p=1.0, grayscale=0.5, solarize=0.7, cutout=(0.2, 0.4))
WHOLE = ViewSpec(name="b", task="t", size=40, area=None, flip=0.0, jitter_p=0.0, grayscale=0.0, blur=0.0)


@pytest.mark.parametrize("specs", [SPECS, (EVERYTHING, WHOLE)], ids=["paper", "everything"])
def test_compiled_views_are_torchvisions(specs: tuple[ViewSpec, ...]) -> None:
    params = draw(specs, BATCH.sizes, seed=1, epoch=0, index=BATCH.index)
    views = make_views(BATCH, specs, params, function=photometric, dtype=torch.float32)
    for v, spec in enumerate(specs):
        theirs = torch.stack([torchvision_view(image, spec, params.view(v), n) for n, image in enumerate(IMAGES)])
        assert views[v].is_contiguous(memory_format=torch.channels_last)
        assert (views[v] - theirs).abs().max() < 1e-4


def test_compiled_views_are_one_graph() -> None:
    """`fullgraph` raises where the compiler would have to break it."""
    specs = (EVERYTHING,)
    params = draw(specs, BATCH.sizes, seed=1, epoch=0, index=BATCH.index)
    compiled = make_views(BATCH, specs, params, function=compile_photometric(backend="eager"), dtype=torch.float32)
    plain = make_views(BATCH, specs, params, function=photometric, dtype=torch.float32)
    assert torch.equal(compiled[0], plain[0])


def dali_views(
    specs: tuple[ViewSpec, ...], *, batch: DecodedBatch = BATCH, dtype: torch.dtype = torch.float32, calls: int = 1
) -> list[list[Tensor]]:
    pytest.importorskip("nvidia.dali")
    from benchmarks.implementations.dali_baseline import dali_views as build

    make = build(specs, batch_size=len(batch), device=torch.device("cpu"), threads=1, dtype=dtype)
    return [[view.clone() for view in views] for views in make([batch] * calls)]


def test_dali_makes_views_of_all_kinds() -> None:
    calls = dali_views(SPECS, calls=4)
    for v, spec in enumerate(SPECS):
        view = torch.cat([views[v] for views in calls])  # float32 [4 N, 3, S, S]
        assert view.shape == (4 * len(BATCH), 3, spec.size, spec.size)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.isfinite().all()
        assert view.mean().abs() < 1.0  # noise around mid-gray, normalised: about 0.2
        assert 0.2 < view.std() < 2.0
    assert not torch.equal(calls[0][0], calls[1][0]), "a second batch has other parameters"


def test_dali_normalises_and_keeps_the_dtype() -> None:
    ((view,),) = dali_views((WHOLE,), dtype=torch.bfloat16)
    assert view.dtype == torch.float16
    params = draw((WHOLE,), BATCH.sizes, seed=0, epoch=0, index=BATCH.index)
    theirs = torch.stack([torchvision_view(image, WHOLE, params.view(0), n) for n, image in enumerate(IMAGES)])
    # On noise, the worst case, its resize is 0.4 of 255 off on average.
    assert (view.float() - theirs).abs().mean() < 1 / 255 / 0.229


def test_dali_cuts_a_box_of_the_right_size() -> None:
    white = DecodedBatch.from_images([torch.full((64, 64, 3), 255, dtype=torch.uint8)] * 32, index=range(32))
    spec = ViewSpec(
        name="c", task="t", size=64, area=None, jitter_p=0, grayscale=0, blur=0, solarize=0, cutout=(0.2, 0.4)
    )
    ((view,),) = dali_views((spec,), batch=white)
    share = (view[:, 0].abs() < 0.02).double().mean(dim=(1, 2))  # the box has the mean, which normalises to 0
    assert share.min() > 0.17
    assert share.max() < 0.43
    assert share.std() > 0.02


def test_dali_solarizes_and_makes_gray() -> None:
    levels = torch.arange(64, dtype=torch.uint8)[:, None, None].expand(64, 64, 3) * 4
    image = DecodedBatch.from_images([levels], index=[0])
    from pipelines.views.reference.normalize import undo

    spec = ViewSpec(name="d", task="t", size=64, area=None, jitter_p=0, grayscale=0, blur=0, solarize=1)
    ((view,),) = dali_views((spec,), batch=image)
    expected = torch.where(levels >= 128, 255 - levels, levels)
    assert torch.equal(undo(view)[0].permute(1, 2, 0), expected)


@pytest.mark.parametrize("spec", [EVERYTHING, WHOLE], ids=["everything", "whole"])
def test_kornia_where_it_is_installed(spec: ViewSpec) -> None:
    pytest.importorskip("kornia")
    from benchmarks.implementations.kornia_baseline import kornia_views

    ((view,),) = kornia_views((spec,), device=torch.device("cpu"), dtype=torch.float32)([BATCH])
    assert view.shape == (len(BATCH), 3, spec.size, spec.size)
    assert view.isfinite().all()
    assert view.abs().max() < 3.0


def test_dali_loads_the_given_images(tmp_path: Path) -> None:
    """Images of one gray value are identified by it, whatever the crop."""
    pytest.importorskip("nvidia.dali")
    from benchmarks.implementations.dali_baseline import DaliLoader

    for n in range(12):
        Image.new("RGB", (48, 40 + n), (20 * n + 10,) * 3).save(tmp_path / f"{n:02d}.jpg")
    specs = [
        ViewSpec(name=name, task="t", size=size, is_target=True, jitter_p=0.0, grayscale=0.0, blur=0.0)
        for name, size in (("a", 32), ("b", 16))
    ]
    loader = DaliLoader(
        open_source(tmp_path), specs, batch_size=4, threads=1, device=torch.device("cpu"), dtype=torch.float32
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for batches in ([[3, 1, 11, 0], [5, 4, 2, 10], [7, 6, 8, 9]], [[9, 8, 7, 6]]):
        taken = list(loader(batches))  # all are held: they must not change
        assert len(taken) == len(batches)
        for views, wanted in zip(taken, batches, strict=True):
            for view, spec in zip(views, specs, strict=True):
                assert view.shape == (4, 3, spec.size, spec.size)
                levels = (view * std + mean) * 255 - (20 * torch.tensor(wanted) + 10)[:, None, None, None]
                assert levels.abs().max() < 3
    loader.close()


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen images of 64 pixels: waves of several colours."""
    root = tmp_path_factory.mktemp("waves")
    y, x = np.mgrid[0:64, 0:64]
    for n in range(COUNT):
        waves = [np.sin(x / (5 + n)), np.cos(y / (4 + n)), np.sin((x + y) / 9 + n)]
        Image.fromarray((128 + 100 * np.stack(waves, -1)).astype(np.uint8)).save(root / f"{n:02d}.jpg", quality=95)
    return root


def test_dataloader_returns_the_given_batches_pass_after_pass(waves: Path) -> None:
    source = open_source(waves)
    fixed = tuple(dataclasses.replace(PLAIN, name=str(size), size=size, area=None) for size in (64, 32))
    loader = WorkerLoader(source, torchvision_views(fixed), workers=2, device=torch.device("cpu"))
    assert loader.ahead == 4
    dataset = ViewDataset(source, torchvision_views(fixed))
    for batches in ([[3, 1], [0, 5], [11, 2]], [[7, 8]]):
        loaded = list(loader(batches))
        assert [[tuple(view.shape) for view in views] for views in loaded] == [
            [(2, 3, 64, 64), (2, 3, 32, 32)] for _ in batches
        ]
        for views, indices in zip(loaded, batches, strict=True):
            for v, view in enumerate(views):
                assert torch.equal(view, torch.stack([dataset[index][v] for index in indices]))


def test_dataloader_workers_sample_differently(waves: Path) -> None:
    loader = WorkerLoader(open_source(waves), torchvision_views(LOADED), workers=2, device=torch.device("cpu"))
    first, second = loader([[0], [0]])  # one from each worker
    (third, _) = loader([[0], [0]])
    for one, other in ((first, second), (first, third)):
        assert not torch.equal(one[0], other[0])


def test_dataloader_views_are_distributed_as_ours(waves: Path) -> None:
    source = open_source(waves)
    order = Order(num_images=COUNT, batch_size=COUNT, seed=0)
    epochs = 15
    loader = Loader(source, LOADED, order, decode=DecodeOptions(decoder="pillow"))
    ours = [next(loader.epoch(epoch)).views for epoch in range(epochs)]
    loader.close()
    torch.manual_seed(0)
    dataset = ViewDataset(source, torchvision_views(LOADED))
    theirs = [[torch.stack(views) for views in zip(*(dataset[n] for n in range(COUNT)), strict=True)] for _ in ours]
    for v, spec in enumerate(LOADED):
        mine, peers = (_numbers(torch.cat([views[v] for views in batches])) for batches in (ours, theirs))
        assert peers == pytest.approx(mine, abs=0.08), spec.name


def _numbers(views: Tensor) -> list[float]:
    """Mean by channel, contrast, sharpness, and the share of gray images of views [N, 3, S, S]."""
    pixels = views * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    gray = ((pixels - pixels.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 0.02).float().mean()
    contrast = pixels.std(dim=(2, 3)).mean() * 4
    sharpness = (pixels[..., 1:] - pixels[..., :-1]).abs().mean() * 10
    return [*pixels.mean(dim=(0, 2, 3)).tolist(), float(contrast), float(sharpness), float(gray)]


def test_torchvision_cutout_fills_a_box_of_the_mean(waves: Path) -> None:
    spec = dataclasses.replace(PLAIN, cutout=(0.2, 0.4))
    image = Image.new("RGB", (80, 70), (255, 0, 255))
    views = torch.stack([view_transform(spec)(image) for _ in range(50)])  # [50, 3, 64, 64]
    share = (views.abs().amax(dim=1) < 1e-5).float().mean(dim=(1, 2))  # the mean is 0 once it is normalised
    assert 0.18 <= float(share.min()) < 0.25
    assert 0.35 < float(share.max()) <= 0.42

"""The baselines make the views that they say they make."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders.baselines.compiled_views import compile_photometric, make_views, photometric
from benchmarks.contenders.baselines.torchvision_views import torchvision_view
from pipelines import DecodedBatch, ViewSpec, draw, paper_views

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


def dali_views(specs: tuple[ViewSpec, ...], *, dtype: torch.dtype, calls: int) -> list[list[torch.Tensor]]:
    pytest.importorskip("nvidia.dali")
    from benchmarks.contenders.baselines.dali_views import dali_views as build

    make = build(specs, batch_size=len(BATCH), device=torch.device("cpu"), threads=1, dtype=dtype)
    return [[view.clone() for view in views] for views in make([BATCH] * calls)]


def test_dali_makes_views_of_all_kinds() -> None:
    calls = dali_views(SPECS, dtype=torch.float32, calls=4)
    for v, spec in enumerate(SPECS):
        view = torch.cat([views[v] for views in calls])  # float32 [4 N, 3, S, S]
        assert view.shape == (4 * len(BATCH), 3, spec.size, spec.size)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert view.isfinite().all()
        assert view.mean().abs() < 1.0  # noise around mid-gray, normalised: about 0.2
        assert 0.2 < view.std() < 2.0
    assert not torch.equal(calls[0][0], calls[1][0]), "a second batch has other decisions"


def test_dali_normalises_and_keeps_the_dtype() -> None:
    ((view,),) = dali_views((WHOLE,), dtype=torch.bfloat16, calls=1)
    assert view.dtype == torch.float16
    params = draw((WHOLE,), BATCH.sizes, seed=0, epoch=0, index=BATCH.index)
    theirs = torch.stack([torchvision_view(image, WHOLE, params.view(0), n) for n, image in enumerate(IMAGES)])
    # On noise, the worst case, its resize is 0.4 of 255 off on average.
    assert (view.float() - theirs).abs().mean() < 1 / 255 / 0.229


def test_dali_cuts_a_box_of_the_right_size() -> None:
    white = DecodedBatch.from_images([torch.full((64, 64, 3), 255, dtype=torch.uint8)] * 32, index=range(32))
    pytest.importorskip("nvidia.dali")
    from benchmarks.contenders.baselines.dali_views import dali_views as build

    spec = ViewSpec(
        name="c", task="t", size=64, area=None, jitter_p=0, grayscale=0, blur=0, solarize=0, cutout=(0.2, 0.4)
    )
    make = build((spec,), batch_size=32, device=torch.device("cpu"), threads=1, dtype=torch.float32)
    ((view,),) = make([white])
    share = (view[:, 0].abs() < 0.02).double().mean(dim=(1, 2))  # the box has the mean, which normalises to 0
    assert share.min() > 0.17
    assert share.max() < 0.43
    assert share.std() > 0.02


def test_dali_solarizes_and_makes_gray() -> None:
    levels = torch.arange(64, dtype=torch.uint8)[:, None, None].expand(64, 64, 3) * 4
    image = DecodedBatch.from_images([levels], index=[0])
    pytest.importorskip("nvidia.dali")
    from benchmarks.contenders.baselines.dali_views import dali_views as build
    from pipelines.views.reference.normalize import undo

    spec = ViewSpec(name="d", task="t", size=64, area=None, jitter_p=0, grayscale=0, blur=0, solarize=1)
    make = build((spec,), batch_size=1, device=torch.device("cpu"), threads=1, dtype=torch.float32)
    ((view,),) = make([image])
    expected = torch.where(levels >= 128, 255 - levels, levels)
    assert torch.equal(undo(view)[0].permute(1, 2, 0), expected)


@pytest.mark.parametrize("spec", [EVERYTHING, WHOLE], ids=["everything", "whole"])
def test_kornia_where_it_is_installed(spec: ViewSpec) -> None:
    pytest.importorskip("kornia")
    from benchmarks.contenders.baselines.kornia_views import kornia_views

    ((view,),) = kornia_views((spec,), device=torch.device("cpu"), dtype=torch.float32)([BATCH])
    assert view.shape == (len(BATCH), 3, spec.size, spec.size)
    assert view.isfinite().all()
    assert view.abs().max() < 3.0

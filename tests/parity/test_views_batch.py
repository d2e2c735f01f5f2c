"""What the engine gives an image does not depend on its batch, and what does not fit is named."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from pipelines import DecodedBatch, InputError, ViewEngine, ViewSpec, draw, paper_views
from pipelines.views.params import ViewParams
from pipelines.views.reference.crop_resize import resize
from pipelines.views.reference.device import channels
from pipelines.views.spec import IMAGENET_MEAN
from tests.samples.hard_images import hard_images, unnormalised

IMAGES = hard_images()
SPECS = (
    *paper_views(size=64, local_size=32),
    ViewSpec(name="all", task="t", size=64, jitter_p=1.0, grayscale=1.0, blur=0.5, solarize=0.5, cutout=(0.2, 0.4)),
)


def make(images: list[int], engine: ViewEngine) -> list[torch.Tensor]:
    batch = DecodedBatch.from_images([IMAGES[n % len(IMAGES)] for n in images], index=images)
    return engine(batch, draw(engine.specs, batch.sizes, seed=1, epoch=2, index=batch.index))


def test_the_same_bits_in_any_batch() -> None:
    """Batches of 50 are worked on in several chunks; the chosen images come first, last, in other company and alone."""
    engine = ViewEngine(SPECS)
    whole = make(list(range(50)), engine)
    for images in ([7], [49], [3, 44, 21], list(range(49, -1, -1)), list(range(11, 34))):
        for all_views, some_views in zip(whole, make(images, engine), strict=True):
            assert torch.equal(all_views[images], some_views)


def test_the_same_bits_with_any_number_of_threads() -> None:
    engine, threads = ViewEngine(SPECS), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = make(list(range(30)), engine)
        torch.set_num_threads(2)
        two = make(list(range(30)), engine)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_decisions_and_pixels_are_left_alone() -> None:
    batch = DecodedBatch.from_images(IMAGES, index=range(len(IMAGES)))
    params = draw(SPECS, batch.sizes, seed=0, epoch=0, index=batch.index)
    pixels, before = batch.pixels.clone(), {f.name: getattr(params, f.name).clone() for f in fields(ViewParams)}
    ViewEngine(SPECS)(batch, params)
    assert torch.equal(batch.pixels, pixels)
    assert all(torch.equal(getattr(params, name), values) for name, values in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_and_dtype(dtype: torch.dtype) -> None:
    exact, views = make([0, 9], ViewEngine(SPECS)), make([0, 9], ViewEngine(SPECS, dtype=dtype))
    for spec, reference, view in zip(SPECS, exact, views, strict=True):
        assert view.shape == (2, 3, spec.size, spec.size)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, reference.to(dtype))  # the operations themselves are in float32


def test_cutout_is_filled_with_the_mean() -> None:
    off: dict[str, Any] = {"flip": 0.0, "jitter_p": 0.0, "grayscale": 0.0, "blur": 0.0}
    spec = ViewSpec(name="c", task="t", size=32, cutout=(0.2, 0.4), **off)
    batch = DecodedBatch.from_images([torch.full((50, 60, 3), 255, dtype=torch.uint8)], index=[0])
    params = draw([spec], batch.sizes, seed=0, epoch=0, index=batch.index)
    (view,) = ViewEngine([spec])(batch, params)
    top, left, height, width = params.cutout[0, 0].tolist()
    inside = torch.zeros((32, 32), dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert (view[0][:, inside] == 0).all()  # the mean, normalised
    assert (unnormalised(view)[0][:, ~inside] - 1).abs().max() < 1e-6


def test_constants_are_made_once_and_serve_autograd_whoever_asked_first() -> None:
    channels.cache_clear()
    with torch.inference_mode():
        mean = channels(IMAGENET_MEAN, torch.device("cpu"), torch.float32)
    assert channels(IMAGENET_MEAN, torch.device("cpu"), torch.float32) is mean
    assert channels(IMAGENET_MEAN, torch.device("cpu"), torch.float64).dtype == torch.float64
    image = torch.rand((1, 3, 4, 4), requires_grad=True)
    (gradient,) = torch.autograd.grad((image * mean).sum(), image)
    assert torch.equal(gradient, torch.tensor(IMAGENET_MEAN)[None, :, None, None].expand(1, 3, 4, 4))


@pytest.mark.gpu
def test_once_begun_the_host_does_not_wait_for_the_gpu() -> None:
    engine = ViewEngine(SPECS, device="cuda:0")
    images = [image for image in IMAGES if max(image.shape) <= 32 * min(spec.size for spec in SPECS)] * 4
    batch = DecodedBatch.from_images(images, index=range(len(images)), device="cuda:0")
    params = draw(SPECS, batch.sizes, seed=1, epoch=2, index=batch.index)
    before = [view.cpu() for view in engine(batch, params)]  # constants and pinned memory are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = engine(batch, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, views, strict=True))


@pytest.mark.parametrize(
    ("height", "width", "where"), [(6000, 4000, "cpu"), (30, 1025, "cpu"), (1025, 30, "cpu"), (1024, 1024, "cuda")]
)
def test_a_gpu_leaves_extreme_shrinking_to_the_cpu(
    monkeypatch: pytest.MonkeyPatch, height: int, width: int, where: str
) -> None:
    """With tensors that have a device and no values, so that no GPU is needed."""
    devices, interpolate = [], F.interpolate

    def noted(image: torch.Tensor, **options: Any) -> torch.Tensor:
        devices.append(image.device.type)
        return interpolate(image, **options)

    monkeypatch.setattr(F, "interpolate", noted)
    with FakeTensorMode():
        shrunk = resize(torch.empty((3, height, width), dtype=torch.uint8, device="cuda:0"), 32, 32)
    assert devices == [where]
    assert (shrunk.device.type, shrunk.dtype, tuple(shrunk.shape)) == ("cuda", torch.uint8, (3, 32, 32))


@pytest.mark.gpu
@pytest.mark.parametrize(("height", "width"), [(6000, 4000), (1024, 1024), (60, 4000)])
def test_extreme_shrinking_on_a_gpu_gives_the_cpus_pixels(height: int, width: int) -> None:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, theirs = resize(image.cuda(), 32, 32), resize(image, 32, 32)
    assert ours.is_cuda
    assert (ours.cpu().int() - theirs.int()).abs().max() <= 1


def test_an_empty_batch_gives_empty_views() -> None:
    assert [view.shape[0] for view in make([], ViewEngine(SPECS))] == [0] * len(SPECS)


def test_engine_bad_arguments() -> None:
    with pytest.raises(InputError, match="specs is empty"):
        ViewEngine([])
    with pytest.raises(InputError, match="backend is 'magic' but must be one of auto, fused, native, reference"):
        ViewEngine(SPECS, backend="magic")
    with pytest.raises(InputError, match="dtype"):
        ViewEngine(SPECS, dtype=torch.int32)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("crop", [0, 0, 101, 10], r"crop\[1, 2\] is \[0, 0, 101, 10\].*of \[100, 120\]"),
        ("crop", [0, 119, 5, 2], "crop"),
        ("crop", [-1, 0, 5, 5], "crop"),
        ("crop", [0, 0, 0, 5], "crop"),
        ("cutout", [30, 0, 10, 4], r"cutout\[1, 2\]"),
        ("cutout", [0, 0, 4, 0], "cutout"),
        ("cutout", [0, 0, -1, 4], "cutout"),
        ("jitter", [float("nan"), 1, 1, 0], "jitter"),
        ("jitter", [1, -0.5, 1, 0], "jitter"),
        ("jitter", [1, 1, 1, 0.7], "jitter"),
        ("jitter_order", [0, 1, 1, 3], "jitter_order"),
        ("blur_sigma", float("inf"), "blur_sigma"),
        ("blur_sigma", -1.0, "blur_sigma"),
    ],
)
def test_decisions_that_cannot_be_are_named(field: str, value: Any, words: str) -> None:
    specs = paper_views(size=32, local_size=32)
    batch = DecodedBatch.from_images([torch.zeros((100, 120, 3), dtype=torch.uint8)] * 3, index=range(3))
    params = draw(specs, batch.sizes, seed=0, epoch=0, index=batch.index)
    values = getattr(params, field).clone()
    values[1, 2] = torch.tensor(value)
    with pytest.raises(InputError, match=words):
        ViewEngine(specs)(batch, dataclasses.replace(params, **{field: values}))


def test_decisions_for_another_batch_or_other_views_are_named() -> None:
    specs = paper_views(size=32, local_size=32)
    batch = DecodedBatch.from_images([torch.zeros((20, 30, 3), dtype=torch.uint8)] * 3, index=range(3))
    params = draw(specs, batch.sizes, seed=0, epoch=0, index=batch.index)
    with pytest.raises(InputError, match="for 2 views of 3 images"):
        ViewEngine(specs[:2])(batch, params)
    with pytest.raises(InputError, match=r"ViewParams.jitter is torch.float64"):
        ViewEngine(specs)(batch, dataclasses.replace(params, jitter=params.jitter.double()))
    large = dataclasses.replace(specs[0], blur=0.0, blur_kernel=65)
    blurred = draw([dataclasses.replace(specs[0], blur=1.0)], batch.sizes, seed=0, epoch=0, index=batch.index)
    with pytest.raises(InputError, match="blur_kernel is 65"):
        ViewEngine([large])(batch, blurred)

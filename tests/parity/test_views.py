"""Each view equals the torchvision.transforms.v2 composition for the same decisions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from benchmarks.implementations.torchvision_baseline import BICUBIC, MEAN, STD
from pipelines import DecodedBatch, InputError, ViewEngine, ViewSpec, draw, paper_views
from pipelines.views.reference.center import center_views
from tests.samples.hard_images import FLOAT_BAR, IMAGES, unnormalised, worst

BATCH = DecodedBatch.from_images(IMAGES, index=range(len(IMAGES)))
OFF: dict[str, Any] = {"flip": 0.0, "jitter_p": 0.0, "grayscale": 0.0, "blur": 0.0}


@pytest.mark.parametrize("size", [32, 96, 224])
@pytest.mark.parametrize("area", [None, (0.08, 1.0)], ids=["whole", "crop"])
def test_crop_resize_is_the_same_bytes(size: int, area: tuple[float, float] | None) -> None:
    spec = ViewSpec(name="a", task="t", size=size, area=area, **(OFF | {"flip": 0.5}))
    assert worst((spec,), seed=size) < 1e-6  # far below 1/255: every byte is the same


@pytest.mark.parametrize("size", [32, 96, 224])
def test_bilinear_crops_are_torchvisions(size: int) -> None:
    spec = ViewSpec(name="a", task="t", size=size, area=(0.08, 1.0), interpolation="bilinear", **(OFF | {"flip": 0.5}))
    params = draw((spec,), BATCH.sizes, seed=4, epoch=0, index=BATCH.index)
    engine = ViewEngine((spec,))
    (views,) = engine(BATCH, params)
    for view, image, box, flip in zip(views, IMAGES, params.crop[0].tolist(), params.flip[0].tolist(), strict=True):
        pixels = torch.as_tensor(image).permute(2, 0, 1)
        expected = v2.functional.resized_crop(pixels, *box, [size, size], v2.InterpolationMode.BILINEAR, antialias=True)
        expected = expected.flip(2) if flip else expected
        assert (unnormalised(view) - expected.double() / 255).abs().max() < 1e-6
    assert engine.backend == "reference"
    for backend in ("native", "fused"):
        with pytest.raises(
            InputError, match=f"backend is '{backend}' but view 'a' is resized bilinear, which only the"
        ):
            ViewEngine((spec,), backend=backend)
    with pytest.raises(InputError, match=r"interpolation is 'nearest' but must be bicubic or bilinear"):
        dataclasses.replace(spec, interpolation="nearest")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "on",
    [
        {"jitter": (1.0, 0.0, 0.0, 0.0), "jitter_p": 1.0},
        {"jitter": (0.0, 1.0, 0.0, 0.0), "jitter_p": 1.0},
        {"jitter": (0.0, 0.0, 1.0, 0.0), "jitter_p": 1.0},
        {"jitter": (0.0, 0.0, 0.0, 0.5), "jitter_p": 1.0},
        {"jitter_p": 1.0},
        {"grayscale": 1.0},
        {"blur": 1.0},
        {"blur": 1.0, "blur_kernel": 5, "blur_sigma": (3.0, 9.0)},
        {"blur": 1.0, "blur_kernel": 127},
        {"blur": 1.0, "blur_kernel": 1},
        {"solarize": 1.0},
        {"solarize": 1.0, "solarize_threshold": 0.3},
        {"cutout": (0.2, 0.4)},
    ],
    ids=str,
)
def test_each_operation_alone(on: dict[str, Any]) -> None:
    assert worst((ViewSpec(name="a", task="t", size=64, **(OFF | on)),), seed=1) < FLOAT_BAR


def test_every_operation_at_once() -> None:
    spec = ViewSpec(name="a", task="t", size=64, jitter_p=1.0, grayscale=0.5, blur=1.0, solarize=1.0, cutout=(0.2, 0.4))
    assert worst((spec,), seed=2) < FLOAT_BAR


def test_the_papers_views() -> None:
    """In full size on a few images: torchvision's 23x23 convolution takes long."""
    assert worst(paper_views(), seed=3, images=IMAGES[::6]) < FLOAT_BAR


def test_strong_jitter_in_many_orders() -> None:
    specs = tuple(
        ViewSpec(
            name=f"{i}", task="t", size=32, area=(0.3, 1.0), **(OFF | {"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 1})
        )
        for i in range(3)
    )
    assert worst(specs, seed=4) < FLOAT_BAR


def test_padded_rows_give_the_same_views() -> None:
    """A buffer whose rows are longer than the images, as FFCV's canvas."""
    image = IMAGES[-2]
    canvas = torch.full((image.shape[0], image.shape[1] + 37, 3), 77, dtype=torch.uint8)
    canvas[:, : image.shape[1]] = image
    padded = DecodedBatch(
        pixels=torch.cat((torch.zeros(11, dtype=torch.uint8), canvas.reshape(-1))),
        offset=torch.tensor([11]),
        sizes=torch.tensor([image.shape[:2]]),
        row_stride=torch.tensor([canvas.shape[1] * 3]),
        index=torch.tensor([5]),
        labels=torch.tensor([-1]),
    )
    plain = DecodedBatch.from_images([image], index=[5])
    specs = paper_views(size=64, local_size=32)
    params = draw(specs, plain.sizes, seed=0, epoch=0, index=plain.index)
    ours, theirs = ViewEngine(specs)(padded, params), ViewEngine(specs)(plain, params)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (36, 32), (32, 32), (73, 64)])
def test_center_views(resize: int, crop: int) -> None:
    transform = v2.Compose(
        [
            v2.Resize(resize, interpolation=BICUBIC, antialias=True),
            v2.CenterCrop(crop),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    keep = [n for n, image in enumerate(IMAGES) if max(image.shape) < 100 * min(image.shape[:2])]
    batch = DecodedBatch.from_images([IMAGES[n] for n in keep], index=keep)
    views = center_views(batch, resize=resize, crop=crop)
    theirs = torch.stack([transform(IMAGES[n].permute(2, 0, 1)) for n in keep])
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert (unnormalised(views) - unnormalised(theirs)).abs().max() < 1e-6
    half = center_views(batch, resize=resize, crop=crop, dtype=torch.bfloat16)
    assert torch.equal(half, views.bfloat16())


def test_center_views_bad_crop() -> None:
    with pytest.raises(InputError, match="crop is 33 but must be between 1 and resize"):
        center_views(BATCH, resize=32, crop=33)


@pytest.mark.gpu
def test_cuda_against_torchvision_on_the_cpu() -> None:
    """On CUDA the resize is in float, so a byte may round the other way; the float operations keep their bar."""
    specs = (ViewSpec(name="a", task="t", **OFF), ViewSpec(name="b", task="t", size=96, **OFF))
    params = draw(specs, BATCH.sizes, seed=0, epoch=0, index=BATCH.index)
    for ours, theirs in zip(
        ViewEngine(specs, device="cuda")(BATCH, params), ViewEngine(specs)(BATCH, params), strict=True
    ):
        assert (unnormalised(ours.cpu()) - unnormalised(theirs)).abs().max() < 1 / 255 + 1e-6
    square = [image for image in IMAGES if image.shape[0] == image.shape[1] == 64]
    batch = DecodedBatch.from_images(square * 8, index=range(8 * len(square)))
    whole = (dataclasses.replace(paper_views()[0], size=64, area=None, solarize=0.5),)
    params = draw(whole, batch.sizes, seed=0, epoch=0, index=batch.index)
    ours, theirs = ViewEngine(whole, device="cuda")(batch, params)[0], ViewEngine(whole)(batch, params)[0]
    assert (unnormalised(ours.cpu()) - unnormalised(theirs)).abs().max() < FLOAT_BAR

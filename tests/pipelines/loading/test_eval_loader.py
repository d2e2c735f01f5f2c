"""Evaluation loader: every image once and in order; bad ones are named and left out."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.decode import DecodeOptions
from pipelines.loading.eval_loader import iterate_center
from pipelines.runtime import InputError
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD
from tests.samples.decode_samples import MemorySource, jpegs, needs_dali


def options(**others: Any) -> dict[str, Any]:
    decode = DecodeOptions(decoder=others.pop("decoder", "auto"), threads=others.pop("threads", 1))
    return {"resize": 20, "crop": 16, "batch_size": 8, "decode": decode, **others}


@pytest.mark.parametrize("decoder", ["pillow", pytest.param("dali", marks=needs_dali)])
def test_every_image_once_in_order_with_the_pixels_of_torchvision(decoder: str) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    transform = v2.Compose(
        [
            v2.Resize(20, v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(16),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    files = jpegs(21)
    batches = list(iterate_center(MemorySource(files), **options(decoder=decoder)))
    assert [len(index) for _, index, _ in batches] == [8, 8, 5]
    views, index, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert index.tolist() == list(range(21))
    assert labels.tolist() == [n % 2 for n in range(21)]
    for n, data in enumerate(files):
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))).permute(2, 0, 1)
        assert (views[n] - transform(pixels)).abs().max() <= 1.01 / 255 / min(IMAGENET_STD)


def test_bad_images_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    files = jpegs(20)
    for n in (2, *range(8, 16)):
        files[n] = files[n][:40]
    with caplog.at_level(logging.WARNING, logger="mvssl.data"):
        batches = list(iterate_center(MemorySource(files), **options(indices=list(range(19)))))
    assert [index.tolist() for _, index, _ in batches] == [[0, 1, 3, 4, 5, 6, 7], [16, 17, 18]]
    assert [record.getMessage().split()[1] for record in caplog.records] == [
        f"image{n}.jpg" for n in (2, *range(8, 16))
    ]


def test_every_image_is_announced_once() -> None:
    class Announced(MemorySource):
        def will_need(self, indices: Sequence[int]) -> None:
            announced.append(list(indices))

    announced: list[list[int]] = []
    list(iterate_center(Announced(jpegs(50)), **options()))
    assert sorted(chain.from_iterable(announced)) == list(range(50))


def test_given_indices_are_used_in_their_order() -> None:
    batches = iterate_center(MemorySource(jpegs(12)), **options(indices=np.array([7, 3, 11])))
    assert [index.tolist() for _, index, _ in batches] == [[7, 3, 11]]


def test_leaving_early_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    for _ in range(5):
        for _batch in iterate_center(MemorySource(jpegs(24)), **options(batch_size=2)):
            break
        assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"indices": [0, 12]}, "indices is 12"),
        ({"indices": [-1]}, "indices is -1"),
        ({"crop": 30}, "crop is 30"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(iterate_center(MemorySource(jpegs(12)), **options(**change)))


def test_no_good_image_at_all_is_an_error_with_a_remedy() -> None:
    with pytest.raises(InputError, match=r"None of the 9 images of memory .*image0.jpg.*mvssl-convert"):
        list(iterate_center(MemorySource([np.zeros(9, np.uint8)] * 9), **options()))

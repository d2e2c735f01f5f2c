"""FFCV on a .beton file with a pipeline for each view, each decoding every image again, as in FFCV-SSL: a baseline.

FFCV's RandomResizedCropRGBImageDecoder decodes the whole image once per view, then come its flip and its conversion to
a tensor. It decodes with the fast DCT and crops by OpenCV's area interpolation; ours is bicubic and antialiased.

FFCV 1.0.2 has no hue, grayscale, blur or solarize; its brightness, contrast and saturation come in a fixed order, each
with a probability of its own; its cutout is a square of one size. So torchvision.transforms.v2 completes the views in a
module at the end of each pipeline, image by image, as v2 samples once a call. FFCV runs modules in its one loading
thread, with as many threads of torch as it has itself; users with a GPU do this part there. `photometric=False` leaves
out all of it but the normalisation, which FFCV has: less work than ours.

FFCV holds (batches_ahead + 2) * V * N canvases of the largest image of the file, pinned where CUDA is.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.implementations.torchvision_baseline import photometric_transform
from pipelines.runtime import InputError
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

# Any: not installed where types are checked.
fields: Any = importlib.import_module("ffcv.fields.rgb_image")
loading: Any = importlib.import_module("ffcv.loader")
reading: Any = importlib.import_module("ffcv.reader")
specs_of: Any = importlib.import_module("ffcv.pipeline.pipeline_spec")
transforms: Any = importlib.import_module("ffcv.transforms")

_PAUSE = 0.001  # seconds between two looks at the queue


class FfcvLoader:
    """FFCV's Loader with one pipeline for each view."""

    def __init__(
        self,
        path: Path,
        specs: Sequence[ViewSpec],
        *,
        batch_size: int,
        workers: int,
        device: torch.device,
        photometric: bool,
    ) -> None:
        """A loader of the images in a .beton file, with `workers` threads.

        Raises:
            InputError: the file holds no images in FFCV's form, or a view is not a random crop.
        """
        if whole := [spec.name for spec in specs if spec.area is None]:
            raise InputError(f"Views {whole} are of the whole image, which FFCV cannot resize: give each an area.")
        handlers = reading.Reader(str(path)).handlers
        images = [name for name, field in handlers.items() if isinstance(field, fields.RGBImageField)]
        if not images:
            raise InputError(f"{path} has fields {list(handlers)} but no image: give a .beton file with images.")
        self._device = device
        self._loader: Any = loading.Loader(
            str(path),
            batch_size=batch_size,
            num_workers=workers,
            os_cache=True,  # its own cache holds what it has read without bound
            order=loading.OrderOption.SEQUENTIAL,
            pipelines=dict.fromkeys(handlers)  # None: not loaded
            | {f"view_{n}": _pipeline(images[0], spec, photometric=photometric) for n, spec in enumerate(specs)},
        )

    def __call__(self, batches: Sequence[Sequence[int]]) -> Iterator[list[Tensor]]:
        """Load the batches of these dataset indices, at most an epoch of them, all of the loader's size.

        Yields V tensors float32 [N, 3, S, S] each, on the device: copies, because FFCV's last until its next batch.

        Raises:
            InputError: FFCV's thread ended; it has printed why.
        """
        self._loader.traversal_order = _GivenOrder(np.concatenate([np.asarray(batch, np.uint64) for batch in batches]))
        self._loader.first_traversal_order = self._loader.next_traversal_order()  # its length is the epoch's
        iterator: Any = iter(self._loader)
        try:
            while (views := _next(iterator)) is not None:
                yield [view.permute(0, 3, 1, 2).to(self._device, copy=True) for view in views]
        finally:
            iterator.close()
            iterator.join()
            del iterator
            self._loader.memory_manager.context.mmap = None  # else no trial could start with a cold page cache


class _GivenOrder:
    """A traversal order with given indices."""

    def __init__(self, order: npt.NDArray[np.uint64]) -> None:
        self._order = order

    def sample_order(self, epoch: int) -> npt.NDArray[np.uint64]:
        """Indices uint64 [N], the same in any epoch."""
        del epoch
        return self._order


class _Photometric(nn.Module):
    """The operations that FFCV lacks: uint8 [N, S, S, 3] to float32 [N, S, S, 3], image by image."""

    def __init__(self, spec: ViewSpec) -> None:
        super().__init__()
        self._transform = photometric_transform(spec)

    def forward(self, images: Tensor) -> Tensor:
        views = [self._transform(image) for image in images.permute(0, 3, 1, 2)]
        return torch.stack(views).permute(0, 2, 3, 1)


def _pipeline(field: str, spec: ViewSpec, *, photometric: bool) -> Any:
    """FFCV's pipeline of one view: the field to float32 [N, S, S, 3], normalised."""
    decoder = fields.RandomResizedCropRGBImageDecoder((spec.size, spec.size), scale=spec.area, ratio=spec.ratio)
    if spec.vertical_flip or spec.quarter_turns or spec.degrees != (0, 0):
        raise InputError(f"View {spec.name!r} is flipped vertically or turned, which FFCV cannot do: leave ffcv out.")
    flip = transforms.RandomHorizontalFlip(spec.flip)
    if photometric:
        rest = [transforms.ToTensor(), _Photometric(spec)]
    else:
        mean, std = 255 * np.array(IMAGENET_MEAN), 255 * np.array(IMAGENET_STD)
        rest = [transforms.NormalizeImage(mean, std, np.float32), transforms.ToTensor()]
    return specs_of.PipelineSpec(field, decoder=decoder, transforms=[flip, *rest])


def _next(iterator: Any) -> Sequence[Tensor] | None:
    """The next batch, or None at the end. FFCV itself waits for ever once its thread has died."""
    while iterator.output_queue.empty():
        if not iterator.is_alive() and iterator.output_queue.empty():
            raise InputError("FFCV's loading thread ended before its last batch: see what it printed above.")
        time.sleep(_PAUSE)
    views: Sequence[Tensor] | None = next(iterator, None)
    return views

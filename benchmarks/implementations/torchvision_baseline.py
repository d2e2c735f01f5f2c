"""What most people use: torchvision.transforms.v2, as functions for given parameters and in a DataLoader: a baseline.

Each worker process decodes an image with Pillow and makes its views one after the other, each a composition of v2's
random transforms, which sample for themselves. Images come in the order of the indices, so it loads the same batches as
ours. The parity tests compare our engine with `torchvision_view`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pipelines.storage.source import Source
from pipelines.views.params import ViewParams
from pipelines.views.spec import ViewSpec

Transform = Callable[[Image.Image], Tensor]
BICUBIC = v2.InterpolationMode.BICUBIC
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def torchvision_view(image: Tensor, spec: ViewSpec, params: ViewParams, n: int) -> Tensor:
    """One view of `image` (uint8 [H, W, 3], on any device) with given parameters: float32 [3, S, S], normalised.

    Args:
        params: of one view of all images, on the CPU.
        n: row of the image in `params`.
    """
    top, left, height, width = params.crop[n].tolist()
    view = F.resized_crop(
        image.permute(2, 0, 1), top, left, height, width, [spec.size] * 2, interpolation=BICUBIC, antialias=True
    )
    if params.flip[n]:
        view = F.horizontal_flip(view)
    if params.vertical_flip[n]:
        view = F.vertical_flip(view)
    view = F.rotate(view, 90.0 * int(params.quarter_turns[n]))
    if params.angle[n] != 0:
        view = F.rotate(
            view,
            float(params.angle[n]),
            interpolation=v2.InterpolationMode(spec.rotate_interpolation),
            fill=None if spec.fill_colour is None else list(spec.fill_colour),
        )
    view = F.to_dtype(view, torch.float32, scale=True)
    i, j, h, w = params.cutout[n].tolist()
    if h > 0:
        view = F.erase(view, i, j, h, w, torch.tensor(MEAN, device=view.device)[:, None, None])
    if params.jitter_on[n]:
        for number in params.jitter_order[n].tolist():
            view = JITTER[number](view, float(params.jitter[n, number]))
    if params.gray[n]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if params.blur_sigma[n] > 0:
        view = F.gaussian_blur(view, [spec.blur_kernel] * 2, [float(params.blur_sigma[n])] * 2)
    if params.solarize[n]:
        view = F.solarize(view, spec.solarize_threshold)
    return cast(Tensor, F.normalize(view, list(MEAN), list(STD)))


def view_transform(spec: ViewSpec) -> Transform:
    """The transform of one view: a PIL image to float32 [3, S, S], normalised.

    The image becomes a tensor first: crops of uint8 tensors take half the time of crops of PIL images.
    """
    crop = (
        v2.Resize((spec.size, spec.size), interpolation=BICUBIC, antialias=True)
        if spec.area is None
        else v2.RandomResizedCrop(spec.size, scale=spec.area, ratio=spec.ratio, interpolation=BICUBIC, antialias=True)
    )
    steps = [v2.ToImage(), crop, v2.RandomHorizontalFlip(spec.flip), *_turns(spec), *_photometric_steps(spec)]
    transform: Transform = v2.Compose(steps)
    return transform


def photometric_transform(spec: ViewSpec) -> Callable[[Tensor], Tensor]:
    """Everything after crop and flip: uint8 [3, S, S] to float32 [3, S, S], normalised."""
    transform: Callable[[Tensor], Tensor] = v2.Compose(_photometric_steps(spec))
    return transform


def _turns(spec: ViewSpec) -> list[Any]:
    """Vertical flip, quarter turns and rotation."""
    steps: list[Any] = [v2.RandomVerticalFlip(spec.vertical_flip)] if spec.vertical_flip > 0 else []
    if spec.quarter_turns > 0:
        turns = v2.RandomChoice([v2.RandomRotation((angle, angle)) for angle in (0, 90, 180, 270)])
        steps.append(v2.RandomApply([turns], p=spec.quarter_turns))
    if spec.degrees != (0, 0):
        how = v2.InterpolationMode(spec.rotate_interpolation)
        steps.append(v2.RandomRotation(spec.degrees, interpolation=how, fill=spec.fill_colour))
    return steps


def _photometric_steps(spec: ViewSpec) -> list[Any]:
    steps: list[Any] = [v2.ToDtype(torch.float32, scale=True)]
    if spec.cutout is not None:
        steps.append(v2.RandomErasing(p=1.0, scale=spec.cutout, ratio=spec.cutout_ratio, value=list(MEAN)))
    if spec.jitter_p > 0:
        steps.append(v2.RandomApply([v2.ColorJitter(*spec.jitter)], p=spec.jitter_p))
    if spec.grayscale > 0:
        steps.append(v2.RandomGrayscale(spec.grayscale))
    if spec.blur > 0:
        steps.append(v2.RandomApply([v2.GaussianBlur(spec.blur_kernel, spec.blur_sigma)], p=spec.blur))
    if spec.solarize > 0:
        steps.append(v2.RandomSolarize(spec.solarize_threshold, p=spec.solarize))
    steps.append(v2.Normalize(list(MEAN), list(STD)))
    return steps


class ViewDataset(Dataset[list[Tensor]]):
    """The views of each image of a source: V tensors float32 [3, S, S]."""

    def __init__(self, source: Source, make: Callable[[np.ndarray], list[Tensor]]) -> None:
        """`make` turns an image's file, uint8 [bytes], into its views."""
        self._source = source
        self._make = make

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self._make(self._source.read(index))


def torchvision_views(specs: Sequence[ViewSpec]) -> Callable[[np.ndarray], list[Tensor]]:
    """A function from an image's file, uint8 [bytes], to its views, float32 [3, S, S] each, normalised."""
    transforms = [view_transform(spec) for spec in specs]

    def make(data: np.ndarray) -> list[Tensor]:
        image = Image.open(io.BytesIO(data.tobytes())).convert("RGB")
        return [transform(image) for transform in transforms]

    return make


class Batches(Sampler[list[int]]):
    """Dataset indices of the next batches; `batches` is set before each pass over the DataLoader."""

    def __init__(self) -> None:
        self.batches: Sequence[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class WorkerLoader:
    """A DataLoader with persistent worker processes, as in a run of many epochs.

    The workers are forked at the first pass, before which this process must not have threads of its own.
    """

    def __init__(
        self,
        source: Source,
        make: Callable[[np.ndarray], list[Tensor]],
        *,
        workers: int,
        device: torch.device,
    ) -> None:
        """A loader of the views that `make` makes, for `device`, to which batches are copied from pinned memory."""
        self._device = device
        self._batches = Batches()
        self._loader: DataLoader[list[Tensor]] = DataLoader(
            ViewDataset(source, make),
            batch_sampler=self._batches,
            num_workers=workers,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
            multiprocessing_context="fork",  # a source with open files cannot be pickled
        )

    @property
    def ahead(self) -> int:
        """Batches that the workers may have finished or begun."""
        return self._loader.num_workers * (self._loader.prefetch_factor or 0)

    def __call__(self, batches: Sequence[list[int]]) -> Iterator[list[Tensor]]:
        """Load the batches of these dataset indices: V tensors float32 [N, 3, S, S] each, on the device."""
        self._batches.batches = batches
        for views in self._loader:
            yield [view.to(self._device, non_blocking=True) for view in views]

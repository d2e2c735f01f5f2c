"""Views, and whole loading from encoded bytes, in DALI's own operators, on the CPU or a GPU: a baseline.

DALI samples its own augmentation parameters, in the same ranges, and its operators are not torchvision's:

- `color_twist` is one affine matrix in a fixed order: its contrast is about a fixed 128 and not the image's mean, its
  hue is not HSV's. At BYOL's strength it is 9.6 of 255 off on average.
- Its bicubic resize is not torchvision's byte for byte: on noise 0.4 of 255 off on average and 8 at most.
- Every operation rounds to uint8; ours stay in float from the resize to the end.
- Grayscale and solarize have no operator: a conversion to one channel, and arithmetic. Cutout is `fn.erase`.
- Its CPU operators do not output bfloat16: float16 is made instead, of as many bytes.

Crop, resize, flip, blur and normalise do the same work as ours. Jitter, grayscale, blur and solarize are conditionals
of the graph, so images without them are spared.
"""

from __future__ import annotations

import importlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipelines.batch import DecodedBatch
from pipelines.storage.source import Source
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

dali: Any = importlib.import_module("nvidia.dali")  # Any: DALI makes its functions at run time, without types
fn, types = dali.fn, dali.types

_WHITE = 255
_PREFETCHED = 2  # batches in DALI at once, as is usual
_READERS = 8  # threads that read bytes, as in our loader


def dali_views(
    specs: Sequence[ViewSpec], *, batch_size: int, device: torch.device, threads: int, dtype: torch.dtype, seed: int = 0
) -> Callable[[Sequence[DecodedBatch]], Iterator[list[Tensor]]]:
    """A function that makes the views of batches of `batch_size` images, one batch after the other.

    Args:
        specs: V views.
        batch_size: N.
        device: where the batches lie and the views are made.
        threads: of DALI.
        dtype: float32; anything else gives float16.
        seed: of DALI's generators.

    Returns:
        A function from batches to an iterator over one [N, 3, S, S] per spec, channels-last and normalised. The
        views of a batch are valid until the next batch is requested.
    """
    on_gpu = device.type == "cuda"
    build: Any = dali.pipeline_def(_view_graph, enable_conditionals=True)
    pipeline = build(
        specs,
        types.FLOAT if dtype == torch.float32 else types.FLOAT16,
        "gpu" if on_gpu else "cpu",
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        seed=seed,
        prefetch_queue_depth=1,  # no work during the trials of others
    )

    def make(batches: Sequence[DecodedBatch]) -> Iterator[list[Tensor]]:
        stream = torch.cuda.current_stream(device) if on_gpu else None
        for batch in batches:
            images = [batch.image(n) for n in range(len(batch))]  # uint8 [H, W, 3] each, no copy
            # A CUDA build of torch without a driver breaks handing torch's CPU tensors to DALI.
            outputs = pipeline.run(stream, images=images if on_gpu else [image.numpy() for image in images])
            yield [from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]

    return make


class DaliLoader:
    """Batches of a source's views from one DALI pipeline, which decodes each image once."""

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        *,
        batch_size: int,
        threads: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """A loader of batches of `batch_size` images; `dtype` is float32, anything else gives float16."""
        self._source = source
        self._device = device
        self._pool = ThreadPoolExecutor(_READERS)
        on_gpu = device.type == "cuda"
        build: Any = dali.pipeline_def(_loader_graph, enable_conditionals=True)
        self._batches: Iterator[list[int]] = iter(())
        self._held: deque[list[np.ndarray]] = deque(maxlen=2 * _PREFETCHED)  # DALI may still read these
        self._pipeline = build(
            self._read,
            specs,
            types.FLOAT if dtype == torch.float32 else types.FLOAT16,
            "mixed" if on_gpu else "cpu",
            batch_size=batch_size,
            num_threads=threads,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=_PREFETCHED,
        )
        self._pipeline.build()

    def __call__(self, batches: Sequence[list[int]]) -> Iterator[list[Tensor]]:
        """Load the batches of these dataset indices: V tensors [N, 3, S, S] each, on the device."""
        self._batches = iter(batches)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        while True:
            try:
                outputs = self._pipeline.run(stream)
            except StopIteration:
                self._pipeline.reset()
                return
            yield [from_dlpack(output.as_tensor()).permute(0, 3, 1, 2) for output in outputs]

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()
        del self._pipeline

    def _read(self) -> list[np.ndarray]:
        """The encoded images of the next batch: uint8 [bytes] each. DALI takes StopIteration as the end."""
        encoded = list(self._pool.map(self._source.read, next(self._batches)))
        self._held.append(encoded)
        return encoded


def _view_graph(specs: Sequence[ViewSpec], dtype: Any, device: str) -> Any:
    """The graph from decoded images to one output [N, S, S, 3] per spec."""
    images = fn.external_source(
        name="images", device=device, no_copy=True, dtype=types.UINT8, ndim=3, layout="HWC", batch=True
    )
    return tuple(dali_view(images, spec, dtype) for spec in specs)


def _loader_graph(read: Callable[[], list[np.ndarray]], specs: Sequence[ViewSpec], dtype: Any, device: str) -> Any:
    """The graph from JPEGs to one output [N, S, S, 3] per spec."""
    encoded = fn.external_source(source=read, no_copy=True, dtype=types.UINT8, ndim=1, batch=True)
    images = fn.decoders.image(encoded, device=device, output_type=types.RGB)
    return tuple(dali_view(images, spec, dtype) for spec in specs)


def dali_view(images: Any, spec: ViewSpec, dtype: Any) -> Any:
    """One view of ragged uint8 images [H, W, 3]: [S, S, 3] in `dtype`, normalised."""
    if spec.area is None:
        view = fn.resize(images, size=[spec.size, spec.size], interp_type=types.INTERP_CUBIC, antialias=True)
    else:
        view = fn.random_resized_crop(
            images,
            size=[spec.size, spec.size],
            random_area=list(spec.area),
            random_aspect_ratio=list(spec.ratio),
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )
    flips = (fn.random.coin_flip(probability=chance) for chance in (spec.flip, spec.vertical_flip))
    view = fn.flip(view, horizontal=next(flips), vertical=next(flips))
    view = _turned(view, spec)
    if spec.cutout is not None:
        view = _cutout(view, spec, spec.cutout)
    if spec.jitter_p > 0:
        jitters = fn.random.coin_flip(probability=spec.jitter_p, dtype=types.BOOL)
        if jitters:
            view = _jitter(view, spec)
    if spec.grayscale > 0:
        grays = fn.random.coin_flip(probability=spec.grayscale, dtype=types.BOOL)
        if grays:
            luma = fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
            view = fn.cat(luma, luma, luma, axis=2)
    if spec.blur > 0:
        blurs = fn.random.coin_flip(probability=spec.blur, dtype=types.BOOL)
        if blurs:
            sigma = fn.random.uniform(range=list(spec.blur_sigma))
            view = fn.gaussian_blur(view, sigma=sigma, window_size=spec.blur_kernel)
    if spec.solarize > 0:
        solarizes = fn.random.coin_flip(probability=spec.solarize, dtype=types.BOOL)
        if solarizes:
            bright = view >= math.ceil(spec.solarize_threshold * _WHITE)
            view = view ^ fn.cast(bright * _WHITE, dtype=types.UINT8)  # 255 - x is x with every bit turned
    return fn.crop_mirror_normalize(
        view,
        dtype=dtype,
        output_layout="HWC",
        mean=[value * _WHITE for value in IMAGENET_MEAN],
        std=[value * _WHITE for value in IMAGENET_STD],
    )


def _turned(view: Any, spec: ViewSpec) -> Any:
    """Quarter turns and rotation of uint8 [S, S, 3]; filled with one value at most."""
    if spec.quarter_turns > 0:
        turns = fn.random.coin_flip(probability=spec.quarter_turns) * fn.random.uniform(values=[0, 90, 180, 270])
        view = fn.rotate(view, angle=turns, keep_size=True, interp_type=types.INTERP_NN)
    if spec.degrees != (0, 0):
        view = fn.rotate(
            view,
            angle=_uniform(*spec.degrees),
            keep_size=True,
            interp_type=types.INTERP_NN if spec.rotate_interpolation == "nearest" else types.INTERP_LINEAR,
            fill_value=(spec.fill_colour or (0.0,))[0],
        )
    return view


def _jitter(view: Any, spec: ViewSpec) -> Any:
    """Brightness, contrast, saturation and hue of uint8 [S, S, 3]."""
    brightness, contrast, saturation, hue = spec.jitter
    return fn.color_twist(
        view,
        brightness=_uniform(1 - brightness, 1 + brightness),
        contrast=_uniform(1 - contrast, 1 + contrast),
        saturation=_uniform(1 - saturation, 1 + saturation),
        hue=_uniform(-360 * hue, 360 * hue),  # degrees
    )


def _uniform(low: float, high: float) -> Any:
    """A uniform number, which DALI refuses to sample from an empty range."""
    return fn.random.uniform(range=[low, high]) if low < high else low


def _cutout(view: Any, spec: ViewSpec, area: tuple[float, float]) -> Any:
    """Fill one box of uint8 [S, S, 3] with the ImageNet mean."""
    area_fraction = fn.random.uniform(range=list(area))
    low, high = (math.log(bound) for bound in spec.cutout_ratio)
    ratio = dali.math.exp(fn.random.uniform(range=[low, high]))  # width / height
    height = dali.math.clamp(dali.math.sqrt(area_fraction / ratio) * spec.size, 1.0, float(spec.size))
    width = dali.math.clamp(dali.math.sqrt(area_fraction * ratio) * spec.size, 1.0, float(spec.size))
    top = fn.random.uniform(range=[0.0, 1.0]) * (spec.size - height)
    left = fn.random.uniform(range=[0.0, 1.0]) * (spec.size - width)
    return fn.erase(
        view,
        anchor=fn.stack(top, left),
        shape=fn.stack(height, width),
        axis_names="HW",
        fill_value=[value * _WHITE for value in IMAGENET_MEAN],
    )

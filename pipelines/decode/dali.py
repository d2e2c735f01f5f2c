"""NVIDIA DALI decoder: on the CPU, or "mixed" (bytes on the CPU, pixels on the GPU by nvJPEG)."""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipelines.decode.base import DaliOptions, Decoded, DecodedPart, completed_by_pillow
from pipelines.decode.limits import ImageLimits
from pipelines.decode.pillow import PillowDecoder, decode_one
from pipelines.decode.sniff import sniff
from pipelines.runtime import InputError, invalid
from pipelines.value_range import ValueRange

dali: Any = importlib.import_module("nvidia.dali")  # Any: DALI creates its functions at run time, without types
_log = logging.getLogger("mvssl.data")


class DaliDecoder:
    """Decodes plain JPEGs with DALI into one packed buffer, and all other images with Pillow.

    DALI cannot skip a sample: an image that it refuses loses the batch. Such a batch is halved until the refused image
    is alone, and only that one goes to Pillow, so the result for an image never depends on its neighbours.

    GPU memory: the pixels of each batch that is alive (3 bytes per pixel, within the limit on pixels), nvJPEG's
    buffers (16 MiB per thread, more for large images) and those of the hardware decoder. DALI allocates them from its
    own pool, which grows to the largest need and never shrinks: a few huge images cost their memory until the process
    ends. With `DALI_USE_CUDA_MALLOC_ASYNC=1` in the environment DALI uses CUDA's pool, which frees unused memory.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        batch_size: int,
        threads: int,
        options: DaliOptions | None = None,
        value_range: ValueRange | None = None,
        limits: ImageLimits | None = None,
    ) -> None:
        self._device = device
        self._batch_size = batch_size
        self._threads = threads
        self._options = options or DaliOptions()
        self._limits = limits or ImageLimits()
        self._pillow = PillowDecoder(threads=threads, value_range=value_range, limits=self._limits)
        self._pipeline = self._build()

    @property
    def name(self) -> str:
        """ "dali-mixed" with pixels on the GPU, "dali-cpu" else."""
        return "dali-mixed" if self._device.type == "cuda" else "dali-cpu"

    def __call__(self, encoded: Sequence[np.ndarray], by_pillow: Collection[int] = ()) -> Decoded:
        """Decode at most `batch_size` images, uint8 [bytes] each; see `Decoder`.

        Raises:
            InputError: more images than `batch_size`, or DALI fails on valid images.
        """
        if len(encoded) > self._batch_size:
            raise invalid("encoded", len(encoded), f"at most {self._batch_size} images", "make a larger decoder")
        wanted = [n for n, data in enumerate(encoded) if n not in by_pillow and self._is_plain(data)]
        parts = self._decode(encoded, wanted)
        return completed_by_pillow(parts, encoded, pillow=self._pillow, upload=self._upload)

    def close(self) -> None:
        """End the threads and free the pipeline."""
        self._pillow.close()
        del self._pipeline

    def _is_plain(self, data: np.ndarray) -> bool:
        """Whether DALI decodes an image: a plain JPEG within the limits."""
        header = sniff(data)
        return header is not None and header.plain and header.within(self._limits, data)

    def _build(self) -> Any:
        on_gpu = self._device.type == "cuda"
        pipeline = dali.Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=1,  # the loader's threads work ahead
        )
        with pipeline:
            encoded = dali.fn.external_source(name="encoded", no_copy=True, dtype=dali.types.UINT8, ndim=1, batch=True)
            pixels = dali.fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=dali.types.RGB,
                jpeg_fancy_upsampling=True,  # libjpeg's chroma, also on the GPU
                **(asdict(self._options) if on_gpu else {}),  # the fields have DALI's names
            )
            pipeline.set_outputs(pixels)
        pipeline.build()
        return pipeline

    def _decode(self, encoded: Sequence[np.ndarray], positions: list[int]) -> list[DecodedPart]:
        """Decode the images at these positions with DALI; those that it refuses even alone are left out."""
        if not positions:
            return []
        try:
            return [(positions, *self._run([encoded[n] for n in positions]))]
        except RuntimeError as error:
            reason = _reason(error)
            self._rebuild(error)
        if len(positions) == 1:
            self._raise_unless_refused(encoded[positions[0]], reason)
            return []
        half = len(positions) // 2
        parts = self._decode(encoded, positions[:half]) + self._decode(encoded, positions[half:])
        if sum(len(part[0]) for part in parts) == len(positions):
            _log.warning("DALI failed on %d images and then decoded them in smaller parts: %s", len(positions), reason)
        return parts

    def _run(self, encoded: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Pixels (uint8, packed) and sizes (int64 [N, 2]).

        Raises:
            RuntimeError: DALI refuses an image, or fails for a reason of its own.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        (output,) = self._pipeline.run(stream, encoded=encoded)
        shapes = torch.tensor(output.shape(), dtype=torch.int64)  # [N, 3]
        total = int(shapes.prod(dim=1).sum())
        return from_dlpack(output.as_reshaped_tensor([total])), shapes[:, :2]  # no copy: torch holds the buffer

    def _rebuild(self, cause: RuntimeError) -> None:
        """Replace the pipeline, because DALI does not guarantee that it works after an error."""
        try:
            self._pipeline = self._build()
        except RuntimeError as error:  # a device that is lost
            raise _broken(_reason(cause)) from error

    def _raise_unless_refused(self, data: np.ndarray, reason: str) -> None:
        """Raise if DALI itself fails, for example by lack of memory, rather than refusing this image.

        If Pillow decodes the image, DALI must decode the same pixels re-encoded as a plain JPEG.
        """
        pixels = decode_one(data, limits=self._limits)
        if isinstance(pixels, str):
            return
        _log.warning("DALI refuses an image that Pillow decodes, which is slow: %s", reason)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        copy = np.frombuffer(buffer.getvalue(), np.uint8)
        try:
            self._run([copy])
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()  # `copy` must live until it is decoded
        except RuntimeError as error:
            raise _broken(_reason(error)) from error

    def _upload(self, pixels: Tensor) -> Tensor:
        if self._device.type != "cuda" or pixels.numel() == 0:
            return pixels.to(self._device)
        return pixels.pin_memory().to(self._device, non_blocking=True)


def _reason(error: RuntimeError) -> str:
    """The informative line of DALI's long message."""
    lines = [line.strip() for line in str(error).splitlines()]
    if "encountered:" in lines:
        lines = lines[lines.index("encountered:") + 1 :]
        return next((line for line in lines if line), "no message")
    return next((line for line in reversed(lines) if line), "no message")


def _broken(reason: str) -> InputError:
    return InputError(
        f"DALI fails on valid images ({reason}): free memory, check the GPU's driver, or run with --decoder pillow."
    )

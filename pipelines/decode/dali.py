"""Decoding with NVIDIA DALI: on the CPU, or "mixed" (bytes on the CPU, pixels on the GPU through nvJPEG)."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipelines.decode.decoder import MAX_PIXELS, Decoded
from pipelines.decode.pillow import PillowDecoder
from pipelines.decode.sniff import sniff
from pipelines.errors import invalid

dali: Any = importlib.import_module("nvidia.dali")  # Any: DALI makes its functions at run time, without types
_log = logging.getLogger("mvssl.data")


class DaliDecoder:
    """Plain JPEGs go to DALI, which leaves them in one packed buffer; the odd ones to Pillow, whose rules are ours.

    DALI cannot skip a sample: one that it refuses loses the batch. Such a batch is decoded by Pillow, which names it.
    """

    def __init__(self, *, device: torch.device, batch_size: int, threads: int) -> None:
        self._device = device
        self._batch_size = batch_size
        self._threads = threads
        self._pillow = PillowDecoder(threads=threads)
        self._pipeline = self._build()

    @property
    def name(self) -> str:
        """ "dali-mixed" with pixels on the GPU, "dali-cpu" else."""
        return "dali-mixed" if self._device.type == "cuda" else "dali-cpu"

    def __call__(self, encoded: Sequence[np.ndarray]) -> Decoded:
        """Decode at most `batch_size` images, uint8 [bytes] each.

        Raises:
            InputError: more images than `batch_size`.
        """
        if len(encoded) > self._batch_size:
            raise invalid("encoded", len(encoded), f"at most {self._batch_size} images", "make a larger decoder")
        plain = [n for n, data in enumerate(encoded) if _for_dali(data)]
        fast = self._run([encoded[n] for n in plain]) if plain else None
        plain_refused = bool(plain) and fast is None
        if fast is None:
            plain = []
        elif len(plain) == len(encoded):
            return Decoded(pixels=fast[0], sizes=fast[1], failures={})
        chosen = set(plain)
        odd = [n for n in range(len(encoded)) if n not in chosen]
        slow = self._pillow([encoded[n] for n in odd])
        failures = {odd[n]: reason for n, reason in slow.failures.items()}
        if plain_refused and not failures:
            _log.warning("Pillow decoded a batch of %d images that DALI refused, which is slow.", len(encoded))
        slow_pixels = self._upload(slow.pixels)
        if fast is None:
            return Decoded(pixels=slow_pixels, sizes=slow.sizes, failures=failures)
        decoded = [n for n in odd if n not in failures]
        return _merge([(plain, *fast), (decoded, slow_pixels, slow.sizes)], failures)

    def close(self) -> None:
        """End the threads and give the pipeline's memory back."""
        self._pillow.close()
        del self._pipeline

    def _build(self) -> Any:
        on_gpu = self._device.type == "cuda"
        pipeline = dali.Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=1,  # one call, one batch: the loader's own thread is what works ahead
        )
        with pipeline:
            encoded = dali.fn.external_source(name="encoded", no_copy=True, dtype=dali.types.UINT8, ndim=1, batch=True)
            pixels = dali.fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=dali.types.RGB,
                jpeg_fancy_upsampling=True,  # libjpeg's chroma, also on the GPU
            )
            pipeline.set_outputs(pixels)
        pipeline.build()
        return pipeline

    def _run(self, encoded: list[np.ndarray]) -> tuple[Tensor, Tensor] | None:
        """Pixels (uint8, packed) and sizes (int64 [N, 2]); None if DALI refuses an image of the batch."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            (output,) = self._pipeline.run(stream, encoded=encoded)
        except RuntimeError as error:
            _log.info("DALI refused an image among %d: %s", len(encoded), _last_line(error))
            self._pipeline = self._build()  # DALI does not promise that a pipeline works on after an error
            return None
        shapes = torch.tensor(output.shape(), dtype=torch.int64)  # [N, 3]
        total = int(shapes.prod(dim=1).sum())
        return from_dlpack(output.as_reshaped_tensor([total])), shapes[:, :2]  # no copy: torch holds the buffer

    def _upload(self, pixels: Tensor) -> Tensor:
        if self._device.type != "cuda" or pixels.numel() == 0:
            return pixels.to(self._device)
        return pixels.pin_memory().to(self._device, non_blocking=True)


def _for_dali(data: np.ndarray) -> bool:
    header = sniff(data)
    return header is not None and header.plain and header.height * header.width <= MAX_PIXELS


def _last_line(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("Error")), lines[-1] if lines else "no message")


def _merge(parts: Sequence[tuple[list[int], Tensor, Tensor]], failures: dict[int, str]) -> Decoded:
    """Put images decoded in two ways back into the order of the call; (positions, pixels, sizes) each."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for positions, pixels, sizes in parts:
        lengths: list[int] = (sizes.prod(dim=1) * 3).tolist()
        found.update(zip(positions, zip(torch.split(pixels, lengths), sizes, strict=True), strict=True))
    order = sorted(found)
    return Decoded(
        pixels=torch.cat([found[n][0] for n in order]),
        sizes=torch.stack([found[n][1] for n in order]),
        failures=failures,
    )

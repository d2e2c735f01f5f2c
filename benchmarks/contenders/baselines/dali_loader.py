"""All-DALI loading: one graph from encoded bytes to normalised views, which decodes each image once.

A peer to be measured against. Its views are those of `dali_views.py`, with that file's differences from torchvision.
DALI prefetches two batches, as is usual; eight threads read the bytes, as in our loader.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from benchmarks.contenders.baselines.dali_views import dali_view
from pipelines.storage.source import Source
from pipelines.views.spec import ViewSpec

dali: Any = importlib.import_module("nvidia.dali")  # Any: DALI makes its functions at run time, without types

_DEPTH = 2  # batches in DALI at once
_READERS = 8


class DaliLoader:
    """Batches of a source's views from one DALI pipeline."""

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
        build: Any = dali.pipeline_def(_graph, enable_conditionals=True)
        self._batches: Iterator[list[int]] = iter(())
        self._held: deque[list[np.ndarray]] = deque(maxlen=2 * _DEPTH)  # what DALI may still read
        self._pipeline = build(
            self._read,
            specs,
            dali.types.FLOAT if dtype == torch.float32 else dali.types.FLOAT16,
            "mixed" if on_gpu else "cpu",
            batch_size=batch_size,
            num_threads=threads,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=_DEPTH,
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
        """End the threads."""
        self._pool.shutdown()
        del self._pipeline

    def _read(self) -> list[np.ndarray]:
        """The encoded images of the next batch: uint8 [bytes] each. Ends by StopIteration, as DALI wants it."""
        encoded = list(self._pool.map(self._source.read, next(self._batches)))
        self._held.append(encoded)
        return encoded


def _graph(read: Callable[[], list[np.ndarray]], specs: Sequence[ViewSpec], dtype: Any, device: str) -> Any:
    """The graph from JPEGs to one output [N, S, S, 3] per spec."""
    encoded = dali.fn.external_source(source=read, no_copy=True, dtype=dali.types.UINT8, ndim=1, batch=True)
    images = dali.fn.decoders.image(encoded, device=device, output_type=dali.types.RGB)
    return tuple(dali_view(images, spec, dtype) for spec in specs)

"""Evaluation loader: every image once in a given order, as its centre crop or as one augmented view."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import DecodedBatch, with_index
from pipelines.decode import DecodeOptions, decoder_of, thread_count
from pipelines.loading.fetch import Fetcher
from pipelines.loading.threads import BATCHES_AHEAD, Prefetcher, ReadAhead, SideStream, receive
from pipelines.runtime import InputError, invalid
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source
from pipelines.views.engine import ViewEngine
from pipelines.views.reference.center import center_views
from pipelines.views.sampling import draw
from pipelines.views.spec import Interpolation, ViewSpec

_log = logging.getLogger("mvssl.data")
_EXAMPLES = 3

EvaluationBatch = tuple[Tensor, Tensor, Tensor]
"""Views [N, 3, S, S] on the device; index int64 [N] and labels int64 [N] (-1 = none) on the CPU."""


def iterate_center(
    source: Source,
    *,
    resize: int,
    crop: int,
    batch_size: int,
    interpolation: Interpolation = "bicubic",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    decode: DecodeOptions | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    prefetch: int = 2,
) -> Generator[EvaluationBatch, None, None]:
    """Iterate over centre crops in order, prepared in a thread; the last short batch is kept.

    An image that cannot be decoded is named in a warning and left out, so batches may be smaller than `batch_size`.
    Close the generator if you leave early (`contextlib.closing`): garbage collection would stop its threads in any
    thread.

    Args:
        source: the encoded images.
        resize: short side before the crop, in pixels.
        crop: side of the centre crop, in pixels.
        batch_size: images per batch.
        interpolation: of the resize.
        device: where the views are made and handed over.
        dtype: of the views.
        decode: decoder options; None for the defaults.
        indices: dataset indices, in this order; None for all.
        prefetch: finished batches that may wait.

    Raises:
        InputError: a number is below 1, `resize` or `crop` does not suit `center_views`, an index does not exist; while
            iterating: no image could be decoded, the decoder fails, or the storage is damaged.
    """
    make = partial(center_views, resize=resize, crop=crop, interpolation=interpolation, dtype=dtype)
    return _iterate(source, make, batch_size, device, decode, indices, prefetch)


def iterate_augmented(
    source: Source,
    spec: ViewSpec,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    decode: DecodeOptions | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    prefetch: int = 2,
) -> Generator[EvaluationBatch, None, None]:
    """As `iterate_center`, with one view of `spec` per image, sampled for (seed, epoch, image)."""
    engine = ViewEngine((spec,), device=with_index(device), dtype=dtype)

    def make(batch: DecodedBatch) -> Tensor:
        views: list[Tensor] = engine(batch, draw((spec,), batch.sizes, seed=seed, epoch=epoch, index=batch.index))
        return views[0]

    return _iterate(source, make, batch_size, device, decode, indices, prefetch)


def _iterate(
    source: Source,
    make: Callable[[DecodedBatch], Tensor],
    batch_size: int,
    device: str | torch.device,
    decode: DecodeOptions | None,
    indices: Sequence[int] | np.ndarray | None,
    prefetch: int,
) -> Generator[EvaluationBatch, None, None]:
    for field, value in (("batch_size", batch_size), ("prefetch", prefetch)):
        if value < 1:
            raise invalid(field, value, "1 or more", "give a positive number")
    wanted = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    if wanted.size and not 0 <= int(np.min(wanted)) <= int(np.max(wanted)) < len(source):
        outside = wanted[(wanted < 0) | (wanted >= len(source))]
        raise invalid("indices", int(outside[0]), f"in [0, {len(source)})", "give indices of this data set")
    device = with_index(device)
    facts = facts_of(source)
    decoder = decoder_of(
        decode, device=device, batch_size=batch_size, value_range=facts.value_range, limits=facts.limits
    )
    fetch = Fetcher(source, decoder, threads=thread_count(decode))
    batches = [wanted[at : at + batch_size].tolist() for at in range(0, len(wanted), batch_size)]
    side = SideStream(device)
    return _consume(_produce(source, fetch, batches, side, make), fetch, prefetch)


def _consume(
    items: Generator[tuple[EvaluationBatch, torch.cuda.Event | None], None, None], fetch: Fetcher, prefetch: int
) -> Generator[EvaluationBatch, None, None]:
    try:
        producer = Prefetcher(items, depth=prefetch, name="mvssl-evaluate")
        try:
            for batch, event in producer:
                receive(batch[:1], event)
                yield batch
        finally:
            producer.close()
    finally:
        fetch.close()


def _produce(
    source: Source,
    fetch: Fetcher,
    batches: Sequence[Sequence[int]],
    side: SideStream,
    make: Callable[[DecodedBatch], Tensor],
) -> Generator[tuple[EvaluationBatch, torch.cuda.Event | None], None, None]:
    """Runs in the producer's thread."""
    reasons: list[str] = []
    found = 0
    with closing(ReadAhead(source, iter(batches), lead=BATCHES_AHEAD)) as ahead:
        for indices in batches:
            ahead.advance()
            with side.use(), torch.no_grad():
                fetched = fetch(indices)
                for n, reason in fetched.failures.items():
                    key = source.key(indices[n])
                    reasons.append(f"{key} ({reason})")
                    _log.warning("Image %s cannot be decoded (%s): it is left out of the evaluation.", key, reason)
                if not len(fetched.batch):
                    continue
                found += len(fetched.batch)
                batch = side.upload(fetched.batch)
                views = make(batch)  # [N, 3, S, S]
                event = side.mark(fetched.encoded, fetched.batch, batch)
            yield (views, batch.index, batch.labels), event
    if batches and not found:
        raise InputError(
            f"None of the {len(reasons)} images of {source.location} can be decoded, for example "
            f"{'; '.join(reasons[:_EXAMPLES])}: check the data, or run mvssl-convert on it."
        )

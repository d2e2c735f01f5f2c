"""Measures the values of a source's deep images, so that all of its splits are converted with one range."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from pipelines.conversion.imagenet import ArchiveSource
from pipelines.conversion.sources import Job
from pipelines.decode.pillow import DEEP_ENDINGS, HEAD_BYTES, may_be_deep, measure
from pipelines.runtime import InputError
from pipelines.storage.beton import BetonSource
from pipelines.storage.folder import FolderSource
from pipelines.storage.forms.base import FormSource
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source
from pipelines.value_range import Measured, ValueRange, bits_for

_SAMPLE, _CHUNK = 256, 64  # images
_BLOCKS = 8  # of the sample of a form


@dataclass(frozen=True, kw_only=True)
class Values:
    """How the deep images of a conversion become 8 bits.

    Attributes:
        value_range: values that become 0..255; None if there are no deep images, or they need no range.
        measured: whether the range was measured.
        refused: for each job, index -> why a deep image is outside of any range that could be measured.
    """

    value_range: ValueRange | None
    measured: bool = False
    refused: Sequence[dict[int, str]] = field(default_factory=list)


def measure_jobs(
    jobs: Sequence[Job], *, workers: int, reduced: bool, progress: Callable[[int], None] | None = None
) -> Values:
    """Look at every image that may have more than 8 bits: the fewest bits that hold the largest of their values.

    Args:
        jobs: the splits.
        workers: threads.
        reduced: whether smaller versions of images are wanted.
        progress: called with the number of images looked at.

    Raises:
        InputError: the splits are converted data with different ranges.
    """
    known = {facts_of(job.source).value_range for job in jobs} - {None}
    if len(known) > 1:
        raise InputError(
            f"SRC was converted with several ranges of values ({', '.join(sorted(map(str, known)))}): convert the "
            "original images again."
        )
    if known:
        return Values(value_range=known.pop(), refused=[{} for _ in jobs])
    largest, done = -1.0, 0
    refused: list[dict[int, str]] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(workers, thread_name_prefix="mvssl-measure") as pool:
        warnings.simplefilter("ignore")  # the conversion lists them
        for job in jobs:
            odd: dict[int, str] = {}
            for index, measured in _measured(job.source, pool, reduced=reduced):
                done += 1
                if measured is not None and measured.fits_16_bits:
                    largest = max(largest, measured.high)
                elif measured is not None:
                    odd[index] = measured.problem()
                if progress is not None and done % _CHUNK == 0:
                    progress(done)
            refused.append(odd)
    return Values(value_range=None if largest < 0 else bits_for(largest), measured=True, refused=refused)


def _measured(source: Source, pool: ThreadPoolExecutor, *, reduced: bool) -> Iterator[tuple[int, Measured | None]]:
    """Values of the deep images, and None for others that were looked at."""
    limits = facts_of(source).limits

    def look(index: int) -> tuple[int, Measured | None]:
        try:
            if isinstance(source, FolderSource) and not may_be_deep(source.head(index, HEAD_BYTES)):
                return index, None
            return index, measure(source.read(index), limits=limits, reduced=reduced)
        except OSError:  # the conversion names it
            return index, None

    indices = _candidates(source, look)
    for at in range(0, len(indices), _CHUNK):  # few images in memory
        yield from pool.map(look, indices[at : at + _CHUNK])


def _candidates(source: Source, look: Callable[[int], tuple[int, Measured | None]]) -> Sequence[int]:
    """Indices of images that may be deep, by the endings of their names, else by a sample."""
    if isinstance(source, ArchiveSource | BetonSource):  # ImageNet's JPEGs; 8-bit pixels
        return ()
    if isinstance(source, FolderSource):
        return [n for n in range(len(source)) if _ending(source.key(n)) in DEEP_ENDINGS]
    if isinstance(source, FormSource):
        if source.deep is not None:
            return source.deep
        starts = np.linspace(0, max(0, len(source) - _SAMPLE // _BLOCKS), _BLOCKS).astype(int).tolist()
        near = (range(start, min(start + _SAMPLE // _BLOCKS, len(source))) for start in starts)
        # Neighbours, because some forms are read in order.
        return range(len(source)) if any(look(n)[1] is not None for block in near for n in block) else ()
    sample: Iterable[int] = np.linspace(0, len(source) - 1, min(_SAMPLE, len(source))).astype(int).tolist()
    return range(len(source)) if any(look(index)[1] is not None for index in sample) else ()


def _ending(key: str) -> str:
    return os.path.splitext(key)[1].lower()

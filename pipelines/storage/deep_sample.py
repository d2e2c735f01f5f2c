"""Samples the values of a source's images of more than 8 bits."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipelines.decode.pillow import DEEP_ENDINGS, measure
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source
from pipelines.value_range import Measured, ValueRange

_NEARLY_BLACK = 16  # of 255
_LOOKED_AT, _SAMPLE, _THREADS = 4096, 32, 8  # names, files
_log = logging.getLogger("mvssl.data")


def warn_if_black_or_white(source: Source, stated: ValueRange) -> None:
    """Warn if the stated range makes a sample of the images nearly black, or white."""
    found = [measured for _, measured in measure_sample(source) if not measured.is_black]
    if not found:
        return
    low, high = min(measured.low for measured in found), max(measured.high for measured in found)
    scaled = stated.scaled(np.array([low, high]))
    if scaled.max() < _NEARLY_BLACK or scaled.min() == 255:
        _log.warning(
            "%s: images of more than 8 bits become %s by --value-range %s: a sample of them has values from %g to %g",
            source.location,
            "white" if scaled.min() == 255 else "nearly black",
            stated,
            low,
            high,
        )


def measure_sample(source: Source) -> Iterator[tuple[str, Measured]]:
    """Keys and values of an evenly spread sample of the deep images, by the endings of their names."""
    limits = facts_of(source).limits
    spread = np.linspace(0, len(source) - 1, min(_LOOKED_AT, len(source))).astype(np.int64).tolist()
    likely = [index for index in spread if os.path.splitext(source.key(index))[1].lower() in DEEP_ENDINGS]
    sample = [likely[n] for n in np.unique(np.linspace(0, len(likely) - 1, min(_SAMPLE, len(likely))).astype(int))]

    def look(index: int) -> tuple[str, Measured | None]:
        try:
            return source.key(index), measure(source.read(index), limits=limits)
        except OSError:  # the loader names it
            return source.key(index), None

    with ThreadPoolExecutor(_THREADS) as pool:
        for key, measured in pool.map(look, sample):
            if measured is not None:
                yield key, measured

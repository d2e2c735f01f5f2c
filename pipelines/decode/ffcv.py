"""FFCV decoder: the libjpeg-turbo in FFCV's library, in threads, each image directly into the batch's buffer.

FFCV's own decode function uses a faster, coarser transform and hides errors, so libjpeg-turbo is called directly.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeGuard

import numpy as np

from pipelines.decode.base import Decoded, completed_by_pillow
from pipelines.decode.limits import ImageLimits
from pipelines.decode.pillow import PillowDecoder
from pipelines.decode.sniff import Header, sniff
from pipelines.value_range import ValueRange

_RGB = 0  # turbojpeg.h: TJPF_RGB
_ACCURATE = 4096  # TJFLAG_ACCURATEDCT: the transform of libjpeg, and so of Pillow


class FfcvDecoder:
    """Decodes plain upright JPEGs with libjpeg-turbo, and all others, and those it warns about, with Pillow."""

    name = "ffcv"

    def __init__(
        self, *, threads: int, value_range: ValueRange | None = None, limits: ImageLimits | None = None
    ) -> None:
        """Load FFCV's library.

        Raises:
            OSError: it is not installed, or does not load; the message says which.
        """
        self._library = load_ffcv()
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mvssl-ffcv")
        self._limits = limits or ImageLimits()
        self._pillow = PillowDecoder(threads=threads, value_range=value_range, limits=self._limits)
        self._local = threading.local()
        self._handles: list[ctypes.c_void_p] = []

    def __call__(self, encoded: Sequence[np.ndarray], by_pillow: Collection[int] = ()) -> Decoded:
        """Decode N images, uint8 [bytes] each, to pixels on the CPU; see `Decoder`."""
        import torch  # not for what only asks whether FFCV is here

        headers = [sniff(data) for data in encoded]
        wanted = [
            n
            for n, header in enumerate(headers)
            if n not in by_pillow and _is_plain(header) and header.within(self._limits, encoded[n])
        ]
        sizes = torch.tensor([_size(headers[n]) for n in wanted], dtype=torch.int64).reshape(-1, 2)
        ends = (sizes.prod(dim=1) * 3).cumsum(0)
        pixels = torch.empty(int(ends[-1]) if wanted else 0, dtype=torch.uint8)
        starts = (ends - sizes.prod(dim=1) * 3).tolist()

        def decode(share: range) -> list[bool]:
            base = pixels.data_ptr()
            return [
                self._decode(encoded[wanted[k]], base + starts[k], int(sizes[k, 0]), int(sizes[k, 1])) for k in share
            ]

        count = min(self._threads, max(1, len(wanted)))
        shares = [range(first, len(wanted), count) for first in range(count)]
        fine = [False] * len(wanted)
        for share, results in zip(shares, self._pool.map(decode, shares), strict=True):
            for k, result in zip(share, results, strict=True):
                fine[k] = result
        if all(fine):
            parts = [(wanted, pixels, sizes)] if wanted else []
        else:
            lengths = (sizes.prod(dim=1) * 3).tolist()
            parts = [
                ([wanted[k]], pixels[starts[k] : starts[k] + lengths[k]], sizes[k : k + 1])
                for k in range(len(wanted))
                if fine[k]
            ]
        return completed_by_pillow(parts, encoded, pillow=self._pillow)

    def close(self) -> None:
        """End the threads and free the library's memory."""
        self._pool.shutdown()
        self._pillow.close()
        while self._handles:
            self._library.tjDestroy(self._handles.pop())

    def _decode(self, data: np.ndarray, place: int, height: int, width: int) -> bool:
        """Decode one image to an address; False on any error or warning of the library."""
        code: int = self._library.tjDecompress2(
            self._handle(),
            ctypes.c_void_p(data.ctypes.data),
            ctypes.c_ulong(data.size),
            ctypes.c_void_p(place),
            *(ctypes.c_int(number) for number in (width, 3 * width, height, _RGB, _ACCURATE)),
        )
        return code == 0

    def _handle(self) -> ctypes.c_void_p:
        """This thread's decompressor."""
        if not hasattr(self._local, "handle"):
            self._local.handle = ctypes.c_void_p(self._library.tjInitDecompress())
            self._handles.append(self._local.handle)
        handle: ctypes.c_void_p = self._local.handle
        return handle


@functools.cache
def load_ffcv() -> ctypes.CDLL:
    """FFCV's library, without importing the package, which takes seconds.

    Raises:
        OSError: it is not installed, or does not load.
    """
    package = importlib.util.find_spec("ffcv")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    found = [path for folder in folders for path in sorted(Path(folder).glob("_libffcv*.so"))]
    if not found:
        raise OSError("the package ffcv is not installed")
    library = ctypes.CDLL(str(found[0]))
    if not hasattr(library, "tjDecompress2"):
        raise OSError(f"{found[0].name} is not linked with libjpeg-turbo")
    library.tjInitDecompress.restype = ctypes.c_void_p
    return library


def missing_ffcv() -> str | None:
    """Why FFCV's library cannot be used, or None."""
    try:
        load_ffcv()
    except OSError as error:
        return str(error)
    return None


def _is_plain(header: Header | None) -> TypeGuard[Header]:
    """Whether an image is a plain upright JPEG."""
    return header is not None and header.plain and header.upright


def _size(header: Header | None) -> tuple[int, int]:
    return (0, 0) if header is None else (header.height, header.width)

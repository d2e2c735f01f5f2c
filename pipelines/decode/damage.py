"""Finds images that decode although their data are damaged: JPEGs by their Huffman codes, PNGs by their checksums."""

from __future__ import annotations

import ctypes
import logging
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.c_library import load_library
from pipelines.decode.limits import MOST_CHUNKS, ImageLimits
from pipelines.decode.pillow import DEFAULT_LIMITS, decode_one

_SOURCE = Path(__file__).with_name("jpeg_scan.c")
_REQUEST = np.dtype(
    [
        ("data", np.uint64),
        ("size", np.int64),
        ("verdict", np.int32),
        ("scan", np.int32),
        ("whole", np.int32),
        ("done", np.float32),
    ],
    align=True,
)  # same layout as Request in jpeg_scan.c
_ODD = 1
_VERDICTS = {
    2: "its data end",
    3: "its data are invalid",
    4: "it has surplus data",
    5: "a restart marker is missing",
    6: "its last scans are missing",
}
_PNG = b"\x89PNG\r\n\x1a\n"
ODD = ""
"""Finding of a JPEG of which libjpeg complains though no pixel is affected (padding), or which cannot be examined."""
_log = logging.getLogger("mvssl.data")


def find_damage(encoded: Sequence[NDArray[np.uint8]], *, threads: int = 1) -> dict[int, str]:
    """Examine images, uint8 [bytes] each, in about a quarter of the time that decoding a JPEG takes.

    Decoders paint what is missing of a JPEG gray; libjpeg says so on standard error, without a name. They do not look
    at the checksums of a PNG's pixels.

    Returns:
        Position -> the damage in a few words, or `ODD`. JPEGs are examined if there is a C compiler; formats other than
        JPEG and PNG are not.
    """
    found = {n: "a checksum is wrong" for n, data in enumerate(encoded) if _has_wrong_checksum(data.data)}
    library = _library()
    if library is None or not encoded:
        return found
    requests = np.zeros(len(encoded), dtype=_REQUEST)
    requests["data"] = [data.ctypes.data for data in encoded]
    requests["size"] = [data.size for data in encoded]
    address = ctypes.c_void_p(requests.ctypes.data)
    library.examine_jpegs(address, ctypes.c_int64(len(requests)), ctypes.c_int64(threads))
    return found | {n: _describe(requests[n]) for n in np.flatnonzero(requests["verdict"]).tolist()}


def refused_jpegs(
    encoded: Sequence[NDArray[np.uint8]], *, threads: int = 1, limits: ImageLimits = DEFAULT_LIMITS
) -> dict[int, str]:
    """The JPEGs among images, uint8 [bytes] each, that Pillow does not decode: position -> `ODD`.

    Takes the place of the examination where there is no C compiler: other decoders decode more of what is damaged.
    """
    jpegs = [n for n, data in enumerate(encoded) if data[:2].tobytes() == b"\xff\xd8"]
    with ThreadPoolExecutor(threads) as pool:
        decoded = pool.map(lambda n: isinstance(decode_one(encoded[n], limits=limits), str), jpegs)
        return {n: ODD for n, refused in zip(jpegs, decoded, strict=True) if refused}


def can_find_damage() -> bool:
    """Whether there is a C compiler, so that JPEGs can be examined; warns once if not."""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    library = load_library(_SOURCE)
    if isinstance(library, str):
        _log.warning(
            "JPEGs are not examined for damage inside, because %s; where DALI or FFCV decodes them, Pillow decodes "
            "each once, too, which tells the bad ones.",
            library,
        )
        return None
    return library


def _describe(request: np.void) -> str:
    verdict, done = int(request["verdict"]), float(request["done"])
    if verdict == _ODD:
        return ODD
    if done == 1:
        return _VERDICTS[verdict]
    where = "of the picture" if request["whole"] else f"of scan {request['scan']}"
    return f"{_VERDICTS[verdict]} after {int(100 * done)} % {where}"


def _has_wrong_checksum(view: memoryview) -> bool:
    """Whether a checksum of a PNG's pixels is wrong."""
    if view[:8] != _PNG:
        return False
    at = 8
    for _ in range(MOST_CHUNKS):
        if at + 12 > len(view):
            break
        size, kind = struct.unpack_from(">I4s", view, at)
        end = at + 8 + size
        if end + 4 > len(view) or kind == b"IEND":
            return False
        if kind == b"IDAT" and zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return True
        at = end + 4
    return False

"""Samples augmentation parameters in one C call that releases the GIL, with the bits of `sample_reference`."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.c_library import load_library
from pipelines.views import portable_math
from pipelines.views.native import SAMPLING
from pipelines.views.params import SHAPES, ViewParams
from pipelines.views.spec import ViewSpec

_log = logging.getLogger("mvssl.data")
_BOX = [
    (name, np.float64)
    for name in ("wanted", "area", "area_extent", "ratio_low", "ratio_high", "log_ratio", "log_ratio_extent")
]
Spec = np.dtype(
    [
        ("crop", _BOX),
        ("cutout", _BOX),
        ("size", np.float64),
        ("blur_kernel", np.float64),
        ("flip", np.float64),
        ("jitter", np.float64, 4),
        ("jitter_p", np.float64),
        ("grayscale", np.float64),
        ("blur", np.float64),
        ("sigma", np.float64),
        ("sigma_extent", np.float64),
        ("solarize", np.float64),
        ("vertical_flip", np.float64),
        ("quarter_turns", np.float64),
        ("angle", np.float64),
        ("angle_extent", np.float64),
    ]
)
"""The parts of a ViewSpec that sampling needs, as sampling.c reads them. A new operation adds its numbers here."""
_AS_THEY_ARE = (
    *("size", "blur_kernel", "flip", "vertical_flip", "quarter_turns"),
    *("jitter", "jitter_p", "grayscale", "blur", "solarize"),
)
"""Numbers that are fields of ViewSpec."""


class _Params(ctypes.Structure):
    """Pointers to the parameters, in the order of sampling.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in SHAPES]


def sample_native(
    specs: Sequence[ViewSpec], sizes: Tensor, *, seed: int, epoch: int, index: Tensor
) -> ViewParams | None:
    """Sample the parameters; None without a compiler or for invalid input.

    Args:
        specs: V views, at most 65,535.
        sizes: int64 [N, 2] on the CPU.
        seed: in [0, 2**64).
        epoch: in [0, 2**32).
        index: int64 [N] on the CPU.
    """
    library = load_library(SAMPLING)
    if isinstance(library, str):
        _announce(library)
        return None
    views, images = len(specs), len(sizes)
    sizes, index = sizes.contiguous(), index.contiguous()
    params = {name: torch.empty((views, images, *tail), dtype=dtype) for name, (dtype, tail) in SHAPES.items()}
    table = _table(tuple(specs))
    refused = library.draw(
        ctypes.c_void_p(table.ctypes.data),
        ctypes.c_int64(views),
        ctypes.c_void_p(sizes.data_ptr()),
        ctypes.c_void_p(index.data_ptr()),
        ctypes.c_int64(images),
        ctypes.c_uint64(seed),
        ctypes.c_uint32(epoch),
        ctypes.byref(_Params(*(tensor.data_ptr() for tensor in params.values()))),
    )
    return None if refused else ViewParams(**params)


def params_fit(params: ViewParams, specs: Sequence[ViewSpec], sizes: Tensor) -> bool:
    """Whether parameters of the right types and shapes fit these views and images; False also without a compiler."""
    library = load_library(SAMPLING)
    if isinstance(library, str):
        return False
    tensors = [getattr(params, name).contiguous() for name in SHAPES]
    sizes = sizes.contiguous()
    return bool(
        library.fit(
            ctypes.c_void_p(_table(tuple(specs)).ctypes.data),
            ctypes.c_int64(len(specs)),
            ctypes.c_void_p(sizes.data_ptr()),
            ctypes.c_int64(len(sizes)),
            ctypes.byref(_Params(*(tensor.data_ptr() for tensor in tensors))),
        )
    )


@functools.cache
def _announce(obstacle: str) -> None:
    """Warn once that the slower sampling is used."""
    _log.warning("Augmentation parameters are sampled in Python, which is slower: %s.", obstacle)


@functools.lru_cache(maxsize=64)
def _table(specs: tuple[ViewSpec, ...]) -> np.ndarray:
    """Spec [V] of these views."""
    table = np.zeros(len(specs), dtype=Spec)
    for row, spec in zip(table, specs, strict=True):
        _write_box(row["crop"], spec.area, spec.ratio)
        _write_box(row["cutout"], spec.cutout, spec.cutout_ratio)
        for name in _AS_THEY_ARE:
            row[name] = getattr(spec, name)
        low, high = spec.blur_sigma
        row["sigma"], row["sigma_extent"] = low, high - low
        low, high = spec.degrees
        row["angle"], row["angle_extent"] = low, high - low
    return table


def _write_box(row: np.void, area: tuple[float, float] | None, ratio: tuple[float, float]) -> None:
    """Fill in a random box; zeros if there is none."""
    if area is None:
        return
    low, high = portable_math.log(ratio[0]), portable_math.log(ratio[1])
    row["wanted"] = 1
    row["area"], row["area_extent"] = area[0], area[1] - area[0]
    row["ratio_low"], row["ratio_high"] = ratio
    row["log_ratio"], row["log_ratio_extent"] = low, high - low

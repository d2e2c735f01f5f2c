"""Decoders: encoded bytes to uint8 RGB pixels, by DALI if available, else Pillow, or FFCV on request."""

from __future__ import annotations

import functools
import importlib
import logging
import os
from typing import TYPE_CHECKING

from pipelines.decode.base import DECODERS, DaliOptions, Decoded, DecodeOptions, Decoder, DecoderName
from pipelines.decode.ffcv import FfcvDecoder
from pipelines.decode.limits import ImageLimits
from pipelines.decode.pillow import PillowDecoder
from pipelines.runtime import InputError, invalid
from pipelines.value_range import ValueRange

if TYPE_CHECKING:
    import torch

__all__ = [
    "DECODERS",
    "DaliOptions",
    "DecodeOptions",
    "Decoded",
    "Decoder",
    "DecoderName",
    "ImageLimits",
    "decoder_of",
    "default_threads",
    "make_decoder",
    "thread_count",
]

_log = logging.getLogger("mvssl.data")


def make_decoder(
    kind: str = "auto",
    *,
    device: str | torch.device,
    batch_size: int,
    threads: int,
    dali: DaliOptions | None = None,
    value_range: ValueRange | None = None,
    limits: ImageLimits | None = None,
) -> Decoder:
    """Make a decoder.

    Args:
        kind: "dali", "ffcv", "pillow", or "auto": DALI if it can be imported, else Pillow with one warning.
        device: of DALI's pixels; on "cuda" it decodes with nvJPEG. The others decode to the CPU.
        batch_size: maximal number of images per call.
        threads: CPU threads for decoding.
        dali: options of DALI on a GPU.
        value_range: of images with more than 8 bits; None if they use 16.
        limits: images beyond them are failures; None for the defaults.

    Raises:
        InputError: unknown kind, a number below 1, a requested library that is missing, or `dali` without a GPU.
    """
    if kind not in DECODERS:
        raise invalid("decoder", kind, f"one of {', '.join(DECODERS)}", "take auto if in doubt")
    for field, value in (("batch_size", batch_size), ("threads", threads)):
        if value < 1:
            raise invalid(f"make_decoder.{field}", value, "1 or more", "give a positive number")
    if kind == "auto":
        kind = "pillow" if _warn_if_dali_is_missing() else "dali"
    import torch  # late, as in all files that a command without images imports

    from pipelines.batch import with_index

    dali = dali or DaliOptions()
    if dali != DaliOptions() and (kind != "dali" or torch.device(device).type != "cuda"):
        raise InputError(
            f"dali is {dali} but these options apply to DALI on a GPU only, and the decoder is {kind} on {device}: "
            "leave them out, or take device cuda and decoder dali."
        )
    if kind == "pillow":
        return PillowDecoder(threads=threads, value_range=value_range, limits=limits)
    if kind == "ffcv":
        try:
            return FfcvDecoder(threads=threads, value_range=value_range, limits=limits)
        except OSError as error:
            raise InputError(
                f"decoder is 'ffcv' but FFCV's library cannot be used ({error}): run tools/install_ffcv.sh, or take "
                "decoder 'auto'."
            ) from error
    reason = missing_dali()
    if reason is not None:
        raise InputError(
            f"decoder is 'dali' but DALI cannot be used ({reason}): "
            "install nvidia-dali-cuda120 or take decoder 'pillow'."
        )
    from pipelines.decode.dali import DaliDecoder  # DALI may be missing

    return DaliDecoder(
        device=with_index(device),
        batch_size=batch_size,
        threads=threads,
        options=dali,
        value_range=value_range,
        limits=limits,
    )


def decoder_of(
    options: DecodeOptions | None,
    *,
    device: str | torch.device,
    batch_size: int,
    value_range: ValueRange | None = None,
    limits: ImageLimits | None = None,
) -> Decoder:
    """The decoder for these options (None for the defaults); raises as `make_decoder`."""
    options = options or DecodeOptions()
    return make_decoder(
        options.decoder,
        device=device,
        batch_size=batch_size,
        threads=thread_count(options),
        dali=options.dali,
        value_range=value_range,
        limits=limits,
    )


def thread_count(options: DecodeOptions | None) -> int:
    """CPU threads by these options (None for the defaults)."""
    return default_threads() if options is None or options.threads is None else options.threads


def default_threads() -> int:
    """CPU threads for decoding: this process's cores divided among torchrun's processes on the host, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(16, share))


def missing_dali() -> str | None:
    """Why DALI cannot be imported, or None."""
    try:
        importlib.import_module("pipelines.decode.dali")
    except (ImportError, OSError, RuntimeError) as error:  # also if a shared library does not load
        return str(error) or type(error).__name__
    return None


@functools.cache
def _warn_if_dali_is_missing() -> bool:
    """Whether DALI is missing, with one warning per process."""
    reason = missing_dali()
    if reason is not None:
        _log.warning("DALI cannot be used (%s): decoding with Pillow, about half as fast or less.", reason)
    return reason is not None

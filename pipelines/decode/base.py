"""What a decoder is: encoded images in, packed RGB pixels and the reasons of the failures out.

Who decodes, and what can be set of it.

Images of one call that were decoded in several ways, put back into the order of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from pipelines.runtime import InputError, invalid

DecoderName = Literal["auto", "dali", "ffcv", "pillow"]
DECODERS: tuple[DecoderName, ...] = get_args(DecoderName)


@dataclass(frozen=True, kw_only=True)
class DaliOptions:
    """How DALI uses the JPEG decoder in hardware (A100, H100 and the like); refused where DALI decodes on the CPU.

    The hardware decoder and nvJPEG's kernels round differently, and one may take a damaged JPEG that the other refuses
    (seen on an H100). So by default the kernels take all: what becomes of an image then depends on that image alone.

    Attributes:
        hw_decoder_load: share of the JPEGs of a batch that the hardware decoder takes, in [0, 1]; the GPU's kernels and
            the CPU threads take the others. 0 leaves it out. Between 0 and 1 an image's pixels, and whether a damaged
            one is replaced, may depend on the batch it is in.
        preallocate_width_hint: width in pixels of the images that the hardware decoder makes room for at its start; 0
            for none. With a hint as large as the largest image it never has to make room again.
        preallocate_height_hint: the same for the height; both or none.
    """

    hw_decoder_load: float = 0.0
    preallocate_width_hint: int = 0
    preallocate_height_hint: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.hw_decoder_load <= 1:
            raise invalid(
                "DaliOptions.hw_decoder_load", self.hw_decoder_load, "in [0, 1]", "give a share, 0 if in doubt"
            )
        for name in ("preallocate_width_hint", "preallocate_height_hint"):
            if getattr(self, name) < 0:
                raise invalid(f"DaliOptions.{name}", getattr(self, name), "0 or more pixels", "give 0 for no hint")
        if (self.preallocate_width_hint == 0) != (self.preallocate_height_hint == 0):
            raise InputError(
                f"DaliOptions.preallocate_width_hint is {self.preallocate_width_hint} and preallocate_height_hint is "
                f"{self.preallocate_height_hint} but both or none must be 0: give the width and the height."
            )


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Who decodes.

    Attributes:
        decoder: auto takes DALI where it is installed, else Pillow.
        threads: CPU threads that decode; None chooses from the machine's cores (`default_threads`).
        dali: of DALI where it decodes on a GPU.
    """

    decoder: DecoderName = "auto"
    threads: int | None = None
    dali: DaliOptions = field(default_factory=DaliOptions)

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise invalid("decoder", self.decoder, f"one of {', '.join(DECODERS)}", "take auto if in doubt")
        if self.threads is not None and self.threads < 1:
            raise invalid("threads", self.threads, "1 or more", "give a positive number, or leave it out")


# An image of more pixels is a failure and not memory gone: Pillow's own limit, a third of 2**30 bytes of RGB / 4.
MAX_PIXELS = 89_478_485


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The images of one call that could be decoded, in the order they were given.

    Attributes:
        pixels: uint8 [sum of 3 * height * width], RGB rows one behind the other, on the decoder's device.
        sizes: int64 [M, 2] on the CPU, (height, width) of each decoded image.
        failures: position in the call -> reason, for the images that are absent from `pixels` and `sizes`.
    """

    pixels: Tensor
    sizes: Tensor
    failures: Mapping[int, str]


class Decoder(Protocol):
    """Decodes images to 8-bit RGB: the same pixels whichever decoder is used on the CPU.

    Gray and palette images become RGB, CMYK is converted, alpha is dropped, 16-bit values keep their high byte, the
    EXIF orientation is applied, of several frames the first is taken. Empty, truncated, undecodable and gigantic
    (`MAX_PIXELS`) files are failures with a reason; none is an exception. What becomes of an image does not depend on
    the others of the call. A JPEG that is damaged inside but complete decodes with its damage, as with libjpeg; a few
    of those pass with DALI and fail with Pillow.
    """

    @property
    def name(self) -> str:
        """ "dali-cpu", "dali-mixed", "ffcv" or "pillow"."""

    def __call__(self, encoded: Sequence[np.ndarray]) -> Decoded:
        """Decode N images, each uint8 [bytes]; called from one thread at a time.

        With "dali-mixed" the pixels are ready on torch's current CUDA stream, and `encoded` must live until then.

        Raises:
            InputError: the decoder itself fails, for example without memory, or the call is too large for it.
        """

    def close(self) -> None:
        """Give threads and memory back; decoded pixels stay valid."""


Part = tuple[Sequence[int], Tensor, Tensor]
"""Images decoded together: positions in the call, pixels uint8 (packed), sizes int64 [n, 2]."""


def completed(
    parts: Sequence[Part],
    encoded: Sequence[np.ndarray],
    *,
    pillow: Callable[[Sequence[np.ndarray]], Decoded],
    upload: Callable[[Tensor], Tensor] = lambda pixels: pixels,
) -> Decoded:
    """All images of a call: those of `parts`, and the others as Pillow decodes them, whose rules are ours.

    Args:
        parts: what is decoded, in the order of the call each.
        encoded: the whole call, N images uint8 [bytes].
        pillow: decodes the rest.
        upload: brings its pixels to where those of the parts lie.
    """
    done = {n for positions, _, _ in parts for n in positions}
    if len(parts) == 1 and len(done) == len(encoded):
        return Decoded(pixels=parts[0][1], sizes=parts[0][2], failures={})
    odd = [n for n in range(len(encoded)) if n not in done]
    slow = pillow([encoded[n] for n in odd])
    failures = {odd[n]: reason for n, reason in slow.failures.items()}
    return _merged([*parts, ([n for n in odd if n not in failures], upload(slow.pixels), slow.sizes)], failures)


def _merged(parts: Sequence[Part], failures: Mapping[int, str]) -> Decoded:
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for positions, pixels, sizes in parts:
        lengths: list[int] = (sizes.prod(dim=1) * 3).tolist()
        found.update(zip(positions, zip(torch.split(pixels, lengths), sizes, strict=True), strict=True))
    if not found:
        return Decoded(pixels=parts[-1][1], sizes=parts[-1][2], failures=failures)
    order = sorted(found)
    return Decoded(
        pixels=torch.cat([found[n][0] for n in order]),
        sizes=torch.stack([found[n][1] for n in order]),
        failures=failures,
    )

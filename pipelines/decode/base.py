"""The decoder protocol, decoder options, and merging of images decoded in several ways."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, get_args

import numpy as np

from pipelines.runtime import InputError, invalid

if TYPE_CHECKING:
    from torch import Tensor

MOST_THREADS = 1024  # above all machines


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The decoded images of one call, in order.

    Attributes:
        pixels: uint8 [sum of 3 * height * width], packed RGB, on the decoder's device.
        sizes: int64 [M, 2] on the CPU, (height, width) of each decoded image.
        failures: position in the call -> reason, for the images that are missing.
    """

    pixels: Tensor
    sizes: Tensor
    failures: Mapping[int, str]


class Decoder(Protocol):
    """Decodes images to 8-bit RGB; on the CPU all decoders give the same pixels.

    Gray and palette images become RGB, CMYK is converted, alpha is dropped, values of more than 8 bits are scaled by
    their range (16-bit values that use all bits need none and keep their high byte), the orientation is that of
    Pillow's `exif_transpose`, and the first of several frames is taken. Empty, truncated and undecodable files, and
    those beyond the limits, are failures with a reason, not exceptions. The result for an image does not depend on the
    others of the call. A JPEG that is damaged inside but complete decodes with its damage, as with libjpeg; some of
    those pass with DALI, which complains on standard error, and fail with Pillow, which is silent: `find_damage` tells
    which images go to Pillow with every decoder.
    """

    @property
    def name(self) -> str:
        """ "dali-cpu", "dali-mixed", "ffcv" or "pillow"."""

    def __call__(self, encoded: Sequence[np.ndarray], by_pillow: Collection[int] = ()) -> Decoded:
        """Decode N images, each uint8 [bytes]; called from one thread at a time.

        With "dali-mixed" the pixels are ready on torch's current CUDA stream, and `encoded` must live until then.

        Args:
            encoded: the images.
            by_pillow: positions of images that Pillow decodes, as those that are known to be damaged.

        Raises:
            InputError: the decoder itself fails, for example by lack of memory, or the call is too large.
        """

    def close(self) -> None:
        """Free threads and memory; decoded pixels stay valid."""


DecoderName = Literal["auto", "dali", "ffcv", "pillow"]
DECODERS: tuple[DecoderName, ...] = get_args(DecoderName)


@dataclass(frozen=True, kw_only=True)
class DaliOptions:
    """DALI's use of the JPEG hardware decoder (A100, H100 and the like); not for DALI on the CPU.

    The hardware decoder and nvJPEG's kernels round differently, and one may decode a damaged JPEG that the other
    refuses (seen on an H100). By default the kernels decode everything, so that each result depends on that image
    alone.

    Attributes:
        hw_decoder_load: fraction of a batch's JPEGs for the hardware decoder, in [0, 1]; GPU kernels and CPU threads
            decode the others. Between 0 and 1 an image's pixels, and whether a damaged one is replaced, may depend on
            its batch.
        preallocate_width_hint: width in pixels of the images for which the hardware decoder allocates memory at start;
            0 for none. With the largest image as hint it never has to reallocate.
        preallocate_height_hint: the same for the height; both or none.
    """

    hw_decoder_load: float = 0.0
    preallocate_width_hint: int = 0
    preallocate_height_hint: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.hw_decoder_load <= 1:
            raise invalid(
                "DaliOptions.hw_decoder_load", self.hw_decoder_load, "in [0, 1]", "give a fraction, 0 if in doubt"
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
    """Decoder options.

    Attributes:
        decoder: auto takes DALI if it is installed, else Pillow.
        threads: CPU threads for decoding; None chooses by the cores (`default_threads`).
        dali: options of DALI on a GPU.
    """

    decoder: DecoderName = "auto"
    threads: int | None = None
    dali: DaliOptions = field(default_factory=DaliOptions)

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise invalid("decoder", self.decoder, f"one of {', '.join(DECODERS)}", "take auto if in doubt")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise invalid("threads", self.threads, f"1 to {MOST_THREADS}", "give a positive number, or leave it out")


DecodedPart: TypeAlias = "tuple[Sequence[int], Tensor, Tensor]"
"""Images decoded together: positions in the call, pixels uint8 (packed), sizes int64 [n, 2]."""


def completed_by_pillow(
    parts: Sequence[DecodedPart],
    encoded: Sequence[np.ndarray],
    *,
    pillow: Callable[[Sequence[np.ndarray]], Decoded],
    upload: Callable[[Tensor], Tensor] = lambda pixels: pixels,
) -> Decoded:
    """All images of a call: those of `parts`, and the others decoded by Pillow, the reference for odd encodings.

    Args:
        parts: decoded images, each part in the order of the call.
        encoded: the whole call, N images uint8 [bytes].
        pillow: decodes the rest.
        upload: copies Pillow's pixels to the device of the parts.
    """
    done = {n for positions, _, _ in parts for n in positions}
    if len(parts) == 1 and len(done) == len(encoded):
        return Decoded(pixels=parts[0][1], sizes=parts[0][2], failures={})
    odd = [n for n in range(len(encoded)) if n not in done]
    slow = pillow([encoded[n] for n in odd])
    failures = {odd[n]: reason for n, reason in slow.failures.items()}
    return _merged([*parts, ([n for n in odd if n not in failures], upload(slow.pixels), slow.sizes)], failures)


def _merged(parts: Sequence[DecodedPart], failures: Mapping[int, str]) -> Decoded:
    import torch  # not for a command that decodes nothing

    found: dict[int, tuple[Tensor, Tensor]] = {}
    for positions, pixels, sizes in parts:
        lengths: list[int] = (sizes.prod(dim=1) * 3).tolist()
        found.update(zip(positions, zip(torch.split(pixels, lengths), sizes, strict=True), strict=True))
    if not found:
        return Decoded(pixels=parts[-1][1], sizes=parts[-1][2], failures=failures)
    order = sorted(found)
    images = [found[n][0] for n in order]
    on_cpu = images[0].device.type == "cpu"  # numpy copies in this thread and into huge pages; torch's team would spin
    return Decoded(
        pixels=torch.from_numpy(np.concatenate([each.numpy() for each in images])) if on_cpu else torch.cat(images),
        sizes=torch.stack([found[n][1] for n in order]),
        failures=failures,
    )

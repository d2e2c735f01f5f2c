"""What a decoder is: encoded images in, packed RGB pixels and the reasons of the failures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

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

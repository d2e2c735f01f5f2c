"""Who decodes, and what can be set of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from pipelines.errors import InputError, invalid

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

"""Where and how an evaluation computes features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.decode import DecodeOptions, DecoderName
from pipelines.errors import invalid


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Where and how features are computed.

    Attributes:
        device: auto takes CUDA where there is one.
        decoder: auto takes DALI where it is installed.
        threads: threads that decode.
        precision: number format of the backbone; auto is bf16 on CUDA and fp32 on the CPU.
        extract_batch: images the backbone takes at a time.
    """

    device: str = "auto"
    decoder: DecoderName = "auto"
    threads: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    extract_batch: int = 256

    def __post_init__(self) -> None:
        if self.extract_batch < 1:
            raise invalid("extract_batch", self.extract_batch, "at least 1", "give a positive number")
        if self.threads is not None and self.threads < 1:
            raise invalid("threads", self.threads, "at least 1", "give a positive number")

    @property
    def decode(self) -> DecodeOptions:
        """Who decodes."""
        return DecodeOptions(decoder=self.decoder, threads=self.threads)

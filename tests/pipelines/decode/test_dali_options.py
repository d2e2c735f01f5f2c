"""DALI's options: what is refused, that they reach DALI, and how far the GPU's pixels are from the CPU's."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from pipelines.decode import DaliOptions, make_decoder
from pipelines.runtime import InputError
from tests.samples.decode_samples import encode, needs_dali, picture

MEAN, MOST = 0.5, 4
"""Bar in 1/255 between nvJPEG and libjpeg: both round the inverse transform and the colours, each in its own way."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hw_decoder_load": -0.1}, r"hw_decoder_load is -0\.1 but must be in \[0, 1\]"),
        ({"hw_decoder_load": 65}, r"hw_decoder_load is 65 but must be in \[0, 1\]: give a fraction"),
        ({"hw_decoder_load": float("nan")}, r"hw_decoder_load is nan but must be in \[0, 1\]"),
        ({"preallocate_width_hint": -1}, "preallocate_width_hint is -1 but must be 0 or more pixels"),
        ({"preallocate_height_hint": 500}, "preallocate_height_hint is 500 but both or none must be 0"),
    ],
)
def test_what_dali_cannot_take_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DaliOptions(**change)


@pytest.mark.parametrize("kind", [pytest.param("dali", marks=needs_dali), "pillow"])
def test_options_are_refused_where_no_gpu_decodes(kind: str) -> None:
    make_decoder(kind, device="cpu", batch_size=2, threads=1, dali=DaliOptions()).close()
    with pytest.raises(InputError, match=rf"hw_decoder_load=0\.9.*the decoder is {kind} on cpu: leave them out"):
        make_decoder(kind, device="cpu", batch_size=2, threads=1, dali=DaliOptions(hw_decoder_load=0.9))


@needs_dali
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_options_reach_dalis_decoder_on_a_gpu_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dali = MagicMock()
    monkeypatch.setattr("pipelines.decode.dali.dali", dali)
    options = DaliOptions(hw_decoder_load=0.9, preallocate_width_hint=800, preallocate_height_hint=600)
    make_decoder("dali", device=device, batch_size=2, threads=1, dali=options if device != "cpu" else None).close()
    given = dali.fn.decoders.image.call_args.kwargs
    values = {name: given.get(name) for name in (field.name for field in fields(DaliOptions))}
    assert given["device"] == ("cpu" if device == "cpu" else "mixed")
    assert set(values.values()) == ({None} if device == "cpu" else {0.9, 800, 600})


@needs_dali
def test_names_and_defaults_are_dalis() -> None:
    """But for the load, by which an image's fate would depend on its neighbours."""
    text = importlib.import_module("nvidia.dali.fn").decoders.image.__doc__
    for field in fields(DaliOptions):
        default = 0.65 if field.name == "hw_decoder_load" else field.default
        assert f"{field.name} : {type(field.default).__name__}, optional, default = `{default}`" in text
    assert DaliOptions().hw_decoder_load == 0


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_pixels_of_the_gpu_are_the_cpus_within_the_bar(load: float, capsys: pytest.CaptureFixture[str]) -> None:
    """A dozen JPEGs of photograph size: each subsampling, baseline and progressive, two qualities."""
    files = [
        encode(picture(375 + 17 * s, 500 + 13 * q, s), subsampling=s, quality=q, progressive=p)
        for s in (0, 1, 2)
        for q in (75, 95)
        for p in (False, True)
    ]
    cpu = make_decoder("dali", device="cpu", batch_size=len(files), threads=2)
    gpu = make_decoder("dali", device="cuda", batch_size=len(files), threads=2, dali=DaliOptions(hw_decoder_load=load))
    a, b = cpu(files), gpu(files)
    assert (gpu.name, a.failures, b.failures) == ("dali-mixed", {}, {})
    assert torch.equal(a.sizes, b.sizes)
    lengths = (a.sizes.prod(1) * 3).tolist()
    apart = torch.split((a.pixels.int() - b.pixels.cpu().int()).abs(), lengths)
    mean, most = max(part.float().mean().item() for part in apart), max(int(part.max()) for part in apart)
    with capsys.disabled():
        print(f"\nnvJPEG against libjpeg, hw_decoder_load {load}: mean {mean:.3f}, max {most} of 255 (worst image)")
    assert mean <= MEAN
    assert most <= MOST
    cpu.close()
    gpu.close()

"""DALI decoder: options, results that do not depend on the batch, errors of DALI itself, and pixels of the GPU."""

from __future__ import annotations

import gc
import importlib
import logging
from dataclasses import fields
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from pipelines.decode import DaliOptions, make_decoder
from pipelines.runtime import InputError
from tests.samples.decode_samples import (
    encode,
    jpegs,
    needs_dali,
    only_dalis_jpeg,
    only_pillows_jpeg,
    picture,
    refused_jpeg,
)

MEAN, MOST = 0.5, 4
"""Tolerance in 1/255 between nvJPEG and libjpeg, which round the inverse transform and the colours differently."""


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
def test_invalid_options_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DaliOptions(**change)


@pytest.mark.parametrize("kind", [pytest.param("dali", marks=needs_dali), "pillow"])
def test_gpu_options_are_refused_without_a_gpu(kind: str) -> None:
    make_decoder(kind, device="cpu", batch_size=2, threads=1, dali=DaliOptions()).close()
    with pytest.raises(InputError, match=rf"hw_decoder_load=0\.9.*the decoder is {kind} on cpu: leave them out"):
        make_decoder(kind, device="cpu", batch_size=2, threads=1, dali=DaliOptions(hw_decoder_load=0.9))


@needs_dali
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_options_reach_dali_on_a_gpu_only(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dali = MagicMock()
    monkeypatch.setattr("pipelines.decode.dali.dali", dali)
    options = DaliOptions(hw_decoder_load=0.9, preallocate_width_hint=800, preallocate_height_hint=600)
    make_decoder("dali", device=device, batch_size=2, threads=1, dali=options if device != "cpu" else None).close()
    given = dali.fn.decoders.image.call_args.kwargs
    values = {name: given.get(name) for name in (field.name for field in fields(DaliOptions))}
    assert given["device"] == ("cpu" if device == "cpu" else "mixed")
    assert set(values.values()) == ({None} if device == "cpu" else {0.9, 800, 600})


@needs_dali
def test_names_and_defaults_are_those_of_dali() -> None:
    """Except the load, with which the result for an image would depend on its batch."""
    text = importlib.import_module("nvidia.dali.fn").decoders.image.__doc__
    for field in fields(DaliOptions):
        default = 0.65 if field.name == "hw_decoder_load" else field.default
        assert f"{field.name} : {type(field.default).__name__}, optional, default = `{default}`" in text
    assert DaliOptions().hw_decoder_load == 0


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_pixels_of_the_gpu_are_within_the_tolerance(load: float, capsys: pytest.CaptureFixture[str]) -> None:
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


@needs_dali
def test_batches_keep_their_pixels_when_dali_decodes_more() -> None:
    dali = make_decoder("dali", device="cpu", batch_size=32, threads=2)
    files, rng, held = jpegs(64), np.random.default_rng(0), []
    for _ in range(24):
        chosen = rng.integers(0, 64, int(rng.integers(1, 33)))
        pixels = dali([files[n] for n in chosen]).pixels
        held.append((pixels, pixels.clone()))
    dali.close()
    del dali
    gc.collect()
    other = make_decoder("dali", device="cpu", batch_size=32, threads=2)
    other(files[:32])
    other.close()
    assert all(torch.equal(pixels, copy) for pixels, copy in held)


@needs_dali
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_result_for_an_image_does_not_depend_on_its_batch(device: str) -> None:
    dali = make_decoder("dali", device=device, batch_size=16, threads=2)
    files = [only_dalis_jpeg(), refused_jpeg(), only_pillows_jpeg(), encode(picture(9, 11), "PNG"), *jpegs(5)]
    alone = [dali([data]) for data in files]
    if device == "cpu":
        assert [n for n, decoded in enumerate(alone) if decoded.failures] == [1]
    for chosen in ([0, 1], [1, 0], [0, 2], [4, 5, 1, 6], [8, 1, 2, 0, 3, 4, 1, 7, 5, 6, 0], [1, 1, 1]):
        decoded = dali([files[n] for n in chosen])
        assert decoded.failures == {at: alone[n].failures[0] for at, n in enumerate(chosen) if alone[n].failures}
        assert torch.equal(decoded.pixels, torch.cat([alone[n].pixels for n in chosen]))
        assert torch.equal(decoded.sizes, torch.cat([alone[n].sizes for n in chosen]))
    dali.close()


class Failing:
    """A stand-in for DALI's pipeline that fails as if the GPU were out of memory."""

    def run(self, *_: object, **__: object) -> None:
        raise RuntimeError("Critical error\nencountered:\n\nout of memory\nCurrent pipeline object is no longer valid.")


@needs_dali
def test_a_failure_that_no_image_caused_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dali = make_decoder("dali", device="cpu", batch_size=8, threads=1)
    files = jpegs(5)
    want = dali(files).pixels
    monkeypatch.setattr(dali, "_pipeline", Failing())
    with caplog.at_level(logging.INFO, logger="mvssl.data"):
        assert torch.equal(dali(files).pixels, want)  # by rebuilt pipelines
        assert "DALI failed on 5 images and then decoded them in smaller parts: out of memory" in caplog.text
        caplog.clear()
        assert torch.equal(dali(files).pixels, want)
        dali([*files, refused_jpeg()])  # the caller names bad images
        assert not caplog.records
        dali([*files, only_pillows_jpeg()])
    (record,) = caplog.records
    assert record.getMessage().startswith("DALI refuses an image that Pillow decodes, which is slow: nvImageCodec")
    dali.close()


@needs_dali
@pytest.mark.parametrize("count", [1, 5])
def test_dali_failing_on_every_image_is_an_error(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    dali = make_decoder("dali", device="cpu", batch_size=8, threads=1)
    monkeypatch.setattr(dali, "_pipeline", Failing())
    monkeypatch.setattr(dali, "_build", Failing)
    with pytest.raises(InputError, match=r"valid images \(out of memory\).*--decoder pillow"):
        dali(jpegs(count))
    assert dali([refused_jpeg()]).failures  # bad with any decoder

    def lost() -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr(dali, "_build", lost)
    with pytest.raises(InputError, match=r"out of memory.*--decoder pillow"):
        dali(jpegs(count))
    dali.close()


@needs_dali
@pytest.mark.gpu
def test_pixels_of_the_gpu_are_close_to_those_of_the_cpu() -> None:
    cpu, gpu = (make_decoder("dali", device=device, batch_size=16, threads=2) for device in ("cpu", "cuda"))
    files = [*jpegs(12), encode(picture(9, 11), "PNG"), np.empty(0, np.uint8)]
    a, b = cpu(files), gpu(files)
    assert gpu.name == "dali-mixed"
    assert b.pixels.is_cuda
    assert a.failures == b.failures
    assert torch.equal(a.sizes, b.sizes)
    assert (a.pixels.int() - b.pixels.cpu().int()).abs().max() <= 4  # nvJPEG's inverse transform rounds differently
    cpu.close()
    gpu.close()

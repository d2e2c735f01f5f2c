"""A bad image costs that image: reasons by position, the others intact; DALI's own habits."""

from __future__ import annotations

import gc
import itertools
import logging
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import decode
from pipelines.decode import Decoder, default_threads, make_decoder
from pipelines.runtime import InputError
from tests.samples.decode_samples import (
    encode,
    jpegs,
    needs_dali,
    needs_ffcv_library,
    only_dalis_jpeg,
    only_pillows_jpeg,
    picture,
    refused_jpeg,
)


@pytest.fixture(
    scope="module",
    params=[pytest.param("dali", marks=needs_dali), pytest.param("ffcv", marks=needs_ffcv_library), "pillow"],
)
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    made = make_decoder(request.param, device="cpu", batch_size=64, threads=2)
    yield made
    made.close()


def bad_files() -> dict[str, np.ndarray]:
    """Part of the reason -> file."""
    jpeg, png = encode(picture(40, 50)), encode(picture(40, 50), "PNG")
    frame = jpeg.tobytes().index(b"\xff\xc0")
    giant, giant_png = jpeg.copy(), png.copy()
    giant[frame + 5 : frame + 9] = 0xF0
    giant_png[16:24] = [0, 1, 0, 0, 0, 1, 0, 0]
    return {
        "empty": np.empty(0, np.uint8),
        "the file is truncated (": jpeg[:-200],
        "truncated": jpeg[:-2],
        "truncated ": png[: len(png) // 2],
        "not an image": np.frombuffer(b"<html>404 not found</html>", np.uint8),
        "known format": jpeg[:1],
        "61680 x 61680": giant,
        "65536 x 65536": giant_png,
        "floating-point": encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
        "32-bit": encode(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"),
        "": refused_jpeg(),
    }


def test_each_bad_file_has_its_reason_and_the_others_their_pixels(decoder: Decoder) -> None:
    good, bad = jpegs(8), bad_files()
    mixed: list[np.ndarray] = []
    for n, data in enumerate(bad.values()):
        mixed += [data, good[n % 8]]
    decoded = decoder(mixed)
    assert sorted(decoded.failures) == list(range(0, 2 * len(bad), 2))
    for position, part in zip(sorted(decoded.failures), bad, strict=True):
        assert decoded.failures[position]
        assert part.strip() in decoded.failures[position]
    alone = decoder([good[n % 8] for n in range(len(bad))])
    assert alone.failures == {}
    assert torch.equal(decoded.pixels, alone.pixels)
    assert torch.equal(decoded.sizes, alone.sizes)


def test_every_truncation_is_a_failure(decoder: Decoder) -> None:
    for progressive in (False, True):
        jpeg = encode(picture(40, 50), progressive=progressive)
        cut = [jpeg[:at] for at in range(3, len(jpeg) - 1, len(jpeg) // 60)]
        assert len(decoder(cut).failures) == len(cut)


def test_nothing_decoded_is_an_empty_result(decoder: Decoder) -> None:
    for encoded in ([], [np.empty(0, np.uint8)]):
        decoded = decoder(encoded)
        assert decoded.pixels.shape == (0,)
        assert decoded.pixels.dtype == torch.uint8
        assert decoded.sizes.shape == (0, 2)
        assert list(decoded.failures) == list(range(len(encoded)))


@needs_dali
def test_odd_images_between_plain_ones_keep_their_place() -> None:
    dali, pillow = (make_decoder(kind, device="cpu", batch_size=64, threads=2) for kind in ("dali", "pillow"))
    files = jpegs(6)
    files[1] = encode(picture(9, 11), "PNG")
    files[4] = encode(Image.fromarray(picture(12, 7)).convert("CMYK"))
    files[5] = encode(picture(10, 10), keep_rgb=True)  # RGB inside a JPEG
    a, b = dali(files), pillow(files)
    assert torch.equal(a.sizes, b.sizes)
    assert torch.equal(a.pixels, b.pixels)
    dali.close()
    pillow.close()


@needs_dali
def test_held_batches_keep_their_pixels_whatever_dali_does_next() -> None:
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


def test_read_only_views_of_a_larger_buffer_are_decoded(decoder: Decoder) -> None:
    files = jpegs(4)
    blob = np.frombuffer(b"x" + b"".join(data.tobytes() for data in files), np.uint8)
    ends = np.cumsum([1] + [len(data) for data in files])
    views = [blob[a:b] for a, b in itertools.pairwise(ends)]
    assert not views[0].flags.writeable
    assert torch.equal(decoder(views).pixels, decoder(files).pixels)


@needs_dali
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_becomes_of_an_image_does_not_depend_on_its_neighbours(device: str) -> None:
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
    """Stands in for DALI's pipeline: fails like one whose device has no memory left."""

    def run(self, *_: object, **__: object) -> None:
        raise RuntimeError("Critical error\nencountered:\n\nout of memory\nCurrent pipeline object is no longer valid.")


@needs_dali
def test_a_failure_that_no_image_is_to_blame_for_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dali = make_decoder("dali", device="cpu", batch_size=8, threads=1)
    files = jpegs(5)
    want = dali(files).pixels
    monkeypatch.setattr(dali, "_pipeline", Failing())
    with caplog.at_level(logging.INFO, logger="mvssl.data"):
        assert torch.equal(dali(files).pixels, want)  # by pipelines built anew
        assert "DALI failed on 5 images and then decoded them in smaller parts: out of memory" in caplog.text
        caplog.clear()
        assert torch.equal(dali(files).pixels, want)
        dali([*files, refused_jpeg()])  # a bad image is the caller's to name
        assert not caplog.records
        dali([*files, only_pillows_jpeg()])
    (record,) = caplog.records
    assert record.getMessage().startswith("DALI refuses an image that Pillow decodes, which is slow: nvImageCodec")
    dali.close()


@needs_dali
@pytest.mark.parametrize("count", [1, 5])
def test_where_dali_fails_on_every_image_it_is_not_the_images(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    dali = make_decoder("dali", device="cpu", batch_size=8, threads=1)
    monkeypatch.setattr(dali, "_pipeline", Failing())
    monkeypatch.setattr(dali, "_build", Failing)
    with pytest.raises(InputError, match=r"valid images \(out of memory\).*--decoder pillow"):
        dali(jpegs(count))
    assert dali([refused_jpeg()]).failures  # whoever decodes it, it is bad

    def lost() -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr(dali, "_build", lost)
    with pytest.raises(InputError, match=r"out of memory.*--decoder pillow"):
        dali(jpegs(count))
    dali.close()


def test_without_dali_pillow_decodes_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "pipelines.decode.dali", raising=False)
    decode._warn_if_dali_is_missing.cache_clear()
    with caplog.at_level(logging.WARNING, logger="mvssl.data"):
        for _ in range(3):
            made = make_decoder("auto", device="cpu", batch_size=4, threads=1)
            assert made.name == "pillow"
            made.close()
    decode._warn_if_dali_is_missing.cache_clear()
    assert [record.getMessage().startswith("DALI cannot be used") for record in caplog.records] == [True]
    with pytest.raises(InputError, match="install nvidia-dali-cuda120"):
        make_decoder("dali", device="cpu", batch_size=4, threads=1)


@needs_dali
def test_with_dali_auto_takes_it() -> None:
    made = make_decoder("auto", device="cpu", batch_size=4, threads=1)
    assert made.name == "dali-cpu"
    with pytest.raises(InputError, match="at most 4 images"):
        made(jpegs(5))
    made.close()


@pytest.mark.parametrize(("field", "value"), [("kind", "turbo"), ("batch_size", 0), ("threads", 0)])
def test_wrong_arguments_are_named(field: str, value: object) -> None:
    arguments: dict[str, Any] = {"kind": "auto", "device": "cpu", "batch_size": 4, "threads": 1, field: value}
    with pytest.raises(InputError, match="decoder is 'turbo'" if field == "kind" else field):
        make_decoder(**arguments)


def test_default_threads_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert default_threads() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_threads() == 8
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert default_threads() == 1


@needs_dali
@pytest.mark.gpu
def test_decoding_on_the_gpu_gives_the_cpus_pixels_almost() -> None:
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

"""Bad images are failures by position with a reason, and the others are unaffected; choice of the decoder."""

from __future__ import annotations

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


def test_no_decodable_image_gives_an_empty_result(decoder: Decoder) -> None:
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


def test_read_only_views_of_a_larger_buffer_are_decoded(decoder: Decoder) -> None:
    files = jpegs(4)
    blob = np.frombuffer(b"x" + b"".join(data.tobytes() for data in files), np.uint8)
    ends = np.cumsum([1] + [len(data) for data in files])
    views = [blob[a:b] for a, b in itertools.pairwise(ends)]
    assert not views[0].flags.writeable
    assert torch.equal(decoder(views).pixels, decoder(files).pixels)


def test_without_dali_pillow_decodes_with_one_warning(
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
def test_auto_takes_dali_if_it_is_installed() -> None:
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


def test_default_threads_are_divided_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert default_threads() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_threads() == 8
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert default_threads() == 1

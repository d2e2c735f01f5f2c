"""Limits on bytes, pixels, scans and frames: named when met, raised by an option, the same with every decoder."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from pipelines.conversion.command import Convert, convert
from pipelines.decode import ImageLimits, make_decoder
from pipelines.decode.damage import find_damage
from pipelines.decode.pillow import decode_one
from pipelines.loading.deep_images import state_value_range
from pipelines.loading.fetch import Fetcher
from pipelines.runtime import InputError
from pipelines.storage import open_source
from tests.samples.decode_samples import encode, needs_dali, needs_ffcv_library, picture
from tests.samples.hostile_images import (
    animated,
    chunk,
    gray_jpeg,
    layered_jpeg2000,
    overlapping_tags,
    png_with,
    tiff_of,
    tiff_pages,
)

DECODERS = [pytest.param("dali", marks=needs_dali), pytest.param("ffcv", marks=needs_ffcv_library), "pillow"]


def reason(data: bytes, limits: ImageLimits | None = None) -> str:
    """Why an image is not decoded; "" if it is."""
    decoded = decode_one(np.frombuffer(data, np.uint8), limits=limits or ImageLimits())
    return decoded if isinstance(decoded, str) else ""


SCANS = "its 101 scans are more than the allowed 100: encode it again with fewer, or raise --limits.scans"
ANIMATIONS = [kind for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF") if kind != "AVIF" or features.check("avif")]


@pytest.mark.parametrize("progressive", [True, False])
def test_scans(progressive: bool) -> None:
    assert reason(gray_jpeg(64, 80, scans=101, progressive=progressive)) == SCANS
    assert reason(gray_jpeg(64, 80, scans=101), ImageLimits(scans=101)) == ""
    assert reason(gray_jpeg(64, 80, scans=100)) == ""
    assert "scans" not in reason(gray_jpeg(64, 80, scans=100, progressive=progressive))


def test_scans_of_thumbnails_and_of_images_behind_do_not_count() -> None:
    many, own = gray_jpeg(64, 80, scans=90), gray_jpeg(64, 80, scans=20)
    thumbnail = own[:2] + b"\xff\xe1" + (len(many) + 2).to_bytes(2, "big") + many + own[2:]
    assert reason(thumbnail) == ""
    assert reason(own + many) == ""


def test_scans_cannot_be_hidden() -> None:
    """Behind what looks like an end, like a long segment, or like no marker."""
    data = gray_jpeg(64, 80, scans=101)
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    for hidden in (
        data[:2] + b"\xff\xd6" + data[2:],
        data[:2] + b"\xff\x01" + data[2:],
        data[:2] + b"garbage" + data[2:],
        data[:2] + b"\xff\xff\xff" + data[2:],
        data[:2] + b"\xff\xd8" + data[2:],
        data[:second] + b"\xff\xe1\x00\x06\xff\xd9\xff\xd9" + data[second:],
        data[:second] + b"garbage" + data[second:],
    ):
        assert "scans" in reason(hidden) or "broken" in reason(hidden)
        assert "scans" in reason(hidden + gray_jpeg(64, 80, scans=1)) or "broken" in reason(hidden)


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_obeys(decoder: str) -> None:
    plain = encode(picture(40, 50), quality=90)
    files = [
        np.frombuffer(gray_jpeg(32, 40, scans=101), np.uint8),
        plain,
        encode(picture(41, 50)),
        encode(picture(40, 50), quality=100),
        encode(picture(40, 50), progressive=True),
    ]
    limits = ImageLimits(pixels=2000, bytes=plain.size)
    assert plain.size >= files[0].size
    assert plain.size < files[3].size
    made = make_decoder(decoder, device="cpu", batch_size=8, threads=1, limits=limits)
    decoded = made(files)
    made.close()
    assert decoded.failures == {
        0: SCANS,
        2: "50 x 41 pixels are more than the allowed 2,000: make it smaller with mvssl-convert --max-size, or raise "
        "--limits.pixels",
        3: f"its {files[3].size:,} bytes are more than the allowed {plain.size:,}: make it smaller, or raise "
        "--limits.bytes",
    }
    assert decoded.sizes.tolist() == [[40, 50], [40, 50]]


@pytest.mark.parametrize("kind", ANIMATIONS)
def test_frames(kind: str) -> None:
    data = animated(kind, 6)
    text = reason(data, ImageLimits(frames=5))
    assert text.startswith("its 6 frames or more are above the allowed 5: ")
    assert text.endswith("or raise --limits.frames")
    assert reason(data, ImageLimits(frames=6)) == ""
    assert reason(data) == ""


@pytest.mark.parametrize("kind", ANIMATIONS)
def test_only_the_first_frame_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pixels, and by counting what Pillow decodes."""
    data = animated(kind, 6)
    with Image.open(io.BytesIO(data)) as image:
        first = np.asarray(image.convert("RGB"))
    frames = 0
    for name in ("GifImagePlugin.GifImageFile", "PngImagePlugin.PngImageFile", "TiffImagePlugin.TiffImageFile"):
        module, cls = name.split(".")
        monkeypatch.setattr(getattr(sys.modules[f"PIL.{module}"], cls), "seek", None)
    if kind == "WEBP":
        plugin = sys.modules["PIL.WebPImagePlugin"].WebPImageFile
        following = plugin._get_next

        def counted(image: Any) -> Any:
            nonlocal frames
            frames += 1
            return following(image)

        monkeypatch.setattr(plugin, "_get_next", counted)
    assert np.array_equal(decode_one(np.frombuffer(data, np.uint8)), first)
    assert frames == (kind == "WEBP")


def _ztxt(size: int) -> bytes:
    return chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(size), 9))


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a WebP canvas of 16,384 x 16,384": (
        lambda: b"RIFF\x40\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0" + bytes(40),
        "16384 x 16384 pixels are more than the allowed ",
    ),
    "65,000 pages": (lambda: tiff_pages(65_000), "its 10,001 frames or more are above the allowed 10,000: "),
    "tags that overlap": (lambda: overlapping_tags(2000), r"its tags claim [\d,]+ bytes but the file has "),
    "a text that unpacks to 4 MB": (lambda: png_with(_ztxt(1 << 22)), "its text or colour profile unpacks to more"),
    "a profile that unpacks to 40 MB": (
        lambda: png_with(chunk(b"iCCP", b"bomb\0\0" + zlib.compress(bytes(40_000_000), 9))),
        "its text or colour profile unpacks to more",
    ),
    "empty chunks": (lambda: png_with(chunk(b"tEXt", b"") * 100_001), "it has more than the allowed 100,000 chunks"),
    "fill bytes": (
        lambda: encode(picture(8, 8)).tobytes()[:2] + b"\xff" * 30_000 + encode(picture(8, 8)).tobytes()[2:],
        "its header has more than the allowed 20,000 segments",
    ),
    "EXIF in many segments": (
        lambda: b"\xff\xd8" + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * 300 + encode(picture(8, 8)).tobytes()[2:],
        r"its EXIF data have [\d,]+ bytes, more than the allowed 16,777,216",
    ),
    "a comment": (lambda: b"P6 #" + b"x" * (1 << 17) + b"\n1 1 255 abc", "its header has more than the allowed 65,536"),
    "quality layers": (lambda: layered_jpeg2000(65_535), "its 65,535 quality layers are more than the allowed 100: "),
    "one row": (lambda: b"P5 2000000 1 255 " + bytes(2_000_000), "2000000 x 1 pixels have a side of more than the all"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_their_header(name: str) -> None:
    make, words = HOSTILE[name]
    assert re.match(words, reason(make())), reason(make())


def test_what_is_not_hostile_is_decoded() -> None:
    first = 8 + len(tiff_of(b"")) - 8
    assert reason(tiff_of(b"", next_page=8)) == ""  # a page that follows itself
    assert reason(tiff_of(b"", next_page=first, rest=tiff_of(b"", next_page=8)[8:])) == ""  # two that do
    assert reason(png_with(_ztxt(1 << 19))) == ""
    assert reason(png_with(chunk(b"tEXt", b"") * 1000)) == ""
    assert reason(encode(picture(8, 8), icc_profile=bytes(2_000_000)).tobytes()) == ""
    assert reason(encode(picture(40, 50), "JPEG2000").tobytes()) == ""
    assert reason(encode(picture(40, 50), "WEBP", lossless=True).tobytes()) == ""
    assert reason(encode(picture(40, 50), progressive=True).tobytes()) == ""


@pytest.mark.parametrize("field", ["bytes", "pixels", "scans", "frames"])
def test_limits_are_positive(field: str) -> None:
    with pytest.raises(InputError, match=rf"limits\.{field} is 0 but must be at least 1 and at most"):
        ImageLimits(**{field: 0})


on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
PEAK = """
import sys
import numpy as np
from pipelines.decode.damage import find_damage
from pipelines.decode.pillow import decode_one
data = np.fromfile(sys.argv[1], np.uint8)
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
find_damage([data[:4]])
before = peak()
find_damage([data])
decoded = decode_one(data)
print(decoded if isinstance(decoded, str) else decoded.shape)
print(peak() - before)
"""


def peak(data: bytes, folder: Path) -> tuple[str, int]:
    """What examining and decoding give, and the peak of their memory in bytes, in a process of its own."""
    (folder / "image").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder / "image")], capture_output=True, text=True, check=True, timeout=600
    )
    said, memory = done.stdout.splitlines()
    return said, int(memory)


@on_linux
def test_500_scans_of_9400_x_9400_take_no_memory(tmp_path: Path) -> None:
    said, memory = peak(gray_jpeg(9400, 9400, scans=500), tmp_path)
    assert said == SCANS.replace("101", "500")
    assert memory < 2e8  # of the examination, 8 bytes a block; a decoder needs 700 MB and more


@on_linux
def test_a_large_animation_takes_the_memory_of_its_first_frame(tmp_path: Path) -> None:
    size = (1500, 2000)
    data = animated("WEBP", 8, size)
    said, memory = peak(data, tmp_path)
    assert said == "(1500, 2000, 3)"
    assert memory < 20 * size[0] * size[1] + len(data) + 2e7  # 8 frames of 3 bytes a pixel have 24


def test_the_limits_of_a_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Reading, decoding and converting obey the limits that were stated for the data."""
    (tmp_path / "images").mkdir()
    files = {"a.jpg": encode(picture(40, 50)), "b.jpg": encode(picture(40, 60)), "c.png": encode(picture(9, 9), "PNG")}
    for name, data in files.items():
        (tmp_path / "images" / name).write_bytes(data.tobytes())
    for limits, bad in (
        (ImageLimits(), {}),
        (ImageLimits(pixels=2000), {1: "60 x 40 pixels"}),
        (ImageLimits(bytes=files["c.png"].size), {0: "its ", 1: "its "}),
    ):
        source = open_source(tmp_path / "images")
        state_value_range(source, None, limits=limits)
        made = make_decoder("pillow", device="cpu", batch_size=3, threads=1, limits=limits)
        fetcher = Fetcher(source, made)
        with caplog.at_level(logging.WARNING):
            failures = fetcher(range(3)).failures
        fetcher.close()
        assert {n: text.startswith(bad[n]) for n, text in failures.items()} == dict.fromkeys(bad, True)
        name = f"{limits.pixels} {limits.bytes}"
        convert(Convert(src=tmp_path / "images", dst=tmp_path / name, limits=limits))
        lines = (tmp_path / name / "quarantine.jsonl").read_text().splitlines()
        assert [json.loads(line)["reason"] for line in lines] == list(failures.values())


def test_the_examination_ends_at_the_limit() -> None:
    assert list(find_damage([np.frombuffer(gray_jpeg(64, 80, scans=101), np.uint8)])) == [0]
    assert find_damage([np.frombuffer(gray_jpeg(64, 80, scans=3), np.uint8)]) == {}

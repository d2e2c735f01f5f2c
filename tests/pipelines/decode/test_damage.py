"""Damage in images that decode nevertheless: found where it is, not where it is not, and wherever libjpeg warns."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.decode import damage
from pipelines.decode.damage import ODD, can_find_damage, find_damage
from pipelines.decode.ffcv import load_ffcv
from pipelines.decode.pillow import decode_one
from tests.samples.decode_samples import encode, jpegs, needs_ffcv_library, picture, with_orientation

pytestmark = pytest.mark.skipif(not can_find_damage(), reason="no C compiler")

END = b"\xff\xd9"
SIZE = (75, 93)
KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "progressive with restart markers": {"progressive": True, "restart_marker_rows": 1},
}


def found(data: bytes) -> str | None:
    return find_damage([np.frombuffer(data, np.uint8)]).get(0)


def scan_of(data: bytes) -> int:
    """Where the data of the first scan begin."""
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")


def intact() -> dict[str, bytes]:
    image = Image.fromarray(picture(*SIZE))
    files = {
        f"{name}, {mode}, subsampling {s}": encode(
            image.convert(mode), subsampling=s, optimize=s == 1, **kind
        ).tobytes()
        for name, kind in KINDS.items()
        for mode in ("RGB", "L", "CMYK")
        for s in (0, 1, 2)
    }
    plain = files["baseline, RGB, subsampling 2"]
    files["thumbnail"] = plain[:2] + b"\xff\xe1\0\xff" + bytes(100) + plain[:50] + END + bytes(101) + plain[2:]
    files["orientation"] = with_orientation(np.frombuffer(plain, np.uint8), 6).tobytes()
    files["camera maker's notes behind the end"] = plain + b"notes" * 20
    files["two in one"] = plain + plain
    files["MPO"] = encode(image, "MPO", save_all=True, append_images=[image]).tobytes()
    files["one pixel"] = encode(picture(1, 1)).tobytes()
    files["PNG"] = encode(image, "PNG").tobytes()
    files["no image"] = b"<html>404</html>"
    files["empty"] = b""
    return files


@pytest.mark.parametrize("name", intact())
def test_intact_images_have_no_damage(name: str) -> None:
    assert found(intact()[name]) is None


def test_positions_are_those_of_the_call() -> None:
    files = jpegs(40)
    files[3] = files[33] = np.frombuffer(files[3].tobytes()[:-90] + END, np.uint8)
    assert list(find_damage(files, threads=3)) == [3, 33]
    assert find_damage([]) == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_jpeg_cut_short_with_an_end_marker(kind: str, share: float) -> None:
    data = encode(picture(*SIZE), **KINDS[kind]).tobytes()
    start = scan_of(data)
    cut = data[: start + int(share * (len(data) - 2 - start))].rstrip(b"\xff") + END
    text = found(cut)
    assert text is not None
    if kind == "baseline":
        assert text.startswith("its data end after ")
        done = int(text.split()[4])
        pixels, intact_pixels = (decode_one(np.frombuffer(each, np.uint8)) for each in (cut, data))
        assert abs(done - 100 * (np.asarray(pixels) == intact_pixels).all(-1).mean()) < 8
    if share > 0.1 and kind == "progressive":
        assert "scan" in text


def test_other_damage() -> None:
    baseline, restarts = (encode(picture(*SIZE), **KINDS[kind]).tobytes() for kind in ("baseline", "restart markers"))
    start = scan_of(baseline)
    second = restarts.index(b"\xff\xd1", scan_of(restarts))
    progressive = encode(picture(*SIZE), progressive=True).tobytes()
    png = encode(picture(*SIZE), "PNG").tobytes()
    wrong = bytearray(png)
    wrong[png.index(b"IEND") - 8] ^= 1  # the checksum of the last pixels
    cases = {
        "without a restart marker": (restarts[:second] + restarts[second + 2 :], ""),
        "restart markers in the wrong order": (restarts[: second + 1] + b"\xd5" + restarts[second + 2 :], "restart"),
        "without some bytes": (baseline[: start + 300] + baseline[start + 340 :], ""),
        "two copies of some bytes": (baseline[: start + 300] + baseline[start + 200 :], "surplus data"),
        "cut and followed by another": (baseline[: start + 300] + baseline, "its data end after"),
        "without the last scan": (progressive[: progressive.rindex(b"\xff\xc4")] + END, "last scans are missing"),
        "PNG with a wrong checksum": (bytes(wrong), "a checksum is wrong"),
    }
    for name, (data, words) in cases.items():
        text = found(data)
        assert text, name
        assert words in text, (name, text)


def test_padding_is_harmless() -> None:
    data = encode(picture(*SIZE)).tobytes()
    for padding in (b"\0", b"\0" * 20, b"\xff" * 3):
        assert found(data[:-2] + padding + END) in (ODD, None)
    assert found(data[:-2] + b"\0" * 20 + END) == ODD
    assert found(data[:-2] + b"abcdefghij" + END) not in (ODD, None)


def turbojpeg_warns(data: bytes) -> bool:
    """Whether libjpeg-turbo decodes with a warning; False also for files that it refuses."""
    library = load_ffcv()
    handle = ctypes.c_void_p(library.tjInitDecompress())
    encoded = np.frombuffer(data, np.uint8)
    pixels = np.empty((*SIZE, 3), np.uint8)
    code = library.tjDecompress2(
        handle,
        ctypes.c_void_p(encoded.ctypes.data),
        ctypes.c_ulong(encoded.size),
        ctypes.c_void_p(pixels.ctypes.data),
        *(ctypes.c_int(number) for number in (SIZE[1], 3 * SIZE[1], SIZE[0], 0, 0)),
    )
    warns = code != 0 and library.tjGetErrorCode(handle) == 0
    library.tjDestroy(handle)
    return bool(warns)


@needs_ffcv_library
@pytest.mark.parametrize("kind", KINDS)
def test_what_libjpeg_warns_of_is_found(kind: str) -> None:
    """Hundreds of random cuts, flips, losses and insertions inside the data."""
    data = encode(picture(*SIZE), **KINDS[kind]).tobytes()
    start, rng = scan_of(data), np.random.default_rng(0)
    assert not turbojpeg_warns(data)
    warned = 0
    for n in range(240):
        at, count = int(rng.integers(start, len(data) - 3)), int(rng.integers(1, 30))
        middle = bytes([data[at] ^ 1 << int(rng.integers(8))])
        broken = {
            0: data[:at] + END,
            1: data[:at] + middle + data[at + 1 :],
            2: data[:at] + data[min(at + count, len(data) - 2) :],
            3: data[:at] + rng.integers(0, 256, count, dtype=np.uint8).tobytes() + data[at:],
        }[n % 4]
        if turbojpeg_warns(broken):
            warned += 1
            assert found(broken) is not None
    assert warned > 100


def test_without_a_compiler_one_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(damage, "load_library", lambda _: "no C compiler was found")
    damage._library.cache_clear()
    half = encode(picture(*SIZE)).tobytes()[:-200] + END
    with caplog.at_level(logging.WARNING, logger="mvssl.data"):
        assert found(half) is None
        assert not can_find_damage()
    damage._library.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "JPEGs are not examined for damage inside, because no C compiler was found; where DALI or FFCV decodes them, "
        "Pillow decodes each once, too, which tells the bad ones."
    ]

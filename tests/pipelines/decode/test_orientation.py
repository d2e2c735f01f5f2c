"""Orientation in every place where files state it, against Pillow's `exif_transpose`, on all decoders."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from pipelines.decode import Decoder, make_decoder
from pipelines.decode.sniff import sniff
from tests.samples.decode_samples import encode, needs_dali, needs_ffcv_library, picture, with_orientation

STORED = picture(24, 40)
JPEG = encode(STORED).tobytes()
SHORT, LONG, BYTE, ASCII = 3, 4, 1, 2


@pytest.fixture(
    scope="module",
    params=[pytest.param("dali", marks=needs_dali), pytest.param("ffcv", marks=needs_ffcv_library), "pillow"],
)
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    made = make_decoder(request.param, device="cpu", batch_size=64, threads=2)
    yield made
    made.close()


def decoded(decoder: Decoder, data: bytes) -> np.ndarray:
    made = decoder([np.frombuffer(data, np.uint8)])
    assert made.failures == {}
    height, width = made.sizes[0].tolist()
    return made.pixels.reshape(height, width, 3).numpy()


def by_pillow(data: bytes) -> np.ndarray:
    """The pixels that Pillow gives; as stored where its `exif_transpose` fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        except (ValueError, SyntaxError, OSError, struct.error):
            return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def tag(number: int, kind: int, count: int, value: int) -> bytes:
    """An entry of a little-endian directory."""
    return struct.pack("<HHII", number, kind, count, value)


def turned(value: int, kind: int = SHORT, count: int = 1) -> bytes:
    return tag(0x0112, kind, count, value)


def tiff(*tags: bytes, tail: bytes = b"\0\0\0\0") -> bytes:
    """A TIFF header and a directory; `tail` begins with the offset of the next one."""
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(tags) + tail


def app(payload: bytes, number: int = 1) -> bytes:
    """An APPn segment."""
    return bytes((0xFF, 0xE0 + number)) + struct.pack(">H", len(payload) + 2) + payload


def exif(*tags: bytes, tail: bytes = b"\0\0\0\0") -> bytes:
    return app(b"Exif\0\0" + tiff(*tags, tail=tail))


def xmp(value: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{value}"/></x:xmpmeta>'.encode()


def xmp_segment(value: int) -> bytes:
    return app(b"http://ns.adobe.com/xap/1.0/\0" + xmp(value))


ELSEWHERE = struct.pack("<I", 26) + struct.pack("<H", 1) + turned(6) + b"\0\0\0\0"  # a second directory, at byte 26
SEGMENTS = {
    "two EXIF segments, 6 and 1": exif(turned(6)) + exif(turned(1)),
    "two EXIF segments, 1 and 6": exif(turned(1)) + exif(turned(6)),
    "the first of two EXIF segments is empty": exif() + exif(turned(6)),
    "EXIF after ICC profile and Photoshop data": app(b"ICC_PROFILE\0\1\1" + bytes(60000), 2)
    + app(b"Photoshop 3.0\0", 13)
    + exif(turned(6)),
    "EXIF in another segment": app(b"Exif\0\0" + tiff(turned(6)), 3),
    "no orientation": exif(tag(0x0100, SHORT, 1, 5)),
    "value 0": exif(turned(0)),
    "value 9": exif(turned(9)),
    "LONG": exif(turned(6, LONG)),
    "BYTE": exif(turned(6, BYTE)),
    "two values": exif(turned(6 + 6 * 65536, SHORT, 2)),
    "no value": exif(turned(6, SHORT, 0)),
    "twice, 6 and 1": exif(turned(6), turned(1)),
    "after a tag beyond the segment": exif(tag(0x010F, ASCII, 100, 5000), turned(6)),
    "after a tag of unknown type": exif(tag(0x010F, 77, 100, 5000), turned(6)),
    "directory cut short": app((b"Exif\0\0" + tiff(turned(6)))[:-6]),
    "in the second directory only": exif(tag(0x0100, SHORT, 1, 5), tail=ELSEWHERE),
    "in the EXIF directory only": exif(tag(0x8769, LONG, 1, 26), tail=ELSEWHERE),
    "header twice": app(b"Exif\0\0Exif\0\0" + tiff(turned(6))),
    "header in capitals": app(b"EXIF\0\0" + tiff(turned(6))),
    "header with one zero byte": app(b"Exif\0" + tiff(turned(6))),
    "directory far away": app(b"Exif\0\0II*\0" + struct.pack("<I", 2**31)),
    "not a TIFF header": app(b"Exif\0\0II!\0" + tiff(turned(6))[4:]),
    "XMP only": xmp_segment(6),
    "XMP of 1": xmp_segment(1),
    "XMP as an element": app(b"http://ns.adobe.com/xap/1.0/\0<tiff:Orientation>6</tiff:Orientation>"),
    "two XMP segments": xmp_segment(6) + xmp_segment(3),
    "XMP against EXIF": xmp_segment(6) + exif(turned(8)),
    "XMP beside EXIF without orientation": exif() + xmp_segment(6),
    "XMP beside broken EXIF": app(b"Exif\0\0garbage") + xmp_segment(6),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_jpegs_are_turned_as_by_pillow(decoder: Decoder, name: str) -> None:
    scan, frame = JPEG.index(b"\xff\xda"), JPEG.index(b"\xff\xc0")
    for at in (2, 20, frame, scan):  # before JFIF's segment, after it, around the frame header
        data = JPEG[:at] + SEGMENTS[name] + JPEG[at:]
        np.testing.assert_array_equal(decoded(decoder, data), by_pillow(data), err_msg=f"at {at}")


def test_usual_jpegs_do_not_need_pillow() -> None:
    plain = [exif(tag(0x010F, ASCII, 6, 26), turned(n), tail=b"\0\0\0\0Canon\0") + xmp_segment(n) for n in range(1, 9)]
    plain += [b"", exif(), xmp_segment(1), app(bytes(1000), 2)]
    headers = [sniff(np.frombuffer(JPEG[:2] + segments + JPEG[2:], np.uint8)) for segments in plain]
    assert all(header is not None and header.plain for header in headers)
    assert [header.upright for header in headers if header] == [True] + [False] * 7 + [True] * 4
    odd = sniff(np.frombuffer(JPEG[:2] + SEGMENTS["XMP only"] + JPEG[2:], np.uint8))
    assert odd is not None
    assert not odd.plain


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG with chunks before and after the pixels."""
    data = encode(STORED, "PNG").tobytes()
    return data[:33] + before + data[33:-12] + after + data[-12:]


EXIF = tiff(turned(6))
HEX = b"\nexif\n%8d\n" % (len(EXIF) + 6) + (b"Exif\0\0" + EXIF).hex().encode() + b"\n"
PROFILE = b"Raw profile type exif\0"
CHUNKS = {
    "eXIf": chunk(b"eXIf", EXIF),
    "eXIf of 9": chunk(b"eXIf", tiff(turned(9))),
    "broken eXIf": chunk(b"eXIf", b"garbage"),
    "two eXIf": chunk(b"eXIf", EXIF) + chunk(b"eXIf", tiff(turned(3))),
    "zTXt profile": chunk(b"zTXt", PROFILE + b"\0" + zlib.compress(HEX)),
    "tEXt profile": chunk(b"tEXt", PROFILE + HEX),
    "iTXt profile": chunk(b"iTXt", PROFILE + b"\0\0\0\0" + HEX),
    "compressed iTXt profile": chunk(b"iTXt", PROFILE + b"\1\0\0\0" + zlib.compress(HEX)),
    "profile with lines": chunk(b"tEXt", PROFILE + HEX[:40] + b"\n" + HEX[40:]),
    "profile that is no number": chunk(b"tEXt", PROFILE + b"\nexif\n      4\nwxyz\n"),
    "APP1 profile": chunk(b"tEXt", b"Raw profile type APP1\0" + HEX),
    "profile against eXIf": chunk(b"tEXt", PROFILE + HEX) + chunk(b"eXIf", tiff(turned(8))),
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)),
    "XMP in tEXt": chunk(b"tEXt", b"XML:com.adobe.xmp\0" + xmp(6)),
    "XMP against eXIf": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6)) + chunk(b"eXIf", tiff(turned(3))),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_pngs_are_turned_as_by_pillow(decoder: Decoder, name: str) -> None:
    for data in (png(before=CHUNKS[name]), png(after=CHUNKS[name])):
        np.testing.assert_array_equal(decoded(decoder, data), by_pillow(data))
    if name in ("eXIf", "zTXt profile", "XMP"):
        assert decoded(decoder, png(after=CHUNKS[name])).shape == (40, 24, 3)


def test_other_formats_are_turned_as_by_pillow(decoder: Decoder) -> None:
    image, meta = Image.fromarray(STORED), Image.Exif()
    meta[0x0112] = 6
    files = {
        "WebP": encode(image, "WEBP", exif=meta),
        "WebP with XMP": encode(image, "WEBP", xmp=xmp(6)),
        "TIFF": encode(image, "TIFF", tiffinfo={0x0112: 6}),
        "compressed TIFF": encode(image, "TIFF", tiffinfo={0x0112: 6}, compression="tiff_deflate"),
        "TIFF with XMP": encode(image, "TIFF", tiffinfo={700: xmp(6)}),
        "MPO": encode(image, "MPO", save_all=True, append_images=[image], exif=meta),
        "CMYK": with_orientation(encode(image.convert("CMYK")), 6),
    }
    if features.check("avif"):
        files["AVIF"] = encode(image, "AVIF", exif=meta)
        files["AVIF with XMP"] = encode(image, "AVIF", xmp=xmp(6))
    for name, data in files.items():
        want = by_pillow(data.tobytes())
        assert want.shape == (40, 24, 3), name
        np.testing.assert_array_equal(decoded(decoder, data.tobytes()), want, err_msg=name)


def test_deep_gray_is_turned(decoder: Decoder) -> None:
    values = (np.arange(24 * 40).reshape(24, 40) * 68).astype(np.uint16)
    data = encode(Image.fromarray(values), "PNG").tobytes()
    got = decoded(decoder, data[:-12] + CHUNKS["eXIf"] + data[-12:])
    np.testing.assert_array_equal(got[..., 0], np.rot90(values >> 8, -1))

"""All decoders against Pillow, and against pixels known from how the file was made."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.decode import Decoder, make_decoder
from pipelines.decode.sniff import sniff
from tests.samples.decode_samples import encode, needs_dali, needs_ffcv_library, picture, png16, with_orientation

SIZE = (61, 83)


@pytest.fixture(
    scope="module",
    params=[pytest.param("dali", marks=needs_dali), pytest.param("ffcv", marks=needs_ffcv_library), "pillow"],
)
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    made = make_decoder(request.param, device="cpu", batch_size=64, threads=2)
    yield made
    made.close()


def images(decoder: Decoder, encoded: list[np.ndarray]) -> list[np.ndarray]:
    decoded = decoder(encoded)
    assert decoded.failures == {}
    pieces = torch.split(decoded.pixels, (decoded.sizes.prod(1) * 3).tolist())
    return [p.reshape(h, w, 3).numpy() for p, (h, w) in zip(pieces, decoded.sizes.tolist(), strict=True)]


def test_jpegs_are_decoded_exactly_as_by_pillow(decoder: Decoder) -> None:
    encoded = [
        encode(picture(h, w), subsampling=s, progressive=p)
        for h, w in [SIZE, (1, 1), (1, 9), (17, 16), (8, 3)]
        for s in (0, 1, 2)
        for p in (False, True)
    ]
    encoded += [encode(picture(*SIZE)[..., 0], progressive=p) for p in (False, True)]
    encoded += [encode(picture(*SIZE), restart_marker_rows=1), encode(picture(*SIZE), icc_profile=b"x" * 70000)]
    assert all(header is not None and header.plain for header in map(sniff, encoded))  # so DALI decodes them
    for got, data in zip(images(decoder, encoded), encoded, strict=True):
        np.testing.assert_array_equal(got, np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_original(decoder: Decoder, kind: str) -> None:
    pixels = picture(*SIZE)
    (got,) = images(decoder, [encode(pixels, kind, **({"lossless": True} if kind == "WEBP" else {}))])
    np.testing.assert_array_equal(got, pixels)


def test_odd_encodings_become_rgb(decoder: Decoder) -> None:
    pixels = picture(*SIZE)
    gray, ramp = pixels[..., 1], np.arange(SIZE[0] * SIZE[1]).reshape(SIZE)
    alpha = np.dstack([pixels, (ramp % 256).astype(np.uint8)])
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    palette = Image.fromarray((ramp % 200).astype(np.uint8))
    palette.putpalette(colours.tobytes())
    deep = (ramp * 11 % 65536).astype(np.uint16)
    deep_rgb = np.dstack([deep, deep[::-1], 65535 - deep])
    cases = {
        "gray PNG": (encode(gray, "PNG"), np.dstack([gray] * 3)),
        "gray and alpha": (encode(np.dstack([gray, alpha[..., 3]]), "PNG"), np.dstack([gray] * 3)),
        "alpha PNG": (encode(alpha, "PNG"), pixels),
        "alpha WebP": (encode(alpha, "WEBP", lossless=True, exact=True), pixels),
        "palette": (encode(palette, "PNG"), colours[ramp % 200]),
        "palette, one transparent": (encode(palette, "PNG", transparency=5), colours[ramp % 200]),
        "palette, alpha table": (encode(palette, "PNG", transparency=bytes(range(200))), colours[ramp % 200]),
        "palette GIF": (encode(palette, "GIF"), colours[ramp % 200]),
        "1 bit": (encode(Image.fromarray(gray > 128), "PNG"), np.dstack([(gray > 128).astype(np.uint8) * 255] * 3)),
        "16-bit gray": (encode(Image.fromarray(deep), "PNG"), np.dstack([(deep >> 8).astype(np.uint8)] * 3)),
        "16-bit gray TIFF": (encode(Image.fromarray(deep), "TIFF"), np.dstack([(deep >> 8).astype(np.uint8)] * 3)),
        "16-bit colour": (png16(deep_rgb), (deep_rgb >> 8).astype(np.uint8)),
    }
    for (name, (_, want)), got in zip(cases.items(), images(decoder, [d for d, _ in cases.values()]), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_cmyk_is_converted_also_in_inverted_form(decoder: Decoder) -> None:
    y, x = np.mgrid[0:64, 0:64]
    cmyk = np.stack([x * 4, y * 4, 255 - x * 4, y * 2], -1).astype(np.uint8)
    image = Image.frombytes("CMYK", (64, 64), cmyk.tobytes())
    want = (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:]) / 255  # ink absorbs, key absorbs the rest
    tiff, jpeg = images(
        decoder, [encode(image, "TIFF"), encode(image, "JPEG", quality=98)]
    )  # Pillow writes Adobe's inverted form
    assert b"Adobe" in encode(image, "JPEG").tobytes()
    assert np.abs(tiff - want).max() <= 1
    assert np.abs(jpeg - want).max() <= 8  # the JPEG's own loss


@pytest.mark.parametrize("order", ["II", "MM"])
def test_exif_orientation_is_applied(decoder: Decoder, order: str) -> None:
    jpeg = encode(picture(*SIZE))
    stored = np.asarray(Image.open(io.BytesIO(jpeg.tobytes())))
    swapped = stored.swapaxes(0, 1)
    # EXIF 2.32, 4.6.4.A: what the 0th row and the 0th column of the stored pixels are in the scene.
    upright = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}
    upright |= {5: swapped, 6: swapped[:, ::-1], 7: swapped[::-1, ::-1], 8: swapped[::-1]}
    encoded = [with_orientation(jpeg, n, order) for n in upright] + [with_orientation(jpeg, n, order) for n in (0, 9)]
    for n, got in enumerate(images(decoder, encoded), start=1):
        np.testing.assert_array_equal(got, upright.get(n, stored), err_msg=f"orientation {n}")


def test_broken_or_foreign_metadata_is_ignored(decoder: Decoder) -> None:
    jpeg = encode(picture(*SIZE))
    data = jpeg.tobytes()
    encoded = [jpeg]
    for payload in (b"Exif\0\0", b"Exif\0\0garbage", b"http://ns.adobe.com/xap/1.0/\0garbage"):
        segment = b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload
        encoded.append(np.frombuffer(data[:2] + segment + data[2:], np.uint8))
    encoded.append(np.frombuffer(data + b"a tail after the end marker", np.uint8))
    first, *others = images(decoder, encoded)
    for other in others:
        np.testing.assert_array_equal(other, first)


@needs_dali
def test_a_damaged_but_complete_jpeg_has_the_same_pixels_if_both_decode_it() -> None:
    jpeg = encode(picture(*SIZE))
    rng = np.random.default_rng(0)
    both = [make_decoder(kind, device="cpu", batch_size=16, threads=1) for kind in ("dali", "pillow")]
    compared = 0
    for _ in range(12):
        noisy = jpeg.copy()
        at = int(rng.integers(len(jpeg) // 2, len(jpeg) - 10))
        noisy[at : at + 4] = rng.integers(0, 256, 4)
        dali, pillow = (decoder([noisy]) for decoder in both)
        assert pillow.failures or not dali.failures  # Pillow is stricter
        if not pillow.failures:
            assert torch.equal(dali.pixels, pillow.pixels)
            compared += 1
    assert compared > 6
    for decoder in both:
        decoder.close()

"""Values of more than 8 bits: scaled by a stated range, by that of the file, or refused; never black without a word."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipelines.decode import make_decoder
from pipelines.decode.pillow import decode_one, measure
from pipelines.value_range import FULL, ValueRange, parse_value_range
from tests.samples.decode_samples import encode, needs_dali, needs_ffcv_library, png16
from tests.samples.deep_files import FLOAT, SIGNED, netpbm, tiff

GRAY = (np.arange(64 * 64).reshape(64, 64) % 4096).astype(np.uint16)  # 12 bits
COLOUR = np.dstack([GRAY, GRAY[::-1], 4095 - GRAY])
BITS12 = parse_value_range("0..4095")
DECODERS = [pytest.param("dali", marks=needs_dali), pytest.param("ffcv", marks=needs_ffcv_library), "pillow"]


def files() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> file and its values; none says that it has 12 bits."""
    return {
        "gray PNG": (encode(Image.fromarray(GRAY), "PNG"), GRAY),
        "colour PNG": (png16(COLOUR), COLOUR),
        "gray TIFF": (tiff(GRAY), GRAY),
        "gray TIFF, big-endian": (tiff(GRAY, order=">"), GRAY),
        "gray TIFF, compressed": (encode(Image.fromarray(GRAY), "TIFF", compression="tiff_lzw"), GRAY),
        "colour TIFF": (tiff(COLOUR), COLOUR),
        "colour TIFF, big-endian": (tiff(COLOUR, order=">"), COLOUR),
        "signed TIFF": (tiff(GRAY.astype(np.int16), sample=SIGNED), GRAY),
        "signed TIFF, big-endian": (tiff(GRAY.astype(np.int16), order=">", sample=SIGNED), GRAY),
        "32-bit TIFF": (tiff(GRAY.astype(np.uint32)), GRAY),
        "signed 32-bit TIFF": (tiff(GRAY.astype(np.int32), sample=SIGNED), GRAY),
        "PGM": (netpbm(GRAY, 65535), GRAY),
        "PPM": (netpbm(COLOUR, 65535), COLOUR),
        "JPEG 2000 of 16 bits": (encode(Image.fromarray(GRAY), "JPEG2000"), GRAY),
    }


def as_rgb(gray_or_colour: np.ndarray) -> np.ndarray:
    return np.dstack([gray_or_colour] * 3) if gray_or_colour.ndim == 2 else gray_or_colour


@pytest.mark.parametrize("kind", DECODERS)
def test_a_stated_range_is_applied(kind: str) -> None:
    decoder = make_decoder(kind, device="cpu", batch_size=16, threads=2, value_range=BITS12)
    decoded = decoder([data for data, _ in files().values()])
    assert decoded.failures == {}
    pixels = decoded.pixels.reshape(-1, 64, 64, 3).numpy()
    for got, (name, (_, values)) in zip(pixels, files().items(), strict=True):
        np.testing.assert_array_equal(got, as_rgb(values >> 4), err_msg=name)
    decoder.close()


@pytest.mark.parametrize("kind", DECODERS)
def test_without_a_range_fewer_bits_are_refused(kind: str) -> None:
    decoder = make_decoder(kind, device="cpu", batch_size=16, threads=2)
    decoded = decoder([data for data, _ in files().values()])
    assert sorted(decoded.failures) == list(range(len(files())))
    for reason in decoded.failures.values():
        assert (
            "reach only 4095 and would be nearly black: state their range, for example --value-range 0..4095" in reason
        )
    decoder.close()


@pytest.mark.parametrize("name", files())
def test_values_are_measured(name: str) -> None:
    data, values = files()[name]
    measured = measure(data)
    assert measured is not None
    assert (measured.low, measured.high) == (values.min(), values.max())


def test_values_that_use_16_bits_keep_their_high_byte() -> None:
    gray, colour = GRAY << 4, COLOUR << 4
    for data, values in (
        (encode(Image.fromarray(gray), "PNG"), gray),
        (png16(colour), colour),
        (tiff(colour, order=">"), colour),
        (tiff(gray.astype(np.uint32)), gray),
    ):
        for value_range in (None, FULL):
            np.testing.assert_array_equal(decode_one(data, value_range=value_range), as_rgb(values >> 8))
    lowest = np.full((8, 8), 1 << 14, np.uint16)
    assert np.asarray(decode_one(tiff(lowest))).max() == 64


def test_alpha_is_dropped() -> None:
    rows = np.dstack([COLOUR, 65535 - GRAY])
    got = decode_one(tiff(rows), value_range=BITS12)
    np.testing.assert_array_equal(got, COLOUR >> 4)


def test_a_black_image_is_black_in_any_range() -> None:
    black = np.zeros((8, 8), np.uint16)
    for data in (encode(Image.fromarray(black), "PNG"), png16(np.dstack([black] * 3)), tiff(black)):
        assert not np.asarray(decode_one(data)).any()


def test_files_that_state_their_range() -> None:
    for largest, shift in ((1023, 2), (4095, 4)):
        values = GRAY % (largest + 1)
        for data, want in ((netpbm(values, largest), values), (netpbm(np.dstack([values] * 3), largest), values)):
            got = decode_one(data, value_range=FULL)  # the file's own range comes first
            assert not isinstance(got, str)
            assert np.abs(got[..., 0].astype(int) - (want >> shift)).max() <= 1  # Pillow rounds
            assert got.max() == 255
            assert measure(data) is None


def test_plain_ppm_is_refused_where_it_would_be_nearly_black() -> None:
    for largest in (4095, 65535):
        text = b"P3\n64 64\n%d\n" % largest + b" ".join(b"%d" % value for value in COLOUR.flat)
        got = decode_one(np.frombuffer(text, np.uint8))
        if largest == 65535:
            assert got == "its 16-bit values cannot be read in full: convert the file to 8 bits"
        else:
            np.testing.assert_allclose(np.asarray(got), COLOUR / 4095 * 255, atol=1)


@pytest.mark.parametrize(
    ("data", "range_", "words"),
    [
        (
            tiff((GRAY.astype(np.float32) / 4095), sample=FLOAT),
            "0..1",
            "floating-point values from 0 to 1 have no defined",
        ),
        (tiff(GRAY.astype(np.int16) - 1024, sample=SIGNED), "-1024..3071", "from -1024 to 3071 have no defined range"),
        (
            tiff(GRAY.astype(np.uint32) << 20),
            "0..4294967295",
            "32-bit values from 0 to 4293918720 have no defined range",
        ),
    ],
)
def test_other_values_need_a_range(data: np.ndarray, range_: str, words: str) -> None:
    reason = decode_one(data)
    assert isinstance(reason, str)
    assert words in reason
    got = decode_one(data, value_range=parse_value_range(range_))
    assert not isinstance(got, str)
    assert np.abs(got[..., 0].astype(int) - (GRAY >> 4)).max() <= 1


def test_values_outside_the_range_are_clamped() -> None:
    got = decode_one(files()["gray PNG"][0], value_range=ValueRange(low=1000, high=2023))
    np.testing.assert_array_equal(got, as_rgb(((GRAY.astype(int) - 1000) >> 2).clip(0, 255)))


def test_8_bits_do_not_depend_on_the_range() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for kind in ("PNG", "TIFF", "PPM", "BMP", "JPEG2000"):
        np.testing.assert_array_equal(decode_one(encode(pixels, kind), value_range=BITS12), pixels)
        assert measure(encode(pixels, kind)) is None

"""Ranges of values: how they are written, scaled and guessed."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.runtime import InputError
from pipelines.value_range import FULL, Measured, ValueRange, bits_for, parse_value_range


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("0..4095", 0, 4095),
        ("-1024..3071", -1024, 3071),
        ("0..1.5", 0, 1.5),
        ("0.5..1", 0.5, 1),
        ("1e3..2e3", 1000, 2000),
    ],
)
def test_texts(text: str, low: float, high: float) -> None:
    parsed = parse_value_range(text)
    assert (parsed.low, parsed.high) == (low, high)
    assert parse_value_range(str(parsed)) == parsed


@pytest.mark.parametrize(
    "text", ["", "4095", "0-4095", "0..", "..5", "5..5", "9..1", "a..b", "0..nan", "0..inf", "auto"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(
        InputError, match=r"value_range is .* but must be MIN\.\.MAX with numbers, MIN below MAX: write"
    ):
        parse_value_range(text)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_integers_keep_their_highest_8_bits(bits: int) -> None:
    values = np.arange(1 << bits, dtype=np.uint16)
    want = np.repeat(np.arange(256), 1 << (bits - 8))
    for dtype in (np.uint16, ">u2", np.int32, np.uint32):
        np.testing.assert_array_equal(bits_for((1 << bits) - 1).scaled(values.astype(dtype)), want)


def test_values_outside_are_clamped() -> None:
    signed = ValueRange(low=-1024, high=3071).scaled(np.array([-2000, -1024, 1023, 3071, 9000], dtype=np.int32))
    assert signed.tolist() == [0, 0, 127, 255, 255]
    floats = ValueRange(low=0, high=1).scaled(np.array([-1, 0, 0.5, 1, 7, np.nan, np.inf, -np.inf], dtype=np.float32))
    assert floats.tolist() == [0, 0, 128, 255, 255, 0, 255, 0]


@pytest.mark.parametrize(
    ("values", "suggested", "words"),
    [
        (np.array([0, 4095], np.uint16), "0..4095", "its values in 16 bits reach only 4095 and would be nearly black"),
        (np.array([0, 200], np.uint16), "0..255", "--value-range 0..255"),
        (np.array([0, 1 << 13], np.uint16), "0..16383", "reach only 8192"),
        (np.array([0, 1 << 14], np.uint16), "0..65535", ""),
        (np.array([0, 0], np.uint16), "0..255", ""),
        (
            np.array([-5, 900], np.int32),
            "-5..900",
            "from -5 to 900 have no defined range: state it, for example --value",
        ),
        (np.array([0, 70000], np.int32), "0..70000", "its 32-bit values from 0 to 70000"),
        (np.array([0, 0.9], np.float32), "0..1", "its floating-point values from 0 to 0.9 have no defined range"),
        (np.array([2, 90], np.float32), "2..90", "floating-point values from 2 to 90"),
    ],
)
def test_what_is_said_of_values_without_a_range(values: np.ndarray, suggested: str, words: str) -> None:
    measured = Measured.of(values)
    assert str(measured.suggestion()) == suggested
    assert words in measured.problem()
    assert bool(words) == bool(measured.problem())


def test_options_with_negative_numbers_are_one_word() -> None:
    assert ValueRange(low=-5, high=9).option() == "--value-range=-5..9"
    assert FULL.option() == "--value-range 0..65535"

"""Ranges of a source's deep images: stated, converted, taken from the run, or missed when the data is opened."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.conversion.command import Convert, convert
from pipelines.decode import make_decoder
from pipelines.loading.deep_images import pixels_of, state_value_range
from pipelines.loading.fetch import Fetcher
from pipelines.runtime import InputError
from pipelines.storage import open_source
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source, SubsetSource
from pipelines.value_range import ValueRange, parse_value_range
from tests.samples.decode_samples import jpegs
from tests.samples.deep_files import FLOAT, tiff
from tests.samples.loader_samples import loader_of

BITS12 = parse_value_range("0..4095")


def values(bits: int, seed: int = 0) -> np.ndarray:
    """Values that reach the largest of so many bits, uint16 [24, 32]."""
    found = np.random.default_rng(seed).integers(0, 1 << bits, (24, 32)).astype(np.uint16)
    found[0, 0] = (1 << bits) - 1
    return found


def write(folder: Path, bits: dict[str, int]) -> Path:
    """A folder of 16-bit PNGs that use so many bits each, and of JPEGs (0)."""
    for seed, (name, count) in enumerate(bits.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if count:
            Image.fromarray(values(count, seed)).save(path)
        else:
            path.write_bytes(jpegs(1)[0].tobytes())
    return folder


def pixels(source: Source) -> list[np.ndarray]:
    """All images as the loader's decoder gives them."""
    made = make_decoder("pillow", device="cpu", batch_size=64, threads=1, value_range=facts_of(source).value_range)
    fetched = Fetcher(source, made)(range(len(source)))
    assert fetched.failures == {}
    made.close()
    return [fetched.batch.image(n).numpy() for n in range(len(source))]


def test_a_folder_of_fewer_bits_needs_a_range(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "images", {"a/x.png": 10, "a/y.png": 12, "b/z.jpg": 0}))
    told = (
        r"value_range is not stated but must be for images such as a/y.png of .*images \(values up to 4095, 12 "
        r"bits in a file of 16, which would be nearly black\): add --value-range 0..4095, or convert the images with "
    )
    with pytest.raises(InputError, match=told) as caught:
        state_value_range(source, None)
    assert caught.value.field == "value_range"
    state_value_range(source, BITS12)
    np.testing.assert_array_equal(pixels(source)[1][..., 1], values(12, 1) >> 4)
    assert facts_of(SubsetSource(source, [1])).value_range == BITS12


def test_floating_point_values_need_a_range(tmp_path: Path) -> None:
    (tmp_path / "x.tif").write_bytes(
        tiff(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8), sample=FLOAT).tobytes()
    )
    with pytest.raises(InputError, match=r"x\.tif .*values from 0 to 1\): add --value-range 0\.\.1,"):
        state_value_range(open_source(tmp_path), None)


@pytest.mark.parametrize(
    "bits", [{"x.png": 16, "y.png": 16}, {"x.jpg": 0}, {"x.png": 16, "y.png": 10}, {"x.png": 15, "y.jpg": 0}]
)
def test_images_of_16_bits_or_8_need_none(bits: dict[str, int], tmp_path: Path) -> None:
    source = open_source(write(tmp_path, bits))
    state_value_range(source, None)
    assert facts_of(source).value_range is None


def test_one_of_fewer_bits_among_16_is_a_bad_image_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(write(tmp_path, {f"{n:02d}.png": 12 if n == 5 else 16 for n in range(16)}))
    state_value_range(source, None)
    loader = loader_of(source)  # type: ignore[arg-type]  # any source
    with caplog.at_level(logging.WARNING, logger="mvssl.data"):
        list(loader.epoch(0))
    loader.close()
    assert loader.stats.bad.keys() == {"05.png"}
    assert "Image 05.png cannot be decoded (its values in 16 bits reach only 4095" in caplog.text


@pytest.mark.parametrize(("stated", "said"), [("0..65535", "nearly black"), ("-9..0.1", "white"), ("0..4095", "")])
def test_a_stated_range_that_leaves_nothing_is_warned_of(
    stated: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(values(12).clip(1)).save(tmp_path / "x.png")
    state_value_range(open_source(tmp_path), parse_value_range(stated))
    assert (f"become {said} by --value-range {stated}: a sample of them has values from 1 to 4095" in caplog.text) == (
        said != ""
    )


def test_black_images_say_nothing(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "black.png")
    state_value_range(open_source(tmp_path), None)


@pytest.mark.parametrize(("bits", "expected"), [(8, "0..255"), (10, "0..1023"), (12, "0..4095"), (14, "0..16383")])
def test_conversion_measures_the_range_and_training_applies_it(bits: int, expected: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "images", {"a.png": bits, "b.png": bits - 1, "c.jpg": 0})
    convert(Convert(src=folder, dst=tmp_path / "shards"))
    convert(Convert(src=folder, dst=tmp_path / "beton", format="beton"))
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["value_range"] == expected
    plain, shards, beton = open_source(folder), open_source(tmp_path / "shards"), open_source(tmp_path / "beton")
    state_value_range(plain, parse_value_range(expected))
    state_value_range(shards, None)
    state_value_range(beton, None)
    for of_folder, of_shards, of_beton in zip(pixels(plain), pixels(shards), pixels(beton), strict=True):
        np.testing.assert_array_equal(of_shards, of_folder)
        np.testing.assert_array_equal(of_beton, of_folder)
    np.testing.assert_array_equal(pixels(plain)[0][..., 0], values(bits) >> (bits - 8))
    assert shards.read(0).tobytes() == (folder / "a.png").read_bytes()  # bytes still pass through


def test_all_splits_are_converted_with_one_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "images", {"train/a/x.png": 12, "val/a/x.png": 10})
    convert(Convert(src=folder, dst=tmp_path / "shards"))
    assert capsys.readouterr().out.count("deep values 0..4095 (measured) as 0..255") == 2
    for split in ("train", "val"):
        assert facts_of(open_source(tmp_path / "shards" / split)).value_range == BITS12


def test_a_smaller_version_is_scaled_too(tmp_path: Path) -> None:
    Image.fromarray(np.tile(np.array([[0], [4095]], np.uint16).repeat(32, 0), 64)).save(tmp_path / "x.png")
    convert(Convert(src=tmp_path, dst=tmp_path.parent / "small", max_size=32))
    (small,) = pixels(open_source(tmp_path.parent / "small"))
    assert small.shape == (32, 32, 3)
    assert small[:12].max() < 8
    assert small[20:].min() > 247


def test_a_stated_range_is_kept_with_the_data_and_no_other_is_accepted(tmp_path: Path) -> None:
    folder = write(tmp_path / "images", {"a.png": 12})
    convert(Convert(src=folder, dst=tmp_path / "shards", value_range="1000..3000"))
    source = open_source(tmp_path / "shards")
    state_value_range(source, parse_value_range("1000..3000"))
    with pytest.raises(
        InputError, match=r"value_range is '0\.\.4095' but must be '1000\.\.3000', with which .* convert"
    ):
        state_value_range(source, BITS12)
    with pytest.raises(InputError, match="of another source or with other options"):
        convert(Convert(src=folder, dst=tmp_path / "shards", value_range="0..4095"))
    convert(Convert(src=tmp_path / "shards", dst=tmp_path / "again"))  # converted data keep their range
    assert facts_of(open_source(tmp_path / "again")).value_range == ValueRange(low=1000, high=3000)


def test_values_without_a_range_that_could_be_measured_are_quarantined(tmp_path: Path) -> None:
    folder = write(tmp_path / "images", {"a.png": 12})
    data = tiff(np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8), sample=FLOAT)
    (folder / "b.tif").write_bytes(data.tobytes())
    convert(Convert(src=folder, dst=tmp_path / "shards"))
    (line,) = (tmp_path / "shards" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "b.tif"
    assert "floating-point values from -1 to 1 have no defined range" in json.loads(line)["reason"]


def test_data_with_another_range_are_other_data(tmp_path: Path) -> None:
    folder = write(tmp_path / "images", {"a.png": 12})
    first, second, plain = open_source(folder), open_source(folder), open_source(folder)
    state_value_range(first, BITS12)
    state_value_range(second, None, default=parse_value_range("0..8191"))
    assert len({pixels_of(first), pixels_of(second), pixels_of(plain)}) == 3
    assert pixels_of(plain) == plain.fingerprint

"""Images of more pixels than are decoded: refused with the remedy, smaller versions of them converted, no warning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.conversion.command import Convert, convert
from pipelines.conversion.image_check import WarningLog, check_image
from pipelines.decode import ImageLimits
from pipelines.decode.pillow import decode_one
from pipelines.loading import pixel_cache
from pipelines.storage import open_source
from pipelines.storage.shards import ShardSource
from tests.samples.decode_samples import MemorySource, encode, picture


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A folder with a gray photo of 108 megapixels, 12000 x 9000, and a small one."""
    (tmp_path / "images").mkdir()
    ramp = Image.fromarray(np.linspace(0, 255, 120).astype(np.uint8)[None].repeat(90, 0))
    ramp.resize((12000, 9000), Image.Resampling.BILINEAR).save(tmp_path / "images" / "large.jpg")
    Image.fromarray(picture(30, 40)).save(tmp_path / "images" / "small.jpg")
    return tmp_path / "images"


def test_a_photo_of_108_megapixels(photo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    convert(Convert(src=photo, dst=tmp_path / "plain"))
    (line,) = (tmp_path / "plain" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == (
        "12000 x 9000 pixels are more than the allowed 89,478,485: make it smaller with mvssl-convert --max-size, "
        "or raise --limits.pixels"
    )
    convert(Convert(src=photo, dst=tmp_path / "small", max_size=400))
    source = open_source(tmp_path / "small")
    assert isinstance(source, ShardSource)
    assert source.sizes.tolist() == [[300, 400], [30, 40]]
    got = decode_one(source.read(0))
    assert not isinstance(got, str)
    assert np.abs(got[:, :, 0].mean(0) - np.linspace(0, 255, 400)).max() < 4
    assert (tmp_path / "small" / "warnings.jsonl").read_text() == ""
    assert "Warning" not in capfd.readouterr().err


LOW = ImageLimits(pixels=2000)
KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")


@pytest.mark.parametrize("kind", KINDS)
def test_pillow_does_not_warn_before_our_reason(kind: str) -> None:
    data = encode(Image.fromarray(picture(50, 60)), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_one(data, limits=LOW) == (
            "60 x 50 pixels are more than the allowed 2,000: make it smaller with mvssl-convert --max-size, "
            "or raise --limits.pixels"
        )
        source = MemorySource([data])
        assert list(pixel_cache._pixel_counts(source, range(1))) == [(0, 3000)]


@pytest.mark.parametrize("kind", KINDS)
def test_smaller_versions_of_larger_images(kind: str) -> None:
    log = WarningLog()
    data = encode(Image.fromarray(picture(50, 60)), kind)
    with log.collecting():
        assert "allowed 2,000" in check_image(data, max_size=None, limits=LOW, log=log).bad
        small = check_image(data, max_size=30, limits=LOW, log=log)
        assert (small.height, small.width, small.bad, small.warned) == (25, 30, "", "")
        same = check_image(data, max_size=60, limits=LOW, log=log)
        assert same.bad == "60 x 50 pixels become more than the allowed 2,000: give a smaller --max-size"


def test_the_largest_jpegs_are_decoded_at_a_fraction_of_their_size() -> None:
    pixels = picture(304, 400)  # 60 times the limit
    data = encode(Image.fromarray(pixels), quality=95, subsampling=0)
    reduced = decode_one(data, max_size=25, limits=LOW)
    assert not isinstance(reduced, str)
    assert reduced.shape == (38, 50, 3)  # an eighth
    want = np.asarray(Image.fromarray(pixels).resize((50, 38), Image.Resampling.BOX))
    assert np.abs(reduced.astype(int) - want).mean() < 6
    half = decode_one(encode(Image.fromarray(picture(80, 120))), max_size=55, limits=LOW)
    assert not isinstance(half, str)
    assert half.shape == (40, 60, 3)  # a half, though less than twice as large as what is wanted
    reason = decode_one(data, max_size=300, limits=LOW)
    assert isinstance(reason, str)
    assert "400 x 304 pixels are more than the allowed 4,000: make it smaller beforehand" in reason

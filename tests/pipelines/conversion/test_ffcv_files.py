"""FFCV and mvssl read each other's files."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.conversion.command import Convert, convert
from pipelines.decode.pillow import decode_one
from pipelines.runtime import InputError
from pipelines.storage import open_source
from pipelines.storage.beton import BetonSource
from tests.samples.decode_samples import picture
from tests.samples.ffcv_programs import MODES, ffcv_read, ffcv_write, needs_ffcv

pytestmark = [needs_ffcv, pytest.mark.slow]

COUNT = 12
IMAGES = [picture(30 + n, 50 - n, n) for n in range(COUNT)]
LABELS = [n % 3 for n in range(COUNT)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MODE.beton for each mode of FFCV's writer, and nolabel.beton."""
    folder = tmp_path_factory.mktemp("theirs")
    ffcv_write(IMAGES, LABELS, folder)
    return folder


def pixels(source: BetonSource) -> list[np.ndarray]:
    decoded = [decode_one(source.read(n)) for n in range(len(source))]
    return [image for image in decoded if not isinstance(image, str)]


def test_ffcv_reads_what_was_converted(tmp_path: Path) -> None:
    """Colour and gray JPEGs as their own bytes; CMYK and PNG as pixels, which FFCV gives exactly."""
    for n in range(10):
        (tmp_path / "src" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture(40, 48, n))
        if n in (2, 3):
            image = image.convert("L" if n == 2 else "CMYK")
        image.save(tmp_path / "src" / "ab"[n % 2] / f"{n}.{'png' if n == 4 else 'jpg'}", quality=90)
    convert(Convert(src=tmp_path / "src", dst=tmp_path / "d", format="beton"))
    source = BetonSource(tmp_path / "d" / "images.beton")
    images, labels = ffcv_read(source.location, decoder="simple")
    assert labels.tolist() == source.labels.tolist() == [0] * 5 + [1] * 5
    differences = np.abs(images.astype(int) - np.stack(pixels(source)).astype(int))  # [N, H, W, 3]
    assert differences.max() <= 12, "FFCV decodes JPEGs with the fast DCT"
    assert differences.mean() < 1
    exact = [n for n in range(10) if source.key(n) in ("a/4", "b/3")]
    assert differences[exact].max() == 0


def test_ffcv_reads_images_of_many_sizes_over_several_pages(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for n in range(9):  # noise: 2 MB each, 4 a page
        noise = np.random.default_rng(n).integers(0, 256, (900 + n, 850, 3), dtype=np.uint8)
        Image.fromarray(noise // 8 + 28 * n).save(tmp_path / "src" / f"{n}.png")
    convert(Convert(src=tmp_path / "src", dst=tmp_path / "d", format="beton", shard_size=5.0))
    source = BetonSource(tmp_path / "d" / "images.beton")
    images, labels = ffcv_read(source.location, decoder="center")
    assert labels.tolist() == [-1] * 9
    means = [float(image.mean()) for image in pixels(source)]
    assert np.abs(images.mean(axis=(1, 2, 3)) - means).max() < 1
    assert max(b - a for a, b in itertools.pairwise(means)) > 20


@pytest.mark.parametrize("mode", MODES)
def test_files_of_ffcv_are_read(theirs: Path, mode: str) -> None:
    source = open_source(theirs / f"{mode}.beton")
    assert isinstance(source, BetonSource)
    assert source.labels.tolist() == LABELS
    assert source.classes == ("0", "1", "2")
    assert source.key(7) == "000000007"
    assert source.sizes.tolist() == [[30 + n, 50 - n] for n in range(COUNT)]
    exact = 0
    for image, original in zip(pixels(source), IMAGES, strict=True):
        difference = np.abs(image.astype(int) - original.astype(int))
        exact += difference.max() == 0
        assert difference.mean() < 8
    assert {"jpg": exact == 0, "proportion": 0 < exact < COUNT}.get(mode, exact == COUNT)
    source.close()


def test_file_of_ffcv_without_labels(theirs: Path) -> None:
    source = open_source(theirs / "nolabel.beton")
    assert source.labels.tolist() == [-1] * COUNT
    assert source.classes == ()
    assert Image.open(io.BytesIO(source.read(0).tobytes())).format == "JPEG"


@pytest.mark.parametrize("mode", MODES)
def test_no_file_of_ffcv_that_was_cut_short_is_opened(theirs: Path, tmp_path: Path, mode: str) -> None:
    whole = (theirs / f"{mode}.beton").read_bytes()
    path = tmp_path / "short.beton"
    for missing in (1, 23, 24, 48, 24 * COUNT, 24 * COUNT + 1, 5000, len(whole) - 2000, len(whole) - 10):
        path.write_bytes(whole[:-missing])
        with pytest.raises(InputError, match="restore it from where it was copied, or write it again"):
            open_source(path)


def test_converting_a_file_of_ffcv(theirs: Path, tmp_path: Path) -> None:
    convert(Convert(src=theirs / "jpg.beton", dst=tmp_path / "d"))
    before, after = open_source(theirs / "jpg.beton"), open_source(tmp_path / "d")
    assert after.labels.tolist() == LABELS
    assert all(np.array_equal(before.read(n), after.read(n)) for n in range(COUNT))

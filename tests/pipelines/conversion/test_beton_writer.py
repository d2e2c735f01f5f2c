"""mvssl-convert --format beton: stored images, refusals, and resuming after a kill."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from pipelines.conversion import beton_writer, conversion
from pipelines.conversion.beton_writer import BetonWriter, adapt_to_ffcv
from pipelines.conversion.image_check import WarningLog, check_image
from pipelines.decode.pillow import decode_one
from pipelines.storage import open_source
from pipelines.storage.beton import BetonSource
from tests.samples.convert_runs import COUNT, Run, digests

ARGUMENTS = ("--format", "beton")


def jpeg(image: Image.Image, **options: Any) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_same_images_in_the_same_order_as_shards(run: Run, folder: Path, tmp_path: Path) -> None:
    outcome = run(folder, tmp_path / "b", *ARGUMENTS)
    assert outcome.code == 0
    assert f"{COUNT} images" in outcome.out
    assert "in images.beton, 0 quarantined" in outcome.out
    assert run(folder, tmp_path / "s").code == 0
    beton, shards = open_source(tmp_path / "b"), open_source(tmp_path / "s")
    assert isinstance(beton, BetonSource)
    assert beton.fingerprint == shards.fingerprint
    assert [beton.key(n) for n in range(COUNT)] == [shards.key(n) for n in range(COUNT)]
    assert all(np.array_equal(beton.read(n), shards.read(n)) for n in range(COUNT))
    assert "already" in run(folder, tmp_path / "b", *ARGUMENTS).out
    other = run(folder, tmp_path / "b")
    assert other.code == 1
    assert "of another source or with other options" in other.err


def test_train_and_val_and_back_to_shards(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for name in ("train", "val"):
        (tmp_path / "src" / name).symlink_to(folder)
    assert run(tmp_path / "src", tmp_path / "b", *ARGUMENTS).code == 0
    assert run(tmp_path / "b", tmp_path / "s").code == 0
    assert run(folder, tmp_path / "direct").code == 0
    assert open_source(tmp_path / "s" / "val").fingerprint == open_source(tmp_path / "direct").fingerprint


def test_odd_images(run: Run, tmp_path: Path) -> None:
    """Gray and rotated JPEGs pass through, CMYK and PNG become pixels, bad images are quarantined."""
    src = tmp_path / "src"
    src.mkdir()
    image = Image.fromarray(noise(40, 60))
    exif = Image.Exif()
    exif[0x112] = 6
    image.convert("L").save(src / "gray.jpg")
    image.save(src / "rotated.jpg", exif=exif)
    image.convert("CMYK").save(src / "cmyk.jpg")
    image.convert("RGBA").save(src / "clear.png")
    image.save(src / "tail.jpg")
    with (src / "tail.jpg").open("ab") as file:
        file.write(b"more")
    (src / "empty.jpg").touch()
    (src / "short.jpg").write_bytes((src / "gray.jpg").read_bytes()[:500])
    outcome = run(src, tmp_path / "b", *ARGUMENTS)
    assert outcome.code == 0, outcome.err
    assert "5 images" in outcome.out
    assert "2 quarantined" in outcome.out
    lines = (tmp_path / "b" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["empty.jpg", "short.jpg"]
    source = open_source(tmp_path / "b")
    assert isinstance(source, BetonSource)
    for n in range(5):
        original = np.fromfile(src / f"{source.key(n)}{'.png' if source.key(n) == 'clear' else '.jpg'}", np.uint8)
        expected, pixels = decode_one(original), decode_one(source.read(n))
        assert isinstance(expected, np.ndarray)
        assert isinstance(pixels, np.ndarray)
        assert np.array_equal(pixels, expected)
        assert source.sizes[n].tolist() == list(expected.shape[:2])
        assert (source.key(n) in ("gray", "rotated", "tail")) == np.array_equal(source.read(n), original)


def quantisation_tables(image: Image.Image) -> dict[int, list[int]]:
    assert isinstance(image, JpegImageFile)
    return image.quantization


@pytest.mark.parametrize("form", ["shards", "beton"])
def test_smaller_and_encoded_again(run: Run, folder: Path, tmp_path: Path, form: str) -> None:
    assert run(folder, tmp_path / "d", "--format", form, "--max-size", 64, "--quality", 60).code == 0
    source = open_source(tmp_path / "d")
    with Image.open(io.BytesIO(source.read(3).tobytes())) as image:
        assert max(image.size) == 64
        assert image.format == "JPEG"
        tables = quantisation_tables(image)
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "JPEG", quality=60)
    assert tables == quantisation_tables(Image.open(small))
    assert run(folder, tmp_path / "q", "--format", form, "--quality", 60).code == 0
    again = open_source(tmp_path / "q")
    with Image.open(io.BytesIO(again.read(0).tobytes())) as image:
        assert image.size == (200, 160)


def test_image_larger_than_a_page() -> None:
    """Pixels that do not fit become a JPEG; a JPEG that does not fit is bad, and the reason names the remedy."""
    log = WarningLog()
    png = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(png, "PNG")
    pixels = check_image(np.frombuffer(png.getvalue(), np.uint8), max_size=None, log=log)
    assert adapt_to_ffcv(pixels, page=64 * 64 * 3, quality=None).extension == "rgb"
    smaller = adapt_to_ffcv(pixels, page=64 * 64 * 3 - 1, quality=None)
    assert (smaller.extension, smaller.height, smaller.width) == ("jpg", 64, 64)
    assert "stored as JPEG of quality 95" in smaller.warned
    assert "make it smaller with --max-size" in adapt_to_ffcv(pixels, page=100, quality=None).bad
    photo = check_image(jpeg(Image.fromarray(noise(64, 64))), max_size=None, log=log)
    assert adapt_to_ffcv(photo, page=photo.data.nbytes, quality=None) is photo
    assert "are more than the 100 of a page" in adapt_to_ffcv(photo, page=100, quality=None).bad


def test_pages_are_not_crossed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for n in range(7):
        Image.fromarray(noise(1000 + n, 900)).save(tmp_path / "src" / f"{n}.bmp")
    assert run(tmp_path / "src", tmp_path / "b", *ARGUMENTS).code == 0
    source = open_source(tmp_path / "b")
    assert isinstance(source, BetonSource)
    first = source._offset
    assert ((first // (1 << 23)) == ((first + source.nbytes - 1) // (1 << 23))).all()
    assert len(set((first // (1 << 23)).tolist())) == 3
    assert all(np.array_equal(decode_one(source.read(n)), noise(1000 + n, 900)) for n in range(7))


@pytest.mark.parametrize("after", [0, 11, 25, COUNT - 1])
def test_killed_and_run_again_gives_the_same_bytes(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """An exception stands for the kill: there is no images.beton, and the same command converts the rest."""
    arguments = (*ARGUMENTS, "--shard-size", 0.2)
    assert run(folder, tmp_path / "whole", *arguments).code == 0
    done = 0
    original = BetonWriter.add

    def failing(self: BetonWriter, *given: Any, **options: Any) -> int:
        nonlocal done
        if done == after:
            raise OSError(errno.ENOSPC, "No space left on device")
        done += 1
        return original(self, *given, **options)

    monkeypatch.setattr(BetonWriter, "add", failing)
    stopped = run(folder, tmp_path / "d", *arguments)
    assert stopped.code == 1
    assert "No space left on device" in stopped.err
    assert not (tmp_path / "d" / "images.beton").exists()
    unfinished = run(tmp_path / "d", tmp_path / "x")
    assert unfinished.code == 1
    assert "the conversion is not finished" in unfinished.err
    monkeypatch.undo()
    checked: list[int] = []

    def counting(*given: Any, **options: Any) -> Any:
        checked.append(1)
        return check_image(*given, **options)

    monkeypatch.setattr(conversion, "check_image", counting)
    again = run(folder, tmp_path / "d", *arguments)
    assert again.code == 0, again.err
    assert len(checked) < COUNT or after < 11, "finished parts are kept"
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


def test_corruption_on_disk_is_an_error(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = beton_writer.reads_back

    def flipped(path: Path, rows: np.ndarray, expected: Any) -> bool:
        with path.open("r+b") as file:
            file.seek(int(rows["offset"][0]) + 100)
            file.write(b"\x00\x01\x02")
        return original(path, rows, expected)

    monkeypatch.setattr(beton_writer, "reads_back", flipped)
    outcome = run(folder, tmp_path / "d", *ARGUMENTS)
    assert outcome.code == 1
    assert "does not contain what was written to it" in outcome.err
    assert not (tmp_path / "d" / "images.beton").exists()
    monkeypatch.undo()
    assert run(folder, tmp_path / "d", *ARGUMENTS, "--overwrite").code == 0
    assert len(open_source(tmp_path / "d")) == COUNT


def test_overwriting_the_other_format(run: Run, folder: Path, tmp_path: Path) -> None:
    for form in ("beton", "shards", "beton"):
        assert run(folder, tmp_path / "d", "--format", form, "--overwrite").code == 0
        names = {path.name for path in (tmp_path / "d").iterdir()}
        assert ("images.beton" in names) == (form == "beton")
        assert ("shard-000000.tar" in names) == (form == "shards")
        assert len(open_source(tmp_path / "d")) == COUNT


def test_beton_file_of_another_program_is_kept(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "images.beton").write_bytes(b"precious")
    for options in ((), ("--overwrite",)):
        outcome = run(folder, tmp_path / "d", *ARGUMENTS, *options)
        assert outcome.code == 1
        assert "holds other files" in outcome.err
    assert (tmp_path / "d" / "images.beton").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("d.beton", *ARGUMENTS), "d.beton is the name of a file: give a folder; images.beton is written in it"),
        (("d", "--quality", 0), "--quality is 0 but must be 1 to 100"),
        (("d", "--quality", 101), "--quality is 101"),
    ],
)
def test_wrong_arguments(run: Run, folder: Path, tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    outcome = run(folder, tmp_path / str(arguments[0]), *arguments[1:])
    assert outcome.code == 1
    assert message in outcome.err


def test_no_usable_image(run: Run, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "x.jpg").write_bytes(b"no image")
    outcome = run(tmp_path / "src", tmp_path / "d", *ARGUMENTS)
    assert outcome.code == 1
    assert "none of the 1 images" in outcome.err

"""A .beton file as a source: the right bytes, and every damage named."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipelines.decode import DecodeOptions, make_decoder
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.runtime import InputError
from pipelines.storage import open_source, split_paths
from pipelines.storage.beton import BetonSource
from pipelines.storage.beton_format import ALLOCATION, FIELD, HEADER, IMAGE_KIND, page_bytes, record_dtype
from tests.samples.beton_samples import COUNT, make_beton, with_pixels
from tests.samples.loader_samples import SPECS


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    return make_beton(tmp_path)


def test_reads_the_original_bytes_in_many_threads_and_after_a_fork(made: tuple[Path, list[np.ndarray]]) -> None:
    path, encoded = made
    source = open_source(path)
    assert isinstance(source, BetonSource)
    assert [source.key(n) for n in (0, COUNT - 1)] == ["a/000", f"b/{COUNT - 1:03d}"]
    assert source.classes == ("a", "b")
    assert source.labels.tolist() == [0] * (COUNT // 2) + [1] * (COUNT // 2)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(source.read, list(range(COUNT)) * 4))
    assert all(np.array_equal(data, encoded[n % COUNT]) for n, data in enumerate(read))
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(source.read(5), encoded[5]) else 1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(ValueError, match="read-only"):
        source.read(0)[0] = 0


def test_a_moved_file_is_the_same_data_as_its_folder(made: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    path, _ = made
    moved = tmp_path / "elsewhere" / "ours.beton"
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert open_source(path.parent).fingerprint == open_source(path).fingerprint == open_source(moved).fingerprint


@pytest.mark.parametrize("kind", ["pillow", "auto"])
def test_pixels_come_back_exactly(tmp_path: Path, kind: str) -> None:
    path, pixels = with_pixels(tmp_path)
    source = BetonSource(path)
    decoder = make_decoder(kind, device="cpu", batch_size=2, threads=1)
    decoded = decoder([source.read(0), source.read(0)])
    decoder.close()
    assert source.sizes.tolist() == [[33, 47]]
    assert source.classes == ()
    assert np.array_equal(decoded.pixels.numpy(), np.tile(pixels.reshape(-1), 2))


def change_header(path: Path, **fields: int) -> None:
    content = bytearray(path.read_bytes())
    header = np.frombuffer(content, HEADER, count=1).copy()
    for name, value in fields.items():
        header[name] = value
    content[: HEADER.itemsize] = header.tobytes()
    path.write_bytes(content)


def change_first_record(path: Path, field: str, value: int) -> None:
    content = bytearray(path.read_bytes())
    dtype = record_dtype((IMAGE_KIND, 1))
    at = HEADER.itemsize + 2 * FIELD.itemsize
    record = np.frombuffer(content, dtype, count=1, offset=at).copy()
    if field == "label":
        record["f1"] = value
    else:
        record["f0"][field] = value
    content[at : at + dtype.itemsize] = record.tobytes()
    path.write_bytes(content)


def damage_index(path: Path) -> None:
    content = bytearray(path.read_bytes())
    table = int(np.frombuffer(content, HEADER, count=1)["allocations"][0])
    content[table - 10] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: change_header(path, allocations=0), "is half-written"),
        (lambda path: change_header(path, version=1), "is of .beton version 1 but this release reads version 2"),
        (lambda path: change_header(path, version=3), "is of .beton version 3 but"),
        (lambda path: change_header(path, samples=10**6), "has no room for the 1000000 samples"),
        (lambda path: change_header(path, samples=0), "holds no images"),
        (lambda path: change_header(path, fields=0), "has no RGBImageField"),
        (lambda path: path.write_bytes(b""), "has 0 bytes, fewer than"),
        (lambda path: path.write_text("not a beton file, by any means"), "is of .beton version"),
        (lambda path: change_first_record(path, "pointer", 12345), "have no data"),
        (lambda path: change_first_record(path, "mode", 7), "the record of sample 0 is impossible"),
        (lambda path: change_first_record(path, "mode", 1), "the record of sample 0 is impossible"),
        (lambda path: change_first_record(path, "label", 2), "labels that are not among its 2 classes"),
        (damage_index, "has an index with a wrong checksum"),
    ],
)
def test_damaged_files_are_refused(
    made: tuple[Path, list[np.ndarray]], damage: Callable[[Path], None], message: str
) -> None:
    path, _ = made
    damage(path)
    with pytest.raises(InputError) as caught:
        open_source(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_file_cut_short_is_opened(made: tuple[Path, list[np.ndarray]]) -> None:
    """By bytes, entries of the table, the whole table, into the index, and into the data."""
    path, _ = made
    whole = path.read_bytes()
    entry = ALLOCATION.itemsize
    lengths = (1, entry - 1, entry, entry * 5, entry * COUNT, entry * COUNT + 3, 10_000, len(whole) - 9)
    for missing in lengths:
        path.write_bytes(whole[:-missing])
        with pytest.raises(InputError, match="restore it from where it was copied, or write it again"):
            open_source(path)


def test_replaced_and_deleted_files_stay_readable(made: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    path, encoded = made
    source = open_source(path)
    source.read(0)
    other, _ = make_beton(tmp_path / "other", count=4)
    other.replace(path)
    assert np.array_equal(source.read(COUNT - 1), encoded[COUNT - 1])
    path.unlink()
    assert np.array_equal(source.read(1), encoded[1])
    kept = source.read(2)
    source.close()
    assert np.array_equal(kept, encoded[2])
    with pytest.raises(InputError, match="is missing: restore it"):
        source.read(2)


def test_file_truncated_or_replaced_while_open_is_named(made: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    path, encoded = made
    source = open_source(path)
    assert np.array_equal(source.read(0), encoded[0])
    os.truncate(path, 4096)
    with pytest.raises(InputError, match="was cut short to 4096 of"):
        source.read(0)
    other, _ = make_beton(tmp_path / "other", count=4)
    source.close()
    other.replace(path)
    with pytest.raises(InputError, match="is no longer the file that was opened"):
        source.read(0)


def test_missing_file_of_a_converted_folder(made: tuple[Path, list[np.ndarray]]) -> None:
    path, _ = made
    path.unlink()
    with pytest.raises(InputError, match="is missing"):
        open_source(path.parent)


def test_jpeg_damaged_in_mid_epoch_is_named_and_replaced(
    made: tuple[Path, list[np.ndarray]], caplog: pytest.LogCaptureFixture
) -> None:
    """The file is damaged in place during an epoch."""
    path, _ = made
    source = BetonSource(path)
    order = Order(num_images=COUNT, batch_size=2, seed=3)
    victim = int(order.permutation(0)[-1])
    loader = Loader(source, SPECS, order, decode=DecodeOptions(decoder="pillow", threads=1), prefetch=1)
    batches = loader.epoch(0)
    seen = [next(batches).index.tolist()]
    at = int(source._offset[victim])
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(40))
    with caplog.at_level(logging.WARNING, logger="mvssl.data"):
        seen += [batch.index.tolist() for batch in batches]
    loader.close()
    assert len(seen) == COUNT // 2
    assert all(len(batch) == 2 for batch in seen)
    assert victim not in {index for batch in seen for index in batch}
    assert list(loader.stats.bad) == [source.key(victim)]
    assert f"Image {source.key(victim)} cannot be decoded" in caplog.text


def test_splits_in_one_folder(tmp_path: Path) -> None:
    for name in ("train", "val"):
        made, _ = make_beton(tmp_path / name, count=4)
        made.rename(tmp_path / f"{name}.beton")
    assert split_paths(tmp_path) == (tmp_path / "train.beton", tmp_path / "val.beton")
    (tmp_path / "val.beton").unlink()
    assert split_paths(tmp_path) == (tmp_path / "train.beton", None)
    assert len(open_source(tmp_path / "train.beton")) == 4


def test_page_is_a_power_of_two_that_holds_the_largest_image() -> None:
    assert [page_bytes(n) for n in (0, 1, 1 << 23, (1 << 23) + 1, 1 << 40)] == [1 << 23] * 3 + [1 << 24, 1 << 27]

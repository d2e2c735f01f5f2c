"""Reading files, alone and in batches: the right bytes, or None or an error where they are missing."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.harness.page_cache import cached_fraction, drop
from pipelines import c_library
from pipelines.c_library import load_library
from pipelines.conversion.command import Convert, convert
from pipelines.storage import batch_read, open_source
from pipelines.storage.batch_read import (
    READERS,
    RandomAccessFile,
    advise_files,
    merge_ranges,
    read_files,
    read_ranges,
)
from pipelines.storage.source import ReadsBatches, Source
from tests.samples.beton_samples import make_beton, with_pixels

MIB = 1 << 20
needs_compiler = pytest.mark.skipif(
    isinstance(load_library(batch_read._SOURCE), str), reason="no C compiler: images are read singly"
)


@pytest.fixture
def _no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(c_library, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("CC", "no-such-compiler")
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def files_in(folder: Path, *, count: int) -> tuple[list[str], list[bytes], NDArray[np.int64]]:
    """Names, contents and sizes of files: empty, of one byte, larger than a page, and with odd names."""
    rng = random.Random(0)
    folder.mkdir()
    names = [os.fsencode(folder) + (b"/%d \xff\xe9 '\n" % number) for number in range(count)]
    contents = [rng.randbytes(rng.choice([0, 1, 4095, 4096, 4097, 70_000])) for _ in names]
    for name, content in zip(names, contents, strict=True):
        Path(os.fsdecode(name)).write_bytes(content)
    return [os.fsdecode(name) for name in names], contents, np.array([len(content) for content in contents])


@needs_compiler
@pytest.mark.parametrize("count", [0, 1, READERS - 1, READERS, READERS + 1, 200])
def test_whole_files(count: int, tmp_path: Path) -> None:
    paths, contents, nbytes = files_in(tmp_path / "files", count=count)
    read = read_files(paths, nbytes)
    assert [None if data is None else data.tobytes() for data in read] == contents


@needs_compiler
def test_changed_files_are_none(tmp_path: Path) -> None:
    paths, contents, nbytes = files_in(tmp_path / "files", count=60)
    nbytes[4] += 7  # truncated since
    nbytes[5] -= 1 if nbytes[5] else 0
    longer = next(n for n in range(6, 60) if nbytes[n])
    nbytes[longer] -= 1  # grown since
    os.remove(paths[0])
    os.remove(paths[1])
    Path(paths[1]).mkdir()
    os.remove(paths[2])
    os.symlink(paths[2], paths[2])  # to itself
    os.remove(paths[3])
    os.symlink(paths[4], paths[3])
    nbytes[3] = nbytes[4]
    contents[3] = contents[4]
    read = read_files(paths, nbytes)
    none = {0, 1, 2, longer} | ({5} if contents[5] else set())
    assert {n for n, data in enumerate(read) if data is None} == none
    assert all(data is None or data.tobytes() == contents[n] for n, data in enumerate(read))


@needs_compiler
@pytest.mark.parametrize("headed", [False, True])
def test_parts_of_open_files(headed: bool, tmp_path: Path) -> None:
    rng = random.Random(1)
    contents = [rng.randbytes(50_000), rng.randbytes(3)]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    descriptors = [os.open(tmp_path / str(number), os.O_RDONLY) for number in range(2)]
    which = [rng.choice([0, 0, 1]) for _ in range(300)]
    offset = [rng.randrange(len(contents[n]) + 1) for n in which]
    size = [rng.randrange(0, 4000) for _ in which]
    heads = [rng.choice([b"", b"P6\n12 9\n255\n"]) for _ in which] if headed else []
    read = read_ranges([descriptors[n] for n in which], offset, np.array(size), heads=heads)
    seen = {"whole": 0, "short": 0}
    for n, at, count, head, data in zip(which, offset, size, heads or [b""] * 300, read, strict=True):
        whole = at + count <= len(contents[n])
        seen["whole" if whole else "short"] += 1
        assert (data is not None) == whole
        if data is not None:
            assert data.tobytes() == head + contents[n][at : at + count]
            assert not data.flags.writeable
    assert min(seen.values()) > 10
    for descriptor in descriptors:
        os.close(descriptor)
    assert read_ranges(descriptors[:1], [0], np.array([10])) == [
        None
    ]  # a closed file: reading it singly names the error


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """The same JPEGs as a folder, shards and a beton, and a beton of pixels."""
    base = tmp_path_factory.mktemp("stores")
    beton, _ = make_beton(base)
    pixels, _ = with_pixels(base)
    convert(Convert(src=base / "src", dst=base / "shards", shard_size=0.01))
    paths = {"folder": base / "src", "shards": base / "shards", "beton": beton, "pixels": pixels}
    return {name: open_source(path) for name, path in paths.items()}


@needs_compiler
@pytest.mark.parametrize("store", ["folder", "shards", "beton", "pixels"])
def test_every_storage_reads_the_same_bytes_in_a_batch(store: str, stores: dict[str, Source]) -> None:
    source = stores[store]
    assert isinstance(source, ReadsBatches)
    indices = [*reversed(range(len(source))), 0, 0]
    read = source.read_batch(indices)
    assert len(read) == len(indices)
    for index, data in zip(indices, read, strict=True):
        assert data is not None
        assert data.tobytes() == source.read(index).tobytes()


@needs_compiler
def test_advised_files_come_into_the_page_cache(tmp_path: Path) -> None:
    paths, _, nbytes = files_in(tmp_path / "files", count=20)
    os.remove(paths[3])
    files = [Path(path) for path in paths if os.path.exists(path)]
    drop(files)
    if cached_fraction(files) > 0.1:
        pytest.skip("files on this disk are always in the page cache")
    assert advise_files(paths, nbytes, limit=8192)
    for _ in range(100):
        if cached_fraction(files) == 1:
            return
        time.sleep(0.05)
    pytest.fail(f"only {cached_fraction(files):.0%} came into the page cache")


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_images_are_read_singly(stores: dict[str, Source], tmp_path: Path) -> None:
    paths, _, nbytes = files_in(tmp_path / "files", count=3)
    assert read_files(paths, nbytes) == [None] * 3
    assert not advise_files(paths, nbytes, limit=1000)
    for source in stores.values():
        assert isinstance(source, ReadsBatches)
        assert source.read_batch(range(len(source))) == [None] * len(source)
        source.will_need(range(len(source)))  # type: ignore[attr-defined]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_reads_bytes_with_a_head_and_none_beyond_the_end(path: Path) -> None:
    file, content = RandomAccessFile(path), path.read_bytes()
    read = file.read(offset=1000, size=300, head=b"P6\n")
    assert read is not None
    assert read.tobytes() == b"P6\n" + content[1000:1300]
    assert file.read(offset=10_000, size=241) is None
    empty = file.read(offset=5, size=0)
    assert empty is not None
    assert empty.size == 0
    os.truncate(path, 1100)
    assert file.nbytes == 1100
    assert file.read(offset=1000, size=300) is None
    assert read.tobytes() == b"P6\n" + content[1000:1300]  # a copy


def test_the_file_is_closed_with_its_last_reference(path: Path) -> None:
    file = RandomAccessFile(path)
    descriptor = file.descriptor
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    with pytest.raises(FileNotFoundError):
        RandomAccessFile(path.parent / "missing")


def test_neighbours_are_merged_up_to_a_mebibyte() -> None:
    def found(*parts: tuple[int, int]) -> list[tuple[int, int]]:
        offset, size = np.array(parts, dtype=np.int64).reshape(-1, 2).T
        return list(merge_ranges(offset, size))

    assert found() == []
    assert found((5000, 1000), (0, 4000)) == [(0, 6000)]  # over a gap of 1000
    assert found((0, 4000), (4000 + MIB, 10)) == [(0, 4000), (4000 + MIB, 4010 + MIB)]
    assert found((10, 2 * MIB), (10 + 2 * MIB, MIB // 2)) == [
        (10, 10 + MIB),
        (10 + MIB, 10 + 2 * MIB),
        (10 + 2 * MIB, 10 + 2 * MIB + MIB // 2),
    ]
    assert found((0, 100), (20, 30)) == [(0, 100)]  # one within the other


def test_ranges_are_limited_to_what_the_device_reads_ahead(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    sysfs = {
        "/sys/class/bdi/8:1/read_ahead_kb": "128",
        "/sys/dev/block/8:1/../queue/max_sectors_kb": "256",
        "/sys/class/bdi/8:16/read_ahead_kb": "8192",
        "/sys/class/bdi/0:45/read_ahead_kb": "64",
        "/sys/class/bdi/0:46/read_ahead_kb": "0",
    }

    def read_text(self: Path) -> str:
        if str(self) not in sysfs:
            raise FileNotFoundError(str(self))
        return sysfs[str(self)]

    monkeypatch.setattr(Path, "read_text", read_text)
    batch_read.max_read_ahead.cache_clear()
    expected = {(8, 1): 256 << 10, (8, 16): MIB, (0, 45): 64 << 10, (0, 46): 4096, (0, 47): 128 << 10}
    assert {pair: batch_read.max_read_ahead(os.makedev(*pair)) for pair in expected} == expected
    batch_read.max_read_ahead.cache_clear()
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, start, size, _what: asked.append((start, size)))
    monkeypatch.setattr(batch_read, "max_read_ahead", lambda _device: 4096)
    RandomAccessFile(path).will_need([0, 6000], [5000, 3000])
    assert asked == [(0, 4096), (4096, 4096), (8192, 808)]


@given(parts=st.lists(st.tuples(st.integers(0, 10**7), st.integers(1, 10**6)), max_size=30))
def test_merged_ranges_cover_all_and_little_else(parts: list[tuple[int, int]]) -> None:
    offset, size = np.array(parts, dtype=np.int64).reshape(-1, 2).T
    found = list(merge_ranges(offset, size))
    assert all(0 < end - start <= MIB for start, end in found)
    assert all(a[1] <= b[0] for a, b in pairwise(found))
    wanted, given_ = np.zeros(12 * 10**6, bool), np.zeros(12 * 10**6, bool)
    for start, length in parts:
        wanted[start : start + length] = True
    for start, end in found:
        given_[start:end] = True
    assert (given_ | ~wanted).all()
    assert given_.sum() - wanted.sum() <= max(0, len(parts) - 1) * 65536

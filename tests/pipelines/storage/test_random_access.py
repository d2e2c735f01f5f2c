"""Reading at places of an open file: the right bytes, or a word that they are not there."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.storage import batch_read
from pipelines.storage.batch_read import RandomAccessFile, merge_ranges

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_gives_bytes_with_a_head_and_none_behind_the_end(path: Path) -> None:
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


def test_the_file_is_closed_when_nobody_refers_to_it(path: Path) -> None:
    file = RandomAccessFile(path)
    descriptor = file.descriptor
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    with pytest.raises(FileNotFoundError):
        RandomAccessFile(path.parent / "missing")


def test_neighbours_are_read_ahead_in_one_piece_of_at_most_a_mebibyte() -> None:
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


def test_pieces_are_no_longer_than_the_device_reads_at_once(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    told = {
        "/sys/class/bdi/8:1/read_ahead_kb": "128",
        "/sys/dev/block/8:1/../queue/max_sectors_kb": "256",
        "/sys/class/bdi/8:16/read_ahead_kb": "8192",
        "/sys/class/bdi/0:45/read_ahead_kb": "64",
        "/sys/class/bdi/0:46/read_ahead_kb": "0",
    }

    def read_text(self: Path) -> str:
        if str(self) not in told:
            raise FileNotFoundError(str(self))
        return told[str(self)]

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
def test_pieces_hold_every_part_and_little_else(parts: list[tuple[int, int]]) -> None:
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

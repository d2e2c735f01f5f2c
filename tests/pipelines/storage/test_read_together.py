"""Many images read in one C call: the bytes that Python reads, or a word to read one by itself."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.measuring.page_cache import cached_share, drop
from pipelines import c_library
from pipelines.c_library import load_library
from pipelines.storage import batch_read, open_source
from pipelines.storage.batch_read import READERS, advise_files, read_files, read_ranges
from pipelines.storage.source import ReadsBatches, Source
from tests.samples.beton_samples import make_beton, with_pixels
from tools.convert import Convert, convert

needs_compiler = pytest.mark.skipif(
    isinstance(load_library(batch_read._SOURCE), str), reason="no C compiler: images are read one by one"
)


@pytest.fixture
def _no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(c_library, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("CC", "no-such-compiler")
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def files_in(folder: Path, *, count: int) -> tuple[list[str], list[bytes], NDArray[np.int64]]:
    """Names, contents and sizes of files: empty ones, of one byte, larger than a page, and with odd names."""
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
def test_files_that_are_not_as_they_were(tmp_path: Path) -> None:
    paths, contents, nbytes = files_in(tmp_path / "files", count=60)
    nbytes[4] += 7  # it has been cut short since
    nbytes[5] -= 1 if nbytes[5] else 0
    longer = next(n for n in range(6, 60) if nbytes[n])
    nbytes[longer] -= 1  # it has grown since
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
    assert read_ranges(descriptors[:1], [0], np.array([10])) == [None]  # closed: an error, which reading it alone names


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
def test_every_storage_gives_what_it_reads_one_by_one(store: str, stores: dict[str, Source]) -> None:
    source = stores[store]
    assert isinstance(source, ReadsBatches)
    indices = [*reversed(range(len(source))), 0, 0]
    read = source.read_batch(indices)
    assert len(read) == len(indices)
    for index, data in zip(indices, read, strict=True):
        assert data is not None
        assert data.tobytes() == source.read(index).tobytes()


@needs_compiler
def test_files_are_in_memory_before_they_are_read(tmp_path: Path) -> None:
    paths, _, nbytes = files_in(tmp_path / "files", count=20)
    os.remove(paths[3])
    files = [Path(path) for path in paths if os.path.exists(path)]
    drop(files)
    if cached_share(files) > 0.1:
        pytest.skip("files here lie in memory whatever one does")
    assert advise_files(paths, nbytes, limit=8192)
    for _ in range(100):
        if cached_share(files) == 1:
            return
        time.sleep(0.05)
    pytest.fail(f"only {cached_share(files):.0%} came into memory")


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_each_is_read_by_itself(stores: dict[str, Source], tmp_path: Path) -> None:
    paths, _, nbytes = files_in(tmp_path / "files", count=3)
    assert read_files(paths, nbytes) == [None] * 3
    assert not advise_files(paths, nbytes, limit=1000)
    for source in stores.values():
        assert isinstance(source, ReadsBatches)
        assert source.read_batch(range(len(source))) == [None] * len(source)
        source.will_need(range(len(source)))  # type: ignore[attr-defined]

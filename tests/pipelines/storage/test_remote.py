"""Converted data at URLs: the same images as on a disk, each fault repeated or named, one cache for all processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.conversion.command import Convert, convert
from pipelines.runtime import InputError
from pipelines.storage import RemoteOptions, open_source, split_paths
from pipelines.storage.block_cache import BlockCache
from pipelines.storage.given import source_of
from pipelines.storage.remote import RemoteShards
from pipelines.storage.remote_files import parse_size
from tests.samples.remote_server import RemoteFolder
from tests.samples.tiny_runs import write_images

pytest.importorskip("aiohttp")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    for split, seed in (("train", 0), ("val", 1)):
        write_images(root / "images" / split, classes=2, per_class=40, seed=seed)
        convert(Convert(src=root / "images" / split, dst=root / "data" / split, shard_size=0.06))
    return root / "data"


@pytest.fixture
def served(converted: Path, tmp_path: Path) -> Iterator[RemoteFolder]:
    """A copy at a URL."""
    with RemoteFolder(Path(shutil.copytree(converted, tmp_path / "data"))) as server:
        yield server


def options(tmp_path: Path, **changes: Any) -> RemoteOptions:
    return RemoteOptions(**{"cache": tmp_path / "cache", "block": "64KiB", "retries": 3, "timeout": 1.0, **changes})


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.storage.remote_files._FIRST_WAIT", 0.01)


def opened(url: str, remote: RemoteOptions) -> RemoteShards:
    source = open_source(url, remote=remote)
    assert isinstance(source, RemoteShards)
    return source


def check_same(source: RemoteShards, local: Path) -> None:
    """All images in a shuffled order, in batches that were announced, twice."""
    plain = open_source(local)
    assert source.fingerprint == plain.fingerprint
    order = np.random.default_rng(0).permutation(len(plain))
    for _ in range(2):
        for at in range(0, len(order), 16):
            source.will_need(order[at : at + 32].tolist())
            batch = order[at : at + 16].tolist()
            for index, data in zip(batch, source.read_batch(batch), strict=True):
                assert data is not None
                assert np.array_equal(data, plain.read(index))
                assert source.key(index) == plain.key(index)
    assert np.array_equal(source.read(3), plain.read(3))


def test_same_images_and_splits(served: RemoteFolder, converted: Path, tmp_path: Path) -> None:
    remote = options(tmp_path)
    train, val = split_paths(served.url, remote=remote)
    assert (str(train), str(val)) == (f"{served.url}/train", f"{served.url}/val")
    assert split_paths(train, remote=remote) == (train, None)
    source = opened(str(train), remote)
    assert str(source.location) == f"{served.url}/train"
    check_same(source, converted / "train")
    parts = served.faults.parts()
    assert len(parts) == len(set(parts))  # nothing twice: the second epoch is read from the cache
    source.close()
    again = opened(str(train), remote)
    check_same(again, converted / "train")
    assert served.faults.parts() == parts


@pytest.mark.parametrize("size", ["0", "100KB"])
def test_cache_without_room(served: RemoteFolder, converted: Path, tmp_path: Path, size: str) -> None:
    source = opened(f"{served.url}/train", options(tmp_path, cache_size=size))
    check_same(source, converted / "train")
    held = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*-*") if path.is_file())
    assert held <= parse_size(size, "")
    source.close()


def test_server_without_ranges(served: RemoteFolder, converted: Path, tmp_path: Path) -> None:
    served.faults.ranges = False
    source = opened(f"{served.url}/train", options(tmp_path))
    check_same(source, converted / "train")
    shards = len(source.manifest.shards)
    source.close()
    before = len(served.faults.parts())
    check_same(opened(f"{served.url}/train", options(tmp_path)), converted / "train")
    assert len(served.faults.parts()) == before  # the whole shards left all of their blocks in the cache
    assert shards > 1


@pytest.mark.parametrize("fault", [503, 429, 500, 408, -1, -2])
def test_faults_that_pass(served: RemoteFolder, converted: Path, tmp_path: Path, fault: int) -> None:
    served.faults.status = lambda path, number: fault if number == 1 and path.endswith("0.tar") else 0
    check_same(opened(f"{served.url}/train", options(tmp_path)), converted / "train")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (503, "4 attempts .* status 503: check the network"),
        (-1, "4 attempts"),
        (403, "status 403"),
        (400, "status 400"),
    ],
)
def test_faults_that_stay(served: RemoteFolder, tmp_path: Path, fault: int, words: str) -> None:
    source = opened(f"{served.url}/train", options(tmp_path))
    served.faults.status = lambda path, number: fault if path.endswith(".tar") else 0
    with pytest.raises(InputError, match=words) as caught:
        source.read_batch(list(range(8)))
    assert f"{served.url}/train/shard-000000.tar" in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.part"))
    served.faults.status = lambda path, number: 0
    assert all(data is not None for data in source.read_batch(list(range(8))))


def test_dead_server(served: RemoteFolder, tmp_path: Path) -> None:
    source = opened(f"{served.url}/train", options(tmp_path))
    served.__exit__()
    with pytest.raises(InputError, match="4 attempts"):
        source.read(0)
    with pytest.raises(InputError, match="4 attempts"):
        open_source(f"{served.url}/train", remote=options(tmp_path))


@pytest.mark.parametrize("same_size", [True, False])
def test_changed_shard(served: RemoteFolder, tmp_path: Path, same_size: bool) -> None:
    source = opened(f"{served.url}/train", options(tmp_path))
    shard = tmp_path / "data/train/shard-000000.tar"
    source.read(0)
    content = bytearray(shard.read_bytes())
    content[-len(content) // 2 :] = bytes(len(content) // 2 if same_size else 10)
    shard.write_bytes(content)
    first = [index for index in range(len(source)) if source._shard[index] == 0]
    with pytest.raises(InputError, match=r"shard-000000\.tar was changed"):
        source.read_batch(first)


def test_corrupt_answers(served: RemoteFolder, converted: Path, tmp_path: Path) -> None:
    served.faults.ranges = False
    served.faults.flip = {"/train/shard-000000.tar": 1}
    check_same(opened(f"{served.url}/train", options(tmp_path)), converted / "train")
    assert served.faults.flip == {"/train/shard-000000.tar": 0}


def test_corrupt_cache_is_fetched_again(served: RemoteFolder, converted: Path, tmp_path: Path) -> None:
    check_same(opened(f"{served.url}/train", options(tmp_path)), converted / "train")
    blocks = [path for path in (tmp_path / "cache").rglob("*-*") if path.is_file()]
    for path in blocks:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content[: -len(content) // 3] if path == blocks[-1] else content)
    for path in (tmp_path / "cache").glob("index-*/*"):
        path.write_bytes(path.read_bytes()[:-1])
    check_same(opened(f"{served.url}/train", options(tmp_path)), converted / "train")


def test_cache_that_cannot_be_written(
    served: RemoteFolder, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, logger="mvssl.data"):
        check_same(opened(f"{served.url}/train", options(tmp_path, cache=tmp_path / "file")), converted / "train")
    assert [record.message for record in caplog.records if "without a cache" in record.message][1:] == []
    assert "without a cache" in caplog.text


def _read_all(url: str, remote: RemoteOptions) -> None:
    source = open_source(url, remote=remote)
    assert isinstance(source, RemoteShards)
    assert all(data is not None for data in source.read_batch(list(range(len(source)))))
    source.close()


def test_ranks_share_what_is_fetched(served: RemoteFolder, tmp_path: Path) -> None:
    served.faults.delay = 0.02
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_read_all, args=(f"{served.url}/train", options(tmp_path))) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    parts = served.faults.parts()
    assert parts
    assert len(parts) == len(set(parts))


def test_reads_after_a_fork(served: RemoteFolder, tmp_path: Path) -> None:
    source = opened(f"{served.url}/train", options(tmp_path, cache_size="0"))
    expected = source.read(0)
    child = os.fork()
    if not child:
        try:
            os._exit(0 if np.array_equal(source.read(0), expected) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_eviction_keeps_the_bound(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", 10_000)
    for number in range(40):
        assert cache.get(f"a/{number}", lambda: bytes(900)) is None
        held = sum(path.stat().st_size for path in (tmp_path / "cache/a").iterdir())
        assert held <= 10_000
        os.utime(cache.path(f"a/{number}"), (number, number))
    assert cache.path("a/39").exists()
    assert not cache.path("a/0").exists()
    assert len(cache.get("a/big", lambda: bytes(20_000)) or b"") == 20_000
    with pytest.raises(ZeroDivisionError):
        cache.get("a/none", lambda: bytes(1 // 0))
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/data", "must be a path or begin with one of s3://"),
        ("gs://bucket/data", "gcsfs"),
        ("http://127.0.0.1:{port}/nothing", "has no manifest.json, but must be data converted"),
    ],
)
def test_addresses_of_nothing(served: RemoteFolder, tmp_path: Path, url: str, words: str) -> None:
    where = url.format(port=served.url.rpartition(":")[2])
    with pytest.raises(InputError, match=words):
        open_source(split_paths(where, remote=options(tmp_path))[0], remote=options(tmp_path))


@pytest.mark.parametrize(
    "changes", [{"cache_size": "much"}, {"block": "1"}, {"cache": Path("s3://b")}, {"retries": -1}, {"timeout": 0.0}]
)
def test_wrong_options(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"remote.{next(iter(changes))}"):
        options(tmp_path, **changes)


def test_a_list_may_name_urls(served: RemoteFolder, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(converted.parent / "user"))
    both = source_of([f"{served.url}/train", f"{served.url}/val"])
    plain = [open_source(converted / name) for name in ("train", "val")]
    assert len(both) == len(plain[0]) + len(plain[1])
    assert np.array_equal(both.read(len(plain[0]) + 3), plain[1].read(3))


def test_sizes() -> None:
    sizes = {"200GB": 200 * 10**9, "4MiB": 4 << 20, "1.5t": 15 * 10**11, "4096": 4096, "7 kb": 7000, "0": 0}
    assert {text: parse_size(text, "") for text in sizes} == sizes

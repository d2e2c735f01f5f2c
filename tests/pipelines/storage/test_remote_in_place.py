"""Tars, zips and Parquet at URLs: the images of the same files on a disk, with the faults of networks."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.conversion.command import Convert, convert
from pipelines.runtime import InputError
from pipelines.storage import RemoteOptions, Source, open_source, split_paths
from pipelines.storage.source import ReadsAhead, ReadsBatches
from tests.samples.form_samples import CLASSES, Item, contents, encoded
from tests.samples.remote_server import RemoteFolder

pytest.importorskip("aiohttp")
URLS = {
    "tars": "wds/part-{00..02}.tar",
    "zip": "stored.zip",
    "packed zip": "deflated.zip",
    "parquet": "data/{train-00000,train-00001}-of-00002.parquet",
}


def images(count: int = 48) -> list[Item]:
    return [Item(f"{n:03d}.jpg", encoded(n, size=(80, 100)), CLASSES[n % 3]) for n in range(count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    (root / "wds").mkdir()
    (root / "data").mkdir()
    given = images()
    for number in range(3):
        with tarfile.open(root / f"wds/part-{number:02d}.tar", "w") as archive:
            for item in given[number::3]:
                for name, data in ((item.name, item.data), (item.name[:-3] + "cls", item.label.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(root / f"{name}.zip", "w", method) as packed:
            for item in given:
                packed.writestr(f"{item.label}/{item.name}", item.data)
    for number, some in enumerate((given[:24], given[24:])):
        rows = [{"bytes": item.data, "path": item.name} for item in some]
        table = pa.table({"image": rows, "label": [item.label for item in some]})
        pq.write_table(table, root / f"data/train-{number:05d}-of-00002.parquet", row_group_size=8)
    return root


@pytest.fixture
def served(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteFolder]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr("pipelines.storage.remote_files._FIRST_WAIT", 0.01)
    with RemoteFolder(Path(shutil.copytree(files, tmp_path / "data"))) as server:
        yield server


def options(tmp_path: Path, **changes: Any) -> RemoteOptions:
    return RemoteOptions(**{"cache": tmp_path / "cache", "block": "64KiB", "retries": 2, "timeout": 1.0, **changes})


def check_same(source: Source) -> None:
    """Every image and label, in shuffled batches that were announced, twice."""
    expected = {(item.data, item.label) for item in images()}
    order = np.random.default_rng(0).permutation(len(source))
    assert isinstance(source, ReadsAhead)
    for _ in range(2):
        found: list[tuple[bytes, str]] = []
        for at in range(0, len(order), 12):
            source.will_need(order[at : at + 24].tolist())
            batch = order[at : at + 12].tolist()
            read = source.read_batch(batch) if isinstance(source, ReadsBatches) else [source.read(n) for n in batch]
            assert all(data is not None for data in read)
            names = [source.classes[label] for label in source.labels[batch]]
            found.extend((np.asarray(data).tobytes(), name) for data, name in zip(read, names, strict=True))
        assert set(found) == expected
        assert len(found) == len(expected)


@pytest.mark.parametrize("form", URLS)
@pytest.mark.parametrize("changes", [{}, {"cache_size": "100KB", "connections": 1}])
def test_same_images(served: RemoteFolder, tmp_path: Path, form: str, changes: dict[str, Any]) -> None:
    remote = options(tmp_path, **changes)
    url = f"{served.url}/{URLS[form]}"
    assert split_paths(url, remote=remote)[1] is None
    source = open_source(url, remote=remote)
    check_same(source)
    source.close()
    if "cache_size" in changes:
        return
    asked = [one for one in served.faults.asked if one[0] == "GET"]
    again = open_source(url, remote=remote)
    assert again.fingerprint == source.fingerprint
    check_same(again)
    assert [one for one in served.faults.asked if one[0] == "GET"] == asked  # index and blocks are cached
    again.close()


@pytest.mark.parametrize("form", URLS)
def test_server_without_ranges(served: RemoteFolder, tmp_path: Path, form: str) -> None:
    served.faults.ranges = False
    source = open_source(f"{served.url}/{URLS[form]}", remote=options(tmp_path))
    check_same(source)
    source.close()


@pytest.mark.parametrize("form", URLS)
@pytest.mark.parametrize("fault", [429, -1])
def test_faults_that_pass(served: RemoteFolder, tmp_path: Path, form: str, fault: int) -> None:
    served.faults.status = lambda path, number: fault if number % 3 == 1 else 0
    check_same(open_source(f"{served.url}/{URLS[form]}", remote=options(tmp_path)))


@pytest.mark.parametrize("form", URLS)
def test_faults_that_stay(served: RemoteFolder, tmp_path: Path, form: str) -> None:
    remote = options(tmp_path, cache_size="0")
    url = f"{served.url}/{URLS[form]}"
    open_source(url, remote=remote).close()
    source = open_source(url, remote=remote)
    served.faults.status = lambda path, number: 503
    with pytest.raises(InputError, match=r"3 attempts .* status 503: check the network"):
        [source.read(n) for n in range(len(source))]
    served.faults.status = lambda path, number: 0
    check_same(source)


@pytest.mark.parametrize("form", URLS)
@pytest.mark.parametrize("same_size", [True, False])
def test_changed_file(served: RemoteFolder, tmp_path: Path, form: str, same_size: bool) -> None:
    remote = options(tmp_path, cache_size="0")
    source = open_source(f"{served.url}/{URLS[form]}", remote=remote)
    source.close()
    for path in (tmp_path / "data").rglob("*.*"):
        content = path.read_bytes()
        path.write_bytes(content[::-1] if same_size else content[: len(content) // 2])
        os.utime(path, (1_000_000_000, 1_000_000_000))
    with pytest.raises(InputError, match="was changed since it was indexed"):
        [source.read(n) for n in range(len(source))]
    with pytest.raises(InputError, match=r"truncated or damaged|begin as|no manifest"):
        open_source(f"{served.url}/{URLS[form]}", remote=remote)


@pytest.mark.parametrize("form", URLS)
def test_damaged_cache_is_fetched_again(served: RemoteFolder, tmp_path: Path, form: str) -> None:
    url = f"{served.url}/{URLS[form]}"
    source = open_source(url, remote=options(tmp_path))
    check_same(source)
    source.close()
    for path in (tmp_path / "cache").rglob("*"):
        if path.is_file() and path.name != "used":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)
    check_same(open_source(url, remote=options(tmp_path)))


@pytest.mark.parametrize("form", URLS)
def test_conversion(served: RemoteFolder, tmp_path: Path, form: str) -> None:
    convert(Convert(src=Path(f"{served.url}/{URLS[form]}"), dst=tmp_path / "out", remote=options(tmp_path)))
    assert contents(tmp_path / "out") == {(item.data, item.label) for item in images()}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("wds/part-{00..03}.tar", "not all exist: .*part-03.tar does not exist"),
        ("none.tar", "does not exist"),
        ("wds/*.tar", "names no file that its server lists"),
        ("list.zip", "holds data of the form|damaged|no manifest"),
        ("x.h5", "form hdf5 but must be converted data, tars, zips or Parquet at a URL: download it"),
    ],
)
def test_what_cannot_be_read(served: RemoteFolder, tmp_path: Path, url: str, words: str) -> None:
    (tmp_path / "data/list.zip").write_bytes(b"PK\3\4" + bytes(100))
    (tmp_path / "data/x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(InputError, match=words):
        open_source(f"{served.url}/{url}", remote=options(tmp_path))


def test_reads_after_a_fork(served: RemoteFolder, tmp_path: Path) -> None:
    for form in URLS:
        source = open_source(f"{served.url}/{URLS[form]}", remote=options(tmp_path, cache_size="0"))
        expected = source.read(0)
        child = os.fork()
        if not child:
            try:
                os._exit(0 if np.array_equal(source.read(0), expected) and len(source.read(40)) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_folders_of_s3(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boto3, server_of = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    server = server_of.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="files")
        for path in files.rglob("*.*"):
            client.upload_file(str(path), "files", f"my data/{path.parent.name}%20/{path.name}")
        client.put_object(Bucket="files", Key="my data/wds%20/README.md", Body=b"text")
        client.put_object(Bucket="files", Key="photos/cat/a.jpg", Body=images(1)[0].data)
        for url in ("wds%20", "data%20/train-*.parquet", "wds%20/part-{00..02}.tar"):
            source = open_source(f"s3://files/my data/{url}", remote=options(tmp_path))
            check_same(source)
            source.close()
        with pytest.raises(InputError, match=r"holds image files .* but must be converted data"):
            open_source("s3://files/photos", remote=options(tmp_path))
        with pytest.raises(InputError, match=r"no manifest\.json"):
            open_source("s3://files/nothing", remote=options(tmp_path))
    finally:
        server.stop()

"""Converted data and files that lie, or whose bits have flipped: refused in a sentence, or bad images with a name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.decode import ImageLimits, make_decoder
from pipelines.loading.fetch import Fetcher
from pipelines.runtime import InputError
from pipelines.storage import open_source, shards
from pipelines.storage.batch_read import RandomAccessFile
from tools.convert import Convert, convert

COUNT = 6


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of two classes as PNG files, and converted to shards and .beton."""
    base = tmp_path_factory.mktemp("converted")
    random = np.random.default_rng(0)
    for number in range(COUNT):
        folder = base / "files" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    convert(Convert(src=base / "files", dst=base / "shards", shard_size=0.008))
    convert(Convert(src=base / "files", dst=base / "beton", format="beton"))
    return base


def opened(folder: Path) -> Any:
    return open_source(folder)


def copied(converted: Path, form: str, to: Path) -> Path:
    shutil.copytree(converted / form, to / form)
    return to / form


def fetch(folder: Path) -> dict[int, str]:
    """Reasons of the images that cannot be used."""
    decoder = make_decoder("pillow", device=torch.device("cpu"), batch_size=COUNT, threads=1)
    source = open_source(folder)
    fetcher = Fetcher(source, decoder)
    failures = dict(fetcher(list(range(len(source)))).failures)
    fetcher.close()
    return failures


def change_index(folder: Path, field: str, value: int) -> None:
    """Set a field of entry 3 and make the checksum right."""
    rows = np.load(folder / "index.npy")
    rows[field][3] = value
    np.save(folder / "index.npy", rows)
    change_manifest(
        folder,
        lambda m: m["sha256"].update({"index.npy": hashlib.sha256((folder / "index.npy").read_bytes()).hexdigest()}),
    )


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("offset", value) for value in (-1, -(2**63), 2**62, 10**6)],
        *[("size", value) for value in (-1, 0, 2**40, 2**63 - 1, 10**6)],
        *[("key_end", value) for value in (-4, 2**40, 0)],
        *[("shard", value) for value in (-1, 99, 2**31 - 1)],
        *[("height", value) for value in (-40, 0, 2**31 - 1)],
        *[("width", value) for value in (-1, 0, 2**31 - 1)],
        *[("label", value) for value in (-2, 2, 10**6)],
    ],
)
def test_an_index_that_lies_is_refused_before_anything_is_read(
    field: str, value: int, converted: Path, tmp_path: Path
) -> None:
    folder = copied(converted, "shards", tmp_path)
    change_index(folder, field, value)
    with pytest.raises(InputError, match=r"(index|keys)\.npy .*(entry|of)") as refused:
        open_source(folder)
    assert "restore it" in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["shards"][0].update(name="../../outside.tar"),
        lambda m: m["shards"][0].update(name="/etc/passwd"),
        lambda m: m["shards"][0].update(name=7),
        lambda m: m["shards"][0].update(name="shard-000000.tar\n"),
        lambda m: m["shards"][0].update(bytes=-1),
        lambda m: m["shards"][0].update(bytes="many"),
        lambda m: m["shards"][0].update(extra=1),
        lambda m: m.update(shards=None),
        lambda m: m.update(shards=[1]),
        lambda m: m.update(count=10**30),
        lambda m: m.update(count=2.5),
        lambda m: m.update(count=-1),
        lambda m: m.update(classes=[1, 2]),
        lambda m: m.update(classes=5),
        lambda m: m.update(sha256=[]),
        lambda m: m.update(plan=3),
        lambda m: m.update(damage={"99": "x"}),
        lambda m: m.update(damage=[1]),
        lambda m: m.update(fingerprint=None),
    ],
)
def test_a_manifest_that_lies_is_refused(
    change: Callable[[dict[str, Any]], Any], converted: Path, tmp_path: Path
) -> None:
    folder = copied(converted, "shards", tmp_path)
    change_manifest(folder, change)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        open_source(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"format":' * 50_000, "\0", "", "null", "[]", '"mvssl-shards"'])
def test_a_manifest_that_is_none_is_refused(content: str, converted: Path, tmp_path: Path) -> None:
    folder = copied(converted, "shards", tmp_path)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json"):
        open_source(folder)


@pytest.mark.parametrize("form", ["shards", "beton"])
def test_a_flipped_bit_of_an_image_is_a_bad_image_with_its_name(
    form: str, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(converted, form, tmp_path)
    options: dict[str, Any] = {"shard_size": 0.008} if form == "shards" else {"format": "beton"}
    convert(Convert(src=converted / "files", dst=folder, **options, verify=True))
    assert "holds all 6 images of this conversion already" in (said := capsys.readouterr().out)
    assert "all 6 images have their checksums" in said
    source = open_source(folder)
    assert fetch(folder) == {}
    data = source.read(5)
    file = next(path for path in folder.iterdir() if data[-1000:].tobytes() in path.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.index(data[-1000:].tobytes()) + 500] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"has 1 damaged images of 6 \(b/5\): restore it"):
        convert(Convert(src=converted / "files", dst=folder, **options, verify=True))
    assert fetch(folder) == {5: "its bytes are not those that were written (checksum)"}


def test_data_of_an_earlier_version_has_no_checksums(converted: Path, tmp_path: Path) -> None:
    folder = copied(converted, "shards", tmp_path)
    (folder / "checksums.npy").unlink()
    with pytest.raises(InputError, match=r"checksums\.npy is missing"):
        open_source(folder)
    change_manifest(folder, lambda m: m["sha256"].pop("checksums.npy"))
    assert shards.ShardSource(folder).facts.checksums is None
    assert fetch(folder) == {}


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


def link_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_fifo, make_socket, link_device])
def test_pipes_sockets_and_devices_are_no_images(
    make: Callable[[Path], None],
    converted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = copied(converted, "files", tmp_path)
    monkeypatch.chdir(folder / "a")  # names of sockets are short
    make(Path("pipe.jpg"))
    assert len(open_source(folder)) == COUNT
    assert "1 that are pipes, sockets or devices" in caplog.text


@pytest.mark.parametrize("make", [make_fifo, link_device])
def test_a_file_that_became_a_pipe_is_a_bad_image(
    make: Callable[[Path], None], converted: Path, tmp_path: Path
) -> None:
    """In one call for the batch, and one by one."""
    folder = copied(converted, "files", tmp_path)
    source = opened(folder)
    path = folder / source.key(1)
    path.unlink()
    make(path)
    assert [data is None for data in source.read_batch(range(COUNT))] == [False, True, *[False] * 4]
    with pytest.raises(OSError, match="no regular file"):
        source.read(1)
    with pytest.raises(OSError, match="no regular file"):
        RandomAccessFile(path)


def test_a_huge_file_is_a_bad_image_and_is_not_read(converted: Path, tmp_path: Path) -> None:
    folder = copied(converted, "files", tmp_path)
    most = ImageLimits().bytes
    with (folder / "a" / "huge.jpg").open("wb") as file:
        file.truncate(6 * most)  # sparse
    source = opened(folder)
    assert source.read_batch([source.nbytes.argmax()]) == [None]
    assert list(fetch(folder).values()) == [
        f"its {6 * most:,} bytes are more than the allowed {most:,}: make it smaller, or raise --limits.bytes"
    ]

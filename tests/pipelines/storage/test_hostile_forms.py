"""Archives, tables and records that lie are refused in one sentence before memory or time is spent, and stay inside."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.runtime import InputError
from pipelines.storage.forms import Request, blobs, find_form, open_form
from pipelines.storage.forms.look import look_at
from pipelines.storage.forms.safe_pickle import RefusedPickleError, load_plain
from pipelines.storage.source import Source
from tests.pipelines.conversion.test_record_forms import write as write_lmdb
from tests.samples.form_samples import encoded

IMAGE = encoded(1)
ZEROS = bytes(1 << 20)
ROWS = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bombs of the tests are small."""
    monkeypatch.setattr(blobs, "_SMALL", 1 << 16)


def opened(path: Path) -> Source:
    look = look_at(path)
    assert look is not None
    form = find_form(look)
    assert form is not None
    return next(iter(open_form(form, look, Request()).splits.values()))


def outcomes(source: Source) -> list[str]:
    """What reading each image says; "" if it is read."""
    found = []
    for index in range(len(source)):
        try:
            source.read(index)
            found.append("")
        except OSError as error:
            found.append(str(error))
    source.close()
    return found


def archive(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as opened:
        for name, data in members.items():
            opened.writestr(name, data)
    return path


def text_bomb(folder: Path) -> Path:
    images = {f"tiny/{split}/{n}.jpg": IMAGE for split in ("train/a", "val/images") for n in range(2)}
    return archive(folder / "a.zip", images | {"tiny/val/val_annotations.txt": ZEROS})


def packed_file_bomb(folder: Path) -> Path:
    images = bytes([0, 0, 8, 3]) + struct.pack(">3I", 1024, 32, 32) + ZEROS
    name = "gzip/emnist-letters-train-images-idx3-ubyte.gz"
    return archive(folder / "a.zip", {name: gzip.compress(images)}, zipfile.ZIP_STORED)


def tar_bomb(folder: Path) -> Path:
    header = tarfile.TarInfo("a/0.jpg")
    header.size = len(ZEROS)
    (folder / "a.tar.gz").write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + ZEROS + bytes(1024)))
    return folder / "a.tar.gz"


def arrow_bomb(folder: Path) -> Path:
    table = pa.table({"image": pa.array([b"\xff\xd8\xff" + ZEROS] * 2)})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema, options=options) as out:
        out.write_table(table)
    return folder / "a.arrow"


def parquet_bomb(folder: Path) -> Path:
    table = pa.table({"image": pa.array([b"\xff\xd8\xff" + ZEROS] * 2)})
    pq.write_table(table, folder / "a.parquet", compression="zstd", use_dictionary=False)
    return folder / "a.parquet"


def parquet_rows(folder: Path) -> Path:
    """A footer that says 10^12 rows instead of 300 (zigzag varints, which have no fixed length)."""
    pq.write_table(pa.table({"image": pa.array([IMAGE] * 300)}), folder / "a.parquet", use_dictionary=False)
    data = (folder / "a.parquet").read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    said, number = b"", 2 * 10**12
    while number:
        said, number = said + bytes([number & 127 | (128 if number > 127 else 0)]), number >> 7
    footer = data[start:-8].replace(bytes([600 & 127 | 128, 600 >> 7]), said)
    (folder / "a.parquet").write_bytes(data[:start] + footer + struct.pack("<I", len(footer)) + b"PAR1")
    return folder / "a.parquet"


def hdf5_claim(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("images", (10**9, 32, 32, 3), "u1", chunks=(1, 32, 32, 3))
    return folder / "a.h5"


def hdf5_elsewhere(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("images", (2, 8, 8, 3), "u1", external=[(str(folder / "pipe"), 0, 384)])
    return folder / "a.h5"


def saved_elsewhere(folder: Path) -> Path:
    table = pa.table({"image": pa.array([IMAGE])})
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    os.mkfifo(folder.parent / "pipe")
    state = {"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": [{"filename": "../pipe"}]}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def cifar_labels(folder: Path) -> Path:
    """Labels of lists in lists, 2^40 of them in a file of some bytes."""
    labels: list[object] = [0]
    for _ in range(40):
        labels = [labels, labels]
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": labels}
    (folder / "data_batch_1").write_bytes(pickle.dumps(content, 2))
    return folder


def lmdb_page(folder: Path) -> Path:
    """A root page whose first node lies behind the page."""
    path = write_lmdb(folder / "db", {b"1": IMAGE, b"2": IMAGE}) / "data.mdb"
    data = bytearray(path.read_bytes())
    root = struct.unpack_from("<Q", data, 4096 + 128)[0]
    struct.pack_into("<H", data, 4096 * root + 16, 0xFFF0)
    path.write_bytes(data)
    return folder / "db"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a table in a zip": (text_bomb, "would unpack from"),
    "a packed file in a zip": (packed_file_bomb, "unpacks to more than"),
    "a packed tar": (tar_bomb, "unpacks to more than"),
    "Arrow": (arrow_bomb, "would unpack from"),
    "Parquet": (parquet_bomb, "would unpack from"),
    "rows of Parquet": (parquet_rows, "it says 1,000,000,000,000 rows"),
    "HDF5": (hdf5_claim, "says 3,072,000,000,000 bytes and the file has"),
    "HDF5 in a pipe": (hdf5_elsewhere, "lies in other files"),
    "a saved data set": (saved_elsewhere, "it names the file '../pipe'"),
    "CIFAR": (cifar_labels, "are no integers"),
    "LMDB": (lmdb_page, r"damaged LMDB database \(page 2 is damaged\)"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.timeout(30)
def test_what_lies_is_refused_in_a_sentence(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    folder = tmp_path / "data"
    folder.mkdir()
    path = make(folder)
    with pytest.raises(InputError, match=message) as refused:
        opened(path)
    assert "\n" not in str(refused.value)


def test_sizes_are_checked_before_an_image_is_read(tmp_path: Path) -> None:
    """A sparse tar and a deflated zip with an image of a gigabyte beside a good one."""
    header, size = tarfile.TarInfo("a/1.jpg"), 1 << 30
    header.size = size
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        good = tarfile.TarInfo("a/0.jpg")
        good.size = len(IMAGE)
        tar.addfile(good, io.BytesIO(IMAGE))
    data = content.getvalue()[: 512 + -(-len(IMAGE) // 512) * 512] + header.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(data)
    os.truncate(tmp_path / "a.tar", len(data) + size + 1024)
    path = archive(tmp_path / "a.zip", {"a/0.jpg": IMAGE, "a/1.jpg": ZEROS})
    listing = path.read_bytes().replace(struct.pack("<I", len(ZEROS)), struct.pack("<I", size))
    path.write_bytes(listing)
    for name in ("a.tar", "a.zip"):
        first, second = outcomes(opened(tmp_path / name))
        assert first == ""
        assert "its 1,073,741,824 bytes are more than the allowed" in second


def test_rows_lead_to_no_file_of_others(tmp_path: Path) -> None:
    """Of what a row names only images are used, and only below the folder unless the path is absolute."""
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "private.jpg").write_bytes(IMAGE)
    (tmp_path / "notes.txt").write_text("secret")
    os.mkfifo(tmp_path / "pipe")
    (data / "own.jpg").write_bytes(IMAGE)
    named = [*("own.jpg", "../private.jpg", "x\0y"), str(tmp_path / "notes.txt"), str(tmp_path / "pipe")]
    rows = [{"bytes": IMAGE, "path": None}, *({"bytes": None, "path": name} for name in named)]
    pq.write_table(pa.table({"image": pa.array(rows, ROWS)}), data / "a.parquet")
    found = outcomes(opened(data / "a.parquet"))
    assert found[:2] == ["", ""]
    assert "is no image" in found[4]
    assert all("does not exist" in found[row] for row in (2, 3, 5))


def test_images_in_linked_or_endless_data_sets_are_bad_images(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other", "w") as file:
        file["x"] = np.frombuffer(IMAGE, np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for number in range(9):
            file[f"a/{number}"] = np.frombuffer(IMAGE, np.uint8)
        file["a/x"] = h5py.ExternalLink(str(tmp_path / "other"), "x")
        file.create_dataset("a/y", (10**11,), "u1", chunks=(1024,))
    found = outcomes(opened(tmp_path / "a.h5"))
    assert found[:9] == [""] * 9
    assert "it lies in another file" in found[9]
    assert "100,000,000,000 bytes" in found[10]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x80\x02K\x01r\xff\xff\xff\x7f.", id="memo"),
        pytest.param(b"\x80\x02}" + b")" + b"\x85" * 400_000 + b"K\x01s.", id="hash of tuples in tuples"),
        pytest.param(b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R.", id="bytearray"),
        pytest.param(b"\x80\x02cnumpy\nndarray\n\x8a\x05\0\0\0\0\x10\x85\x85R.", id="array"),
        pytest.param(
            pickle.dumps(np.arange(4, dtype=np.uint8), 2).replace(b"K\x04\x85q", b"J\xff\xff\xff\x7f\x85q"), id="shape"
        ),
        pytest.param(pickle.dumps(np.array([{}])), id="array of objects"),
        pytest.param(pickle.dumps(np.zeros(3, "u1,f4")), id="array of records"),
    ],
)
def test_pickles_take_no_memory_that_they_do_not_hold(data: bytes) -> None:
    """The first two ended the process."""
    with pytest.raises(RefusedPickleError):
        load_plain(data)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_are_read(protocol: int) -> None:
    arrays = [np.arange(12, dtype="<u2").reshape(3, 4), np.asfortranarray(np.ones((2, 3))), np.array(["a", "bc"])]
    arrays += [np.zeros((0, 3), np.uint8), np.array(5), np.array([True])]
    for array in arrays:
        found = load_plain(pickle.dumps(array, protocol))
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
    content = {"a": [1, (2.0, None)], b"b": bytearray(b"xy"), "c": {1, 2}, "d": np.float32(3)}
    assert load_plain(pickle.dumps(content, protocol)) == content

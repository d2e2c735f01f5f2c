"""Arrays from files: the same as numpy's, and a sentence for headers that lie, before memory is allocated."""

from __future__ import annotations

import contextlib
import io
import resource
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.arrays import read_arrays, read_header, read_npy
from pipelines.files import LARGEST_JSON, read_json

ARRAYS = [
    np.arange(12, dtype=np.int64).reshape(3, 4),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array(7, dtype=np.uint8),
    np.empty((0, 3), dtype=np.float32),
    np.zeros(3, dtype=[("a", "<i4"), ("b", "S3")]),
]


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def lying(descr: str = "'<i8'", shape: str = "(3,)", values: bytes = bytes(24)) -> bytes:
    """A .npy file with this header."""
    head = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + values


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: str(array.dtype))
def test_arrays_are_those_that_numpy_wrote(array: Any, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(npy(array))
    read = read_npy(tmp_path / "a.npy")
    np.testing.assert_array_equal(read, array)
    assert (read.dtype, read.shape, read.flags.writeable) == (array.dtype, array.shape, True)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", first=array, second=array[..., None])
        both = read_arrays(tmp_path / "a.npz")
        np.testing.assert_array_equal(both["first"], array)
        np.testing.assert_array_equal(both["second"], array[..., None])


@pytest.mark.parametrize(
    "content",
    [
        npy(np.array([{}], dtype=object), allow_pickle=True),
        lying(shape="(1000000000000,)"),
        lying(shape="(3, 10**9)"),
        lying(shape="(-3,)"),
        lying(shape="(-1, -3)"),
        lying(shape="(0, 99999999999999999999)", values=b""),
        lying(shape="(" + "1," * 3 + ")" * 500),
        lying(shape="(" * 5000),
        lying(shape="'3'"),
        lying(descr="'|O'"),
        lying(descr="'V0'", shape="(1000000000000,)", values=b""),
        lying(descr="'<i8,|O'"),
        lying(descr="[('a', '<i8', (1000000000000,))]"),
        lying(descr="__import__('os').system('touch ran')"),
        lying(descr="(" * 4000),
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        b"\x93NUMPY\x09\x09",
    ],
    ids=lambda content: content[10:60].decode("latin-1"),
)
def test_headers_that_lie_are_refused(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    for read in (read_npy, read_header):
        with pytest.raises(ValueError, match="it "):
            read(path)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(ValueError, match="it "):
        read_arrays(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_an_archive_that_unpacks_to_far_more_than_it_is(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", lying(shape="(50000000,)", values=bytes(50_000_000 * 8)))
    with pytest.raises(ValueError, match="would unpack"):
        read_arrays(tmp_path / "bomb.npz")


@given(st.data())
def test_damaged_archives_raise_nothing_else(data: st.DataObject) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, keys=np.arange(50), text=np.frombuffer(b"names of images", np.uint8))
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError, OSError):
        read_arrays(io.BytesIO(bytes(content[: data.draw(st.integers(0, len(content)))])))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested"),
        (b"[" * 70 + b"]" * 70, "nested"),
        (b'{"a": [1e999]}', "number inf"),
        (b'{"a": -Infinity}', "number -inf"),
        (b'{"a": NaN}', "number nan"),
        (b'{"a": 1%s}' % (b"0" * 400), "number 1000"),
        (b'{"a": 1%s}' % (b"0" * 5000), "digits"),
        (b"\xff\xfe\x00", "codec"),
        (b"\0" * 100, "Expecting"),
        (b"", "Expecting"),
    ],
)
def test_json_that_no_command_has_written(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_json(tmp_path / "a.json")


def test_json_that_has_no_end(tmp_path: Path) -> None:
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="no regular file"):
        read_json(tmp_path / "zero.json")
    with (tmp_path / "sparse.json").open("wb") as file:
        file.truncate(LARGEST_JSON + 1)
    with pytest.raises(ValueError, match="more than the allowed"):
        read_json(tmp_path / "sparse.json")

"""Tar archives as tarfile lists them, and archives whose headers lie."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.conversion.imagenet import open_archive
from pipelines.runtime import InputError
from pipelines.storage.forms.tar_reader import DamagedTarError, Member, tar_members

NAMES = [
    "a.jpg",
    "d/b.jpg",
    "é/ü.png",
    "x" * 99,
    "y" * 100,
    "z" * 101,
    "p/" * 60 + "q.jpg",
    "l/" * 200 + "m.jpg",
    "\udcff.jpg",
]


def build(path: Path, names: list[str], form: int = tarfile.GNU_FORMAT, **fields: object) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 700 * number
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(bytes([number]) * info.size))
    return path


def listed(path: Path) -> list[Member]:
    with path.open("rb") as file:
        return list(tar_members(file.fileno()))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form: int, tmp_path: Path) -> None:
    path = build(tmp_path / "a.tar", NAMES, form, uid=2**40, pax_headers={"comment": "x" * 3000})
    with tarfile.open(path) as archive:
        expected = [Member(info.name, info.offset_data, info.size) for info in archive if info.isfile()]
    assert listed(path) == expected
    assert [member.name for member in expected] == NAMES


def test_members_of_gnu_tar(tmp_path: Path) -> None:
    """With folders, links and long names."""
    root = tmp_path / "root"
    for name in ("a.jpg", "deep/" * 40 + "b.jpg", "n" * 200 + ".jpg"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)
    (root / "link.jpg").symlink_to("x" * 150)
    for form in ("gnu", "posix", "oldgnu", "ustar"):
        excluded = ["--exclude=deep", "--exclude=n*", "--exclude=link.jpg"] if form == "ustar" else []
        target = tmp_path / f"{form}.tar"
        subprocess.run(["tar", f"--format={form}", *excluded, "-cf", target, "-C", root, "."], check=True)
        with tarfile.open(target) as archive:
            expected = [(info.name, info.offset_data, info.size, info.issym()) for info in archive if not info.isdir()]
        assert [tuple(member) for member in listed(target)] == expected


HEADER = {"size": (124, 136), "kind": (156, 157), "name": (0, 100), "link": (157, 257)}


def forge(path: Path, at: int = 0, **fields: bytes) -> Path:
    """Write fields into a header and make its checksum right."""
    content = bytearray(path.read_bytes())
    for field, value in fields.items():
        first, last = HEADER[field]
        content[at + first : at + last] = value.ljust(last - first, b"\0")
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(content)
    return path


def chain(kind: bytes, count: int) -> Callable[[Path], Path]:
    """Headers for one file, one after the other."""

    def make(path: Path) -> Path:
        block = forge(build(path, ["a.jpg"]), kind=kind, size=b"%011o" % 512).read_bytes()[:512]
        body = (b"name".ljust(512, b"\0") if kind in b"LK" else b"512 path=" + b"n" * 502 + b"\n").ljust(512, b"\0")
        path.write_bytes((block + body) * count + bytes(20_480))
        return path

    return make


def pax(records: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        head = forge(build(path, ["p"]), kind=b"x", size=b"%011o" % len(records)).read_bytes()[:512]
        rest = build(path, ["a.jpg", "b.jpg"]).read_bytes()
        path.write_bytes(head + records.ljust(-(-len(records) // 512) * 512, b"\0") + rest)
        return path

    return make


def sized(size: bytes, kind: bytes = b"0") -> Callable[[Path], Path]:
    return lambda path: forge(build(path, ["a.jpg", "b.jpg"]), size=size, kind=kind)


LIES = {
    "negative, base 256": sized(b"\xff" * 12),
    "huge, base 256": sized(b"\x80" + b"\x7f" * 11),
    "2^62, base 256": sized(b"\x80" + (2**62).to_bytes(11, "big")),
    "a terabyte, base 256": sized(b"\x80" + (10**12).to_bytes(11, "big")),
    "eight gigabytes, octal": sized(b"77777777777"),
    "no digits": sized(b"12x4"),
    "minus": sized(b"-0000000100"),
    "long name of a terabyte": sized(b"\x80" + (10**12).to_bytes(11, "big"), b"L"),
    "long name of a gigabyte": sized(b"10000000000", b"L"),
    "negative pax header": sized(b"\xff" * 12, b"x"),
    "global pax header of a gigabyte": sized(b"10000000000", b"g"),
    "sparse": sized(b"0", b"S"),
    "chain of long names": chain(b"L", 100_000),
    "chain of long links": chain(b"K", 100_000),
    "chain of pax headers": chain(b"x", 100_000),
    "pax length 0": pax(b"0 path=a\n"),
    "pax length too large": pax(b"99 path=a\n"),
    "pax length that is none": pax(b"xx path=a\n"),
    "pax length of 5,000 digits": pax(b"1" * 5000 + b" path=a\n"),
    "pax length negative": pax(b"-9 path=a\n"),
    "pax length too short": pax(b"3 path=a\n"),
    "pax without =": pax(b"9 pathaa\n"),
    "pax size negative": pax(b"11 size=-5\n"),
    "pax size huge": pax(b"30 size=999999999999999999999\n"),
    "pax size a float": pax(b"12 size=1e3\n"),
    "pax sparse": pax(b"22 GNU.sparse.major=1\n"),
    "no end": lambda path: (path.write_bytes(build(path, ["a.jpg"]).read_bytes()[:512]) and path) or path,
    "end in a header": lambda path: (path.write_bytes(build(path, ["a", "b"]).read_bytes()[:700]) and path) or path,
    "only zeros": lambda path: (path.write_bytes(bytes(1 << 22)) and path) or path,
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(lie: str, tmp_path: Path) -> None:
    path = LIES[lie](tmp_path / "a.tar")
    with pytest.raises(DamagedTarError, match=r"(at|from) byte \d+"):
        listed(path)
    with pytest.raises(InputError, match=r"a\.tar (is truncated or damaged: .*byte \d+|holds no files)"):
        open_archive(path, val_labels=tmp_path / "labels.txt", classes=None)


@pytest.mark.parametrize("name", ["../a.jpg", "d/../../a.jpg", "/etc/a.jpg", "../../n01440764.tar"])
def test_names_that_lead_out(name: str, tmp_path: Path) -> None:
    path = build(tmp_path / "a.tar", [name])
    with pytest.raises(InputError, match=r"the name of .* leads out of it"):
        open_archive(path, val_labels=None, classes=None)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("name", ["a.jpg", "n01440764.tar"])
@pytest.mark.parametrize("target", ["/etc/passwd", "nothing", "n01440764.tar"])
def test_links_are_not_followed(kind: bytes, name: str, target: str, tmp_path: Path) -> None:
    path = build(tmp_path / "a.tar", [name], type=kind, linkname=target)
    with pytest.raises(InputError, match="is a link and no file"):
        open_archive(path, val_labels=None, classes=None)


def test_a_sparse_file_of_gnu_tar(tmp_path: Path) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 20)
    for form in ("gnu", "posix"):
        command: list[str | Path] = [
            "tar",
            f"--format={form}",
            "-S",
            "-cf",
            tmp_path / "a.tar",
            "-C",
            tmp_path,
            "a.jpg",
        ]
        subprocess.run(command, check=True)
        with pytest.raises(DamagedTarError, match="sparse"):
            listed(tmp_path / "a.tar")


def test_an_archive_in_an_archive_cannot_reach_beyond_it(tmp_path: Path) -> None:
    """The inner archive's last member claims bytes of the next one."""
    inner = sized(b"%011o" % 4096)(tmp_path / "inner.tar").read_bytes()[:1024]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("n1.tar", "n2.tar"):
            info = tarfile.TarInfo(name)
            info.size = len(inner)
            archive.addfile(info, io.BytesIO(inner))
    with pytest.raises(InputError, match=r"a\.jpg' of 4,096 bytes, more than there are"):
        open_archive(tmp_path / "a.tar", val_labels=None, classes=None)


@given(st.data())
def test_no_change_of_an_archive_raises_anything_else(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = build(Path(folder) / "a.tar", ["a.jpg", "z" * 150 + ".jpg", "c.tar"], tarfile.PAX_FORMAT)
        at = data.draw(st.sampled_from([0, 512, 1024, 1536, 2048, 3072]))
        position = data.draw(st.integers(0, 511))
        content = bytearray(path.read_bytes())
        content[at + position] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        if data.draw(st.booleans()):
            forge(path, at)
        with contextlib.suppress(DamagedTarError):
            listed(path)
        with contextlib.suppress(InputError):
            open_archive(path, val_labels=None, classes=None)

"""Compiled C survives damaged libraries and cache folders that cannot be used."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from pipelines import c_library, files
from pipelines.c_library import error_line, load_library
from pipelines.files import cache_folders, cache_obstacle, writable_cache
from pipelines.storage import open_source

needs_compiler = pytest.mark.skipif(c_library._compiler() is None, reason="needs a C compiler")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder, and a folder of its own for temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for cached in (load_library, files._announce, files._folder_of_process):
        cached.cache_clear()
    yield tmp_path / "home" / "mvssl"
    for cached in (load_library, files._announce, files._folder_of_process):
        cached.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def build(source: Path, folder: Path) -> Path:
    """Path of the library, which this process has not loaded."""
    compiler = c_library._compiler()
    assert compiler is not None
    folder.mkdir(parents=True)
    return c_library._built(source, compiler, folder, f"{source.stem}-{c_library._key(source, compiler)}")


def answer(library: ctypes.CDLL | str) -> int:
    assert not isinstance(library, str), library
    return int(library.answer())


def other_architecture(content: bytes) -> bytes:
    return content[:18] + (b"\xb7\0" if content[18] != 0xB7 else b"\x3e\0") + content[20:]  # e_machine of ELF


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "1000 bytes": lambda content: content[:1000],
    "half": lambda content: content[: len(content) // 2],
    "the last byte is missing": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "text": lambda content: b"no library\n",
    "zeros, as after a power cut": lambda content: bytes(len(content)),
    "another architecture": other_architecture,
    "a flipped bit": lambda content: content[: len(content) // 2] + b"\xff" + content[len(content) // 2 + 1 :],
}


@needs_compiler
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_again(damage: str, home: Path, source: Path) -> None:
    library = build(source, home)
    content = library.read_bytes()
    assert DAMAGES[damage](content) != content
    library.write_bytes(DAMAGES[damage](content))
    assert answer(load_library(source)) == 42
    (kept,) = home.iterdir()
    assert hashlib.sha256(kept.read_bytes()).hexdigest()[:32] in kept.name


@needs_compiler
@pytest.mark.parametrize("kind", ["folder", "link to nothing", "unreadable"])
def test_what_is_no_file_in_the_place_of_a_library_gives_way(kind: str, home: Path, source: Path) -> None:
    library = build(source, home)
    if kind == "unreadable":
        library.chmod(0)
    else:
        library.unlink()
    if kind == "folder":
        (library / "inside").mkdir(parents=True)
    elif kind == "link to nothing":
        library.symlink_to("nothing")
    assert answer(load_library(source)) == 42
    (kept,) = home.iterdir()
    assert kept.is_file()


@needs_compiler
def test_several_find_the_same_damaged_library(home: Path, source: Path) -> None:
    library = build(source, home)
    library.write_bytes(library.read_bytes()[:1000])
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: answer(load_library.__wrapped__(source)), range(4)))
    assert answers == [42] * 4


@needs_compiler
def test_a_library_is_synced_before_it_has_its_name(home: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync

    def record(file: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        sync(file)

    monkeypatch.setattr(os, "fsync", record)
    library = build(source, home)
    assert [Path(path).name for path in synced] == ["library.so", "mvssl"]
    assert not library.with_name("library.so").exists()


@needs_compiler
def test_a_whole_library_in_a_read_only_cache_is_used(
    home: Path, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    build(source, home)
    monkeypatch.setattr(files, "cache_obstacle", lambda folder, execute=False: f"{folder} cannot be written")
    assert answer(load_library(source)) == 42
    assert not caplog.text


def spoil(home: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> str:
    """Make the user's cache folder unusable; returns the words for it."""
    if how == "a file in its place":
        home.parent.mkdir()
        home.write_text("")
        return "File exists"
    if how == "a file for its parent":
        home.parent.write_text("")
        return "Not a directory"
    if how == "a link to nothing":
        home.parent.mkdir()
        home.symlink_to("nothing")
        return "File exists"
    home.mkdir(parents=True)
    real = os.statvfs
    noexec = SimpleNamespace(f_flag=os.ST_NOEXEC)
    monkeypatch.setattr(os, "statvfs", lambda path: noexec if Path(path) == home else real(path))
    return "mounted noexec"


@needs_compiler
@pytest.mark.parametrize("how", ["a file in its place", "a file for its parent", "a link to nothing", "noexec"])
def test_an_unusable_cache_is_replaced_by_a_temporary_one(
    how: str,
    home: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = spoil(home, monkeypatch, how)
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (4, 4)).save(photos / "a.jpg")
    os.utime(photos, (1e9, 1e9))
    assert answer(load_library(source)) == 42
    open_source(photos).close()
    temporary = tmp_path / "temporary" / f"mvssl-{os.getuid()}"
    assert sorted(path.suffix for path in temporary.iterdir()) == ([".so"] if how == "noexec" else [".npz", ".so"])
    assert temporary.stat().st_mode & 0o777 == 0o700
    (record,) = caplog.records
    assert words in record.getMessage()
    assert str(temporary) in record.getMessage()
    assert "set XDG_CACHE_HOME" in record.getMessage()
    monkeypatch.setattr(c_library, "_built", None)  # nor is it built at the next start
    load_library.cache_clear()
    assert answer(load_library(source)) == 42


def test_other_ranks_of_a_host_do_not_repeat_the_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(home, monkeypatch, "a file in its place")
    monkeypatch.setenv("LOCAL_RANK", "1")
    writable_cache(home)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_full_disk_is_no_place_for_a_cache(home: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # empty files can be made, as with a full quota
        assert cache_obstacle(home) == f"{home} cannot be written (File too large)"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache_obstacle(home) is None
    assert not list(home.iterdir())


@pytest.mark.parametrize("kind", ["open to all", "a link", "a file"])
def test_a_temporary_folder_of_others_is_neither_read_nor_written(
    kind: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(home, monkeypatch, "a file in its place")
    planted = tmp_path / "temporary" / f"mvssl-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "open to all":
        planted.mkdir()
        planted.chmod(0o777)
    elif kind == "a link":
        planted.symlink_to(elsewhere)
    else:
        planted.write_text("")
    assert cache_folders(home) == [home]
    used = writable_cache(home)
    assert used.parent == planted.parent
    assert used != planted
    assert used.stat().st_mode & 0o777 == 0o700
    assert not list(elsewhere.iterdir())
    assert writable_cache(home) == used


def test_where_nothing_can_be_written_both_reasons_are_given(
    home: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(home, monkeypatch, "a file in its place")
    (tmp_path / "temporary").rmdir()
    (tmp_path / "temporary").write_text("")
    with pytest.raises(OSError, match=r"File exists.*, and there is no temporary folder \(Not a directory"):
        writable_cache(home)
    library = load_library(source)
    assert isinstance(library, str)
    assert "File exists" in library or "no C compiler" in library


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("In file included from a.c:1:\na.c:3:10: fatal error: b.h: No such file or directory\n", "b.h: No such file"),
        ("a.c:2:1: warning: odd\na.c:3:1: error: 'x' undeclared\na.c:4: error: more", "'x' undeclared"),
        ("a.c:2:1: warning: an error: so called\na.c:3:1: \x1b[1m\x1b[Kerror:\x1b[m x\n", "a.c:3:1: error: x"),
        ("/usr/bin/ld: cannot find -lm: No such file\ncollect2: error: ld returned 1 exit status", "cannot find -lm"),
        (
            "ld: a.o: in function `f':\na.c:(.text+0x5): undefined reference to `g'\ncollect2: error: ld returned 1",
            "`g'",
        ),
        ("collect2: error: ld returned 1 exit status", "collect2"),
        ("ptxas info : x\nptxas a.ptx, line 5; error   : Unknown modifier\nptxas fatal : aborted", "Unknown modifier"),
        ("1 warning generated.\nclang: error: unknown argument: '-march=x'\n", "unknown argument"),
        ('Traceback (most recent call last):\n  File "cc"\nValueError: no licence\n', "ValueError: no licence"),
        ("one\n\nlast one\n\n", "last one"),
        ("", ""),
    ],
)
def test_the_reason_is_the_line_with_the_error(output: str, line: str) -> None:
    assert line in error_line(output)
    assert "\n" not in error_line(output)


@needs_compiler
def test_a_compilers_error_is_named(home: Path, source: Path) -> None:
    source.write_text('#warning "odd"\nint f(void) {\n  return nowhere;\n}\n')
    library = load_library(source)
    assert isinstance(library, str)
    assert "nowhere" in library

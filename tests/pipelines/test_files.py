"""Whole files: one writer at a time, the old file or the new one, never a part."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from pipelines.files import sync_files, temporary_path, whole_file, write_whole
from pipelines.runtime import InputError


def write_slowly(path: Path, started: object, go_on: object) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("first")
        started.set()  # type: ignore[attr-defined]
        go_on.wait(60)  # type: ignore[attr-defined]


def test_a_second_writer_is_refused_and_the_first_one_finishes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    started, go_on = context.Event(), context.Event()
    path = tmp_path / "file.txt"
    first = context.Process(target=write_slowly, args=(path, started, go_on))
    first.start()
    assert started.wait(60)
    with pytest.raises(InputError, match=r"^Another process is writing .*file\.txt: wait for it"):
        write_whole(path, "second")
    assert not path.exists()
    go_on.set()
    first.join(60)
    assert path.read_text() == "first"
    write_whole(path, "second")
    assert path.read_text() == "second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_what_a_kill_left_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    temporary_path(path).write_text("a long text of an earlier writer")
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def fail_after_writing(path: Path) -> None:
    path.write_text("half")
    (path.parent / "missing").read_text()


def test_a_failing_body_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_whole(path, "old")
    with pytest.raises(FileNotFoundError), whole_file(path) as temporary:
        fail_after_writing(temporary)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def test_files_have_the_rights_of_other_new_files(tmp_path: Path) -> None:
    write_whole(tmp_path / "ours", b"x")
    (tmp_path / "theirs").write_bytes(b"x")
    assert os.stat(tmp_path / "ours").st_mode == os.stat(tmp_path / "theirs").st_mode


def test_syncing_a_folder_leaves_its_files_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    sync_files(tmp_path)
    assert (tmp_path / "file").read_text() == "text"

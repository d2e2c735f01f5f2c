"""mvssl-convert: what is in DST is only touched if it is ours, by one process at a time, and can always be redone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.conversion.destination import Destination
from pipelines.storage import open_source
from pipelines.storage.folder import FolderSource
from tests.samples.convert_runs import COUNT, Run, digests

FOREIGN = {
    "web app": '{"name": "app", "icons": []}',
    "list": '[{"format": "mvssl-shards"}]',
    "other format": '{"format": "cyclops", "version": 1}',
    "no JSON": "Manifest-Version: 1.0\n",
    "not UTF-8": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("manifest", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_files_of_others_are_kept(
    run: Run, folder: Path, tmp_path: Path, manifest: str | bytes, overwrite: list[str]
) -> None:
    dst = tmp_path / "d"
    (dst / ".convert").mkdir(parents=True)
    (dst / ".convert" / "notes").write_text("mine")
    (dst / "manifest.json").write_bytes(manifest.encode() if isinstance(manifest, str) else manifest)
    (dst / "shard-0001.tar").write_text("mine")
    np.save(dst / "index.npy", np.arange(5))
    before = digests(dst)
    outcome = run(folder, dst, *overwrite)
    assert outcome.code == 1
    assert "holds other files: give a folder that is new or empty" in outcome.err
    assert digests(dst) == before


@pytest.mark.parametrize("manifest", FOREIGN.values(), ids=FOREIGN)
def test_images_beside_a_manifest_of_another_program(
    run: Run, folder: Path, tmp_path: Path, manifest: str | bytes
) -> None:
    src = tmp_path / "src"
    src.mkdir()
    (src / "a.jpg").write_bytes((folder / "a" / "00.jpg").read_bytes())
    (src / "manifest.json").write_bytes(manifest.encode() if isinstance(manifest, str) else manifest)
    assert isinstance(open_source(src), FolderSource)
    assert run(src, tmp_path / "d").code == 0
    assert len(open_source(tmp_path / "d")) == 1


def test_damaged_manifest_of_ours_is_overwritten_only_if_asked(run: Run, folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "d"
    assert run(folder, dst).code == 0
    whole = digests(dst)
    (dst / "manifest.json").write_text("{")
    refused = run(folder, dst)
    assert refused.code == 1
    assert "manifest.json is damaged" in refused.err
    assert run(folder, dst, "--overwrite").code == 0
    assert digests(dst) == whole
    for name in whole:
        (dst / name).unlink()
    (dst / ".convert").mkdir()
    (dst / ".convert" / "plan.json").write_text("{}")
    (dst / "manifest.json").write_text("{")
    assert run(folder, dst, "--overwrite").code == 0
    assert digests(dst) == whole


def test_killed_before_the_plan_was_written(run: Run, folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "d" / ".convert"
    work.mkdir(parents=True)
    (work / "lock").touch()
    (work / "plan.json.tmp").write_text("{")
    assert run(folder, tmp_path / "d").code == 0
    assert len(open_source(tmp_path / "d")) == COUNT


def test_overwriting_can_be_killed_anywhere(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is removed when the kill comes: the folder never counts as finished, and is still ours."""
    dst = tmp_path / "d"
    command = (folder, dst, "--shard-size", 0.4)
    assert run(*command).code == 0
    whole = digests(dst)
    unlink = Path.unlink
    for survives in range(len(whole)):
        left = survives

        def killed(path: Path, missing_ok: bool = False) -> None:
            nonlocal left
            if path.parent == dst:
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
            unlink(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed)
            assert run(*command, "--overwrite").code == 130
        assert survives == 0 or not (dst / "manifest.json").exists()
        assert run(*command).code == 0
        assert digests(dst) == whole


def test_process_that_finishes_while_another_begins(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has looked at the folder and opened the lock when the first, all at once, ends."""
    dst = tmp_path / "d"
    flock, written = fcntl.flock, []

    def finishing_first(file: Any, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        assert run(folder, dst).code == 0
        written.extend(path.stat().st_mtime_ns for path in sorted(dst.iterdir()))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", finishing_first)
    outcome = run(folder, dst)
    assert outcome.code == 0
    assert "already" in outcome.out
    assert [path.stat().st_mtime_ns for path in sorted(dst.iterdir())] == written


def test_what_cannot_be_tidied_up_is_no_error(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmdir = os.rmdir

    def busy(path: Any, **options: Any) -> None:
        if os.path.basename(path) == ".convert":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))  # NFS keeps an open file's name
        rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", busy)
    assert run(folder, tmp_path / "d").code == 0
    assert len(open_source(tmp_path / "d")) == COUNT
    monkeypatch.undo()
    again = run(folder, tmp_path / "d")
    assert "already" in again.out
    assert not (tmp_path / "d" / ".convert").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("exists", [False, True])
def test_read_only_destination(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, exists: bool
) -> None:
    """As root, which tests often run as, everything can be written: the system's answer is played."""
    dst = tmp_path / "d"
    if exists:
        (dst / ".convert").mkdir(parents=True)
    mkdir, opened = Path.mkdir, Path.open

    def no_mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if path.is_relative_to(dst) and not path.exists():
            raise OSError(number, os.strerror(number), str(path))
        mkdir(path, *arguments, **options)

    def no_open(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path.is_relative_to(dst) and "r" not in mode:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", no_mkdir)
    monkeypatch.setattr(Path, "open", no_open)
    outcome = run(folder, dst)
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {os.strerror(number)} ({dst}")
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("place that can be written.\n" if number == errno.EROFS else "another place.\n")


def test_finished_conversion_in_a_read_only_folder(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(folder, tmp_path / "d").code == 0

    def refuse(_: Destination) -> None:
        raise AssertionError("wrote to a folder that needs no write")

    monkeypatch.setattr(Destination, "_take_lock", refuse)
    assert "already" in run(folder, tmp_path / "d").out
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["count"] == COUNT

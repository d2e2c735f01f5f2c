"""DST: only our own files are removed, one process writes at a time, every refusal is one sentence before any work."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
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
def test_other_files_are_kept(
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
def test_images_next_to_a_manifest_of_another_program(
    run: Run, folder: Path, tmp_path: Path, manifest: str | bytes
) -> None:
    src = tmp_path / "src"
    src.mkdir()
    (src / "a.jpg").write_bytes((folder / "a" / "00.jpg").read_bytes())
    (src / "manifest.json").write_bytes(manifest.encode() if isinstance(manifest, str) else manifest)
    assert isinstance(open_source(src), FolderSource)
    assert run(src, tmp_path / "d").code == 0
    assert len(open_source(tmp_path / "d")) == 1


def test_our_damaged_manifest_is_overwritten_only_on_request(run: Run, folder: Path, tmp_path: Path) -> None:
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
    """After any number of removed files the folder does not count as finished, and is still ours."""
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
    """The first process finishes after the second one has opened the lock file and before it locks it."""
    dst = tmp_path / "d"
    flock = fcntl.flock
    written: list[int] = []

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


def test_failed_clean_up_is_no_error(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """The error is simulated, because root, which often runs the tests, can write everywhere."""
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
        raise AssertionError("wrote to a finished folder")

    monkeypatch.setattr(Destination, "_take_lock", refuse)
    assert "already" in run(folder, tmp_path / "d").out
    assert json.loads((tmp_path / "d" / "manifest.json").read_text())["count"] == COUNT


def test_too_small_disk_is_refused_before_any_work(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    outcome = run(folder, tmp_path / "d")
    assert outcome.code == 1
    assert "0.0 GB free but the conversion needs" in outcome.err
    assert not list((tmp_path / "d").glob("*.tar*"))


@pytest.mark.parametrize("place", ["file", "file/below", "file/below/deeper"])
def test_unwritable_destination(run: Run, folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    outcome = run(folder, tmp_path / place)
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert str(tmp_path / "file") in outcome.err
    assert "Traceback" not in outcome.err


def test_destination_of_another_conversion(run: Run, folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "d"
    assert run(folder, dst, "--shard-size", 0.2).code == 0
    before = digests(dst)
    again = run(folder, dst, "--shard-size", 0.2)
    assert again.code == 0
    assert "already" in again.out
    for arguments in ((folder, dst, "--shard-size", 0.3), (folder / "a", dst, "--shard-size", 0.2)):
        other = run(*arguments)
        assert other.code == 1
        assert "of another source or with other options" in other.err
        assert digests(dst) == before
    (dst / "notes.txt").write_text("mine")
    assert run(folder / "a", dst, "--shard-size", 0.2, "--overwrite").code == 0
    assert len(open_source(dst)) == COUNT // 2
    assert (dst / "notes.txt").read_text() == "mine"
    (dst / "notes.txt").unlink()
    assert run(folder / "a", tmp_path / "fresh", "--shard-size", 0.2).code == 0
    assert digests(dst) == digests(tmp_path / "fresh")


def test_damaged_result_is_not_called_finished(run: Run, folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "d"
    assert run(folder, dst).code == 0
    os.truncate(dst / "shard-000000.tar", 1000)
    outcome = run(folder, dst)
    assert outcome.code == 1
    assert "shard-000000.tar has 1000 bytes" in outcome.err
    assert run(folder, dst, "--overwrite").code == 0
    assert len(open_source(dst)) == COUNT


def test_unfinished_conversion_of_another_source(run: Run, folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "d"
    first = Destination(dst)
    first.prepare({"source": "other"}, overwrite=False)
    first.release()
    outcome = run(folder, dst)
    assert outcome.code == 1
    assert "holds an unfinished conversion of another source" in outcome.err


def test_folder_with_other_files_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        outcome = run(folder, tmp_path / "d", *more)
        assert outcome.code == 1
        assert "holds other files" in outcome.err


def test_two_conversions_at_once(run: Run, folder: Path, tmp_path: Path) -> None:
    first = Destination(tmp_path / "d")
    first.prepare({"any": 1}, overwrite=False)
    outcome = run(folder, tmp_path / "d", "--overwrite")
    assert outcome.code == 1
    assert "another mvssl-convert is writing" in outcome.err
    first.release()
    assert run(folder, tmp_path / "d", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{src}", "{src}/shards"], "lies in SRC"),
        (["{src}", "{src}"], "lies in SRC"),
        (["{tmp}/nowhere", "{tmp}/d"], "does not exist"),
        (["{tmp}/empty", "{tmp}/d"], "holds no images"),
        (["{src}", "{tmp}/d", "--max-size", "0"], "--max-size is 0 but must be 1 or more"),
        (["{src}", "{tmp}/d", "--shard-size", "-1"], "--shard-size is -1.0 but must be above 0"),
        (["{src}", "{tmp}/d", "--shard-size", "nan"], "--shard-size is nan but must be above 0"),
        (["{src}", "{tmp}/d", "--workers", "0"], "--workers is 0"),
        (["{src}", "{tmp}/d", "--val-labels", "{tmp}/x"], "--val-labels is for ImageNet's val archive"),
        (["{src}", "{tmp}/d", "--classes", "{tmp}/x"], "--classes {tmp}/x does not exist"),
    ],
)
def test_wrong_arguments(run: Run, folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    names = {"src": folder, "tmp": tmp_path}
    outcome = run(*(argument.format(**names) for argument in arguments))
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert message.format(**names) in outcome.err
    assert not (tmp_path / "d").exists()


def test_usage_errors_exit_with_2(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run(folder).code == 2
    assert run(folder, tmp_path / "d", "--shard-size", "big").code == 2
    assert run("--help").code == 0

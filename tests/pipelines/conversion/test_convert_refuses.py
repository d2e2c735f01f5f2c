"""mvssl-convert: what it refuses, in one sentence and before any work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pipelines.conversion import conversion as conversion_module
from pipelines.conversion.destination import Destination
from pipelines.storage import open_source
from tests.samples.convert_runs import COUNT, Run, digests


def test_disk_that_is_too_small_is_refused_at_once(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(conversion_module.shutil, "disk_usage", lambda _: usage)
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

"""An unreadable file is quarantined; a source that is gone stops the conversion."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.conversion import sources
from pipelines.storage import open_source
from pipelines.storage.folder import FolderSource
from tests.samples.convert_runs import COUNT, Run, digests

Failing = Callable[[int], bool]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Failing, int], None]:
    """Let some images fail to read with a system error."""
    read = FolderSource.read

    def install(which: Failing, number: int) -> None:
        def reading_fails(source: FolderSource, index: int) -> np.ndarray:
            if which(index):
                raise OSError(number, os.strerror(number), source.key(index))
            return read(source, index)

        monkeypatch.setattr(FolderSource, "read", reading_fails)

    return install


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG])
def test_unreadable_file_is_listed(
    run: Run, folder: Path, tmp_path: Path, failing: Callable[[Failing, int], None], number: int
) -> None:
    failing(lambda index: index in (3, 4), number)
    assert run(folder, tmp_path / "d").code == 0
    listed = [json.loads(line) for line in (tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()]
    assert [item["key"] for item in listed] == ["a/06.jpg", "a/08.jpg"]
    assert {item["reason"] for item in listed} == {f"the file cannot be read: {os.strerror(number)}"}
    assert len(open_source(tmp_path / "d")) == COUNT - 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOSPC])
def test_machine_wide_error_stops_at_once(
    run: Run, folder: Path, tmp_path: Path, failing: Callable[[Failing, int], None], number: int
) -> None:
    failing(lambda index: index == 20, number)
    outcome = run(folder, tmp_path / "d")
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {os.strerror(number)} (")
    assert not (tmp_path / "d" / "manifest.json").exists()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_source_that_is_gone(
    run: Run,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: Callable[[Failing, int], None],
    number: int,
) -> None:
    """An unmounted disk leaves an empty folder; its images must not be quarantined."""
    monkeypatch.setattr(sources, "_MAX_CONSECUTIVE", 15)
    dst = tmp_path / "d"
    command = (folder, dst, "--shard-size", 0.1)  # several shards in the streak of fifteen
    failing(lambda index: index == 2 or index >= 21, number)
    outcome = run(*command)
    assert outcome.code == 1
    assert f"the source {folder} is gone: the last 15 images could not be read" in outcome.err
    assert outcome.err.count("\n") == 1
    kept = {path: path.stat().st_mtime_ns for path in dst.glob("*.tar")}
    failing(lambda index: index == 2, number)
    assert run(*command).code == 0
    assert sum(path.stat().st_mtime_ns == time for path, time in kept.items()) >= 4
    assert run(folder, tmp_path / "whole", "--shard-size", 0.1).code == 0
    assert digests(dst) == digests(tmp_path / "whole")
    assert len(open_source(dst)) == COUNT - 1


def test_a_readable_image_ends_the_streak(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: Callable[[Failing, int], None]
) -> None:
    monkeypatch.setattr(sources, "_MAX_CONSECUTIVE", 4)
    failing(lambda index: index % 4 != 0, errno.EIO)
    assert run(folder, tmp_path / "d", "--shard-size", 0.1).code == 0
    assert len(open_source(tmp_path / "d")) == COUNT // 4

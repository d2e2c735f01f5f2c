"""The run folder: claimed before it is touched, on the disk when a command has said so, restored from a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mvssl.config.recipe import Recipe
from mvssl.runs.folder import RunFolder
from pipelines.runtime import InputError
from tests.samples.tiny_runs import metrics, train


def test_a_folder_is_locked_from_its_creation_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "run")
    with (
        folder.claim(),
        pytest.raises(InputError, match=r"^Another process is training in .*run: wait"),
        RunFolder(folder.path).claim(),
    ):
        pass
    assert not (tmp_path / "new").exists()  # nothing was written
    with folder.claim():
        folder.config.write_text("{}")
    assert folder.config.exists()


def test_a_run_that_begins_while_another_one_looks_keeps_its_files(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B finds the place free; A trains there from then on; B is refused and has changed nothing."""
    out, check, calls = tmp_path / "run", RunFolder.check_free, iter(range(100))

    def slow(self: RunFolder, *, overwrite: bool) -> None:
        check(self, overwrite=overwrite)
        if next(calls) == 0:  # the other process comes now
            shutil.copytree(finished, out, symlinks=True)

    monkeypatch.setattr(RunFolder, "check_free", slow)
    with pytest.raises(InputError, match="already holds a run"):
        train(tiny_recipe, images, out)
    for path in finished.rglob("*"):
        if path.is_file():
            assert (out / path.relative_to(finished)).read_bytes() == path.read_bytes()


@contextmanager
def recorded_syncs() -> Iterator[dict[int, tuple[int, int]]]:
    """Size and modification time of every file at its last fsync in the block, by inode."""
    synced: dict[int, tuple[int, int]] = {}
    fsync = os.fsync

    def recording(descriptor: Any) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size, status.st_mtime_ns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", recording)
        yield synced


def unsynced(folder: Path, synced: dict[int, tuple[int, int]]) -> list[str]:
    """Files with content that was not synced, and folders that were never synced."""
    found = []
    for path in [folder.parent, folder, *folder.rglob("*")]:
        status = path.lstat()
        if path.is_symlink() or (path.is_file() and not status.st_size):
            continue
        expected = (status.st_size, status.st_mtime_ns) if path.is_file() else synced.get(status.st_ino, ())
        if synced.get(status.st_ino) != expected:
            found.append(str(path))
    return found


def test_every_file_of_a_run_is_on_the_disk(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with recorded_syncs() as synced:
        train(tiny_recipe, images, tmp_path / "run", log=("tensorboard", "csv"))
    assert unsynced(tmp_path / "run", synced) == []


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"recipe": 1, "opt', None], ids=repr)
def test_a_damaged_config_is_restored_from_the_last_checkpoint(
    damage: str | None,
    finished: Path,
    images: Path,
    tiny_recipe: Recipe,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    config = out / "config.json"
    before = json.loads(config.read_text())
    config.unlink()
    if damage is not None:
        config.write_text(damage)
    with pytest.raises(InputError, match="already holds a run"):
        train(tiny_recipe, images, out)
    train(tiny_recipe, images, out, resume=True)
    assert json.loads(config.read_text()) == before
    assert "restored from the last checkpoint" in caplog.text
    assert metrics(out) == metrics(finished)


def test_a_damaged_config_without_a_checkpoint_is_reported(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read .*: restore it or start the run again"):
        RunFolder(tmp_path).recipe()

"""Folders and lists on odd systems: what the file system adds, links to themselves, no home, changes meanwhile."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from pipelines.runtime import InputError, cache_folder
from pipelines.storage import file_index, open_source, split_paths
from pipelines.storage.folder import cache_file


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("cat/a.jpg", "dog/b.jpg"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(path)
    return tmp_path / "data"


def test_folders_of_the_file_system_hold_no_data(tree: Path) -> None:
    for place in (tree, tree / "cat"):
        for name in ("lost+found", "@eaDir"):
            (place / name).mkdir()
            Image.new("RGB", (8, 6)).save(place / name / "thumbnail.jpg")
    source = open_source(tree)
    assert [source.key(i) for i in range(len(source))] == ["cat/a.jpg", "dog/b.jpg"]
    assert source.classes == ("cat", "dog")


def test_folders_of_the_file_system_are_no_classes_beside_train(tmp_path: Path) -> None:
    for name in ("train", "lost+found"):
        (tmp_path / name).mkdir()
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert split_paths(tmp_path) == (tmp_path / "train", None)


def test_link_to_itself_is_named_by_reading_it(tree: Path) -> None:
    (tree / "cat" / "self").symlink_to(tree / "cat" / "self")
    (tree / "cat" / "self.jpg").symlink_to(tree / "cat" / "self.jpg")
    source = open_source(tree)
    assert [source.key(i) for i in range(len(source))] == ["cat/a.jpg", "cat/self.jpg", "dog/b.jpg"]
    with pytest.raises(OSError, match=r"self\.jpg"):
        source.read(1)


def test_without_a_home_the_cache_is_temporary(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert cache_folder() == tmp_path / "temporary" / f"mvssl-{os.getuid()}"
    for path in (tree, tree / "cat", tree / "dog"):
        os.utime(path, (1e9, 1e9))
    open_source(tree)
    assert cache_file(tree).is_file()
    assert cache_folder().stat().st_mode & 0o77 == 0  # for this user alone


def test_image_removed_while_a_list_is_indexed_makes_the_index_stale(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "list.txt").write_text("cat/a.jpg\ndog/b.jpg\n")
    os.utime(tree / "cat", (1e9, 1e9))
    size = file_index._file_size

    def meanwhile(path: str) -> int:
        found = size(path)
        os.utime(tree / "cat", (2e9, 2e9))  # as by a file added or removed
        return found

    monkeypatch.setattr(file_index, "_file_size", meanwhile)
    index = file_index.read_list(tree / "list.txt")
    assert dict(zip(index.watched, index.watched_mtime.tolist(), strict=True))[str(tree / "cat")] == 10**18


@pytest.mark.parametrize("name", ["nowhere/a.jpg", "cat/a.jpg/b.jpg"])
def test_list_of_a_file_in_a_folder_that_is_not_there(tree: Path, name: str) -> None:
    (tree / "list.txt").write_text(f"cat/a.jpg\n{name}\n")
    with pytest.raises(InputError, match=f"line 2: the file '{name}' does not exist"):
        open_source(tree / "list.txt")

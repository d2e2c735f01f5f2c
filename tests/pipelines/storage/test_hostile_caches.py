"""Cached indexes and states of conversions that lie are made again; they lead to no file outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.conversion.command import Convert, convert
from pipelines.conversion.destination import Destination
from pipelines.conversion.shard_state import ShardState
from pipelines.storage.folder import cache_file, load_index, save_index
from pipelines.storage.folder import open_path as open_folder
from pipelines.storage.source import KeyTable

Arrays = dict[str, Any]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six images of two classes, whose index is cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    for number in range(6):
        folder = root / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (number, 0, 0)).save(folder / f"{number}.png")
    index = open_folder(root, use_cache=False)._index
    save_index(root, type(index)(**{**vars(index), "watched_mtime": index.watched_mtime - 10**11}))
    arrays = dict(np.load(cache_file(root)))
    arrays["watched_mtime"] = index.watched_mtime
    np.savez(cache_file(root), **arrays)
    assert load_index(root) is not None
    return root


def keys(*names: str) -> Arrays:
    table = KeyTable.of(names)
    return {"key_blob": table.blob, "key_ends": table.ends}


LIES: dict[str, Callable[[Arrays], Any]] = {
    "keys out of the folder": lambda a: a.update(keys("../../etc/passwd", *"bcdef")),
    "keys that are absolute": lambda a: a.update(keys("/etc/passwd", *"bcdef")),
    "keys with .. inside": lambda a: a.update(keys("a/../../x", *"bcdef")),
    "another root": lambda a: a.update(root=KeyTable.of(["/etc"]).blob),
    "fewer keys": lambda a: a.update(keys(*"abc")),
    "ends beyond the names": lambda a: a.update(key_ends=a["key_ends"] + 10**9),
    "ends that go back": lambda a: a.update(key_ends=a["key_ends"][::-1].copy()),
    "negative ends": lambda a: a.update(key_ends=-a["key_ends"]),
    "sizes of another type": lambda a: a.update(nbytes=a["nbytes"].astype(np.float64)),
    "negative sizes": lambda a: a.update(nbytes=-a["nbytes"]),
    "sizes of 2^62": lambda a: a.update(nbytes=a["nbytes"] + (1 << 62)),
    "labels of no class": lambda a: a.update(labels=a["labels"] + 5),
    "labels below -1": lambda a: a.update(labels=a["labels"] - 9),
    "labels of another shape": lambda a: a.update(labels=a["labels"][:, None]),
    "a text for the version": lambda a: a.update(version=np.array("1")),
    "ignored a list": lambda a: a.update(ignored=np.frombuffer(b"[1]", np.uint8)),
    "ignored with texts": lambda a: a.update(ignored=np.frombuffer(b'{"a": "b"}', np.uint8)),
    "ignored nested": lambda a: a.update(ignored=np.frombuffer(b"[" * 9000, np.uint8)),
    "no keys": lambda a: a.pop("key_blob"),
    "an object": lambda a: a.update(labels=np.array([{}] * 6)),
    "a mapped time of another shape": lambda a: a.update(watched_mtime=a["watched_mtime"][:1]),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_cached_index_that_lies_is_not_used(lie: str, images: Path) -> None:
    arrays = dict(np.load(cache_file(images)))
    LIES[lie](arrays)
    np.savez(cache_file(images), **arrays)
    assert load_index(images) is None
    source = open_folder(images)
    assert [source.key(index) for index in range(len(source))] == sorted(f"{'ab'[n % 2]}/{n}.png" for n in range(6))


STATES: dict[str, Callable[[Arrays, dict[str, Any]], Any]] = {
    "keys of numbers": lambda a, m: m.update(keys=[1] * 6),
    "a key too few": lambda a, m: m["keys"].pop(),
    "a shard elsewhere": lambda a, m: m["shard"].update(name="../../etc/passwd"),
    "a shard without a name": lambda a, m: m["shard"].update(name=None),
    "no shard": lambda a, m: m.update(shard=None),
    "another count": lambda a, m: m["shard"].update(count=10**9),
    "an unknown field of the shard": lambda a, m: m["shard"].update(extra=1),
    "rows of another type": lambda a, m: a.update(rows=np.zeros(6)),
    "a row beyond the shard": lambda a, m: a["rows"]["offset"].__setitem__(2, 10**12),
    "a negative offset": lambda a, m: a["rows"]["offset"].__setitem__(2, -5),
    "an empty image": lambda a, m: a["rows"]["size"].__setitem__(2, 0),
    "no height": lambda a, m: a["rows"]["height"].__setitem__(2, 0),
    "a label of -7": lambda a, m: a["rows"]["label"].__setitem__(2, -7),
    "bad images of numbers": lambda a, m: m.update(bad=[[1, 2]]),
    "bad images that are no pairs": lambda a, m: m.update(bad=["abc"]),
    "checksums too few": lambda a, m: m.update(checksums=[1]),
    "checksums too large": lambda a, m: m.update(checksums=[1 << 40] * 6),
    "checksums of texts": lambda a, m: m.update(checksums=["a"] * 6),
    "damage of an image that is none": lambda a, m: m.update(damage=[[99, "x"]]),
    "damage a number": lambda a, m: m.update(damage=7),
    "bytes a text": lambda a, m: m["shard"].update(bytes="many"),
}


def test_a_state_that_lies_is_none(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept.npz"
    finish = Destination.finish

    def keep(destination: Destination, manifest: Any) -> None:
        shutil.copy(destination.state(0), kept)
        finish(destination, manifest)

    monkeypatch.setattr(Destination, "finish", keep)
    convert(Convert(src=images, dst=tmp_path / "shards"))
    assert ShardState.load(kept) is not None
    whole = dict(np.load(kept))
    for lie, edit in STATES.items():
        arrays = {name: array.copy() for name, array in whole.items()}
        meta = json.loads(arrays["meta"].tobytes())
        edit(arrays, meta)
        np.savez(kept, **{**arrays, "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)})
        assert ShardState.load(kept) is None, lie


@pytest.mark.parametrize("content", ["[]", "7", "null", "[" * 9000, '{"a": 1e999}', ""])
def test_a_plan_that_is_none_is_no_plan(content: str, tmp_path: Path) -> None:
    destination = Destination(tmp_path)
    destination.work.mkdir()
    (destination.work / "plan.json").write_text(content)
    destination.prepare({"images": 1}, overwrite=False)
    destination.release()

"""Features on disk equal those computed in memory, also after stops."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvssl.config.recipe import Evaluation
from mvssl.evaluate.feature_store import BAD, DONE, FeatureStore, open_store
from mvssl.evaluate.features import extract_features, fill_store, train_view
from mvssl.evaluate.session import Session
from pipelines.decode import DecodeOptions
from pipelines.runtime import InputError
from pipelines.storage import open_source
from pipelines.storage.source import Source
from tests.samples.networks import Brightness

EVALUATION = Evaluation(resize=32, crop=32)
PILLOW = DecodeOptions(decoder="pillow", threads=1)
SESSION = Session(device=torch.device("cpu"), decode=PILLOW, batch_size=5)


def a_store(folder: Path, rows: int = 36, **options: Any) -> FeatureStore:
    return open_store(
        folder, **{"rows": rows, "width": 2, "dtype": "float32", "identity": {"weights": "abc"}, **options}
    )


def fill(store: FeatureStore, source: Source, backbone: nn.Module, **options: Any) -> None:
    fill_store(SESSION, store, backbone, source, EVALUATION, **options)


def test_rows_equal_features_extracted_in_memory(images: Path, tmp_path: Path) -> None:
    source = open_source(images / "train")
    store = a_store(tmp_path / "s")
    fill(store, source, Brightness())
    expected = extract_features(SESSION, Brightness(), source, EVALUATION).values
    assert np.array_equal(store.values, expected.numpy())
    assert (np.load(tmp_path / "s/state.npy") == DONE).all()
    assert np.array_equal(np.load(tmp_path / "s/features.npy"), expected.numpy())


def test_a_stopped_computation_resumes(images: Path, tmp_path: Path) -> None:
    source = open_source(images / "train")
    store = a_store(tmp_path / "s")

    def stop_after(rows: int) -> Any:
        done = 0

        def progress(more: int) -> None:
            nonlocal done
            done += more
            if done >= rows:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        fill(store, source, Brightness(), progress=stop_after(15))
    again = a_store(tmp_path / "s")
    assert again.missing(range(36)).tolist() == list(range(15, 36))
    counted: list[int] = []
    fill(again, source, Brightness(), progress=counted.append)
    assert sum(counted) == 21
    whole = a_store(tmp_path / "whole")
    fill(whole, source, Brightness())
    assert np.array_equal(again.values, whole.values)


def test_random_views_are_those_of_the_engine(images: Path, tmp_path: Path) -> None:
    from pipelines.loading.eval_loader import iterate_augmented

    source = open_source(images / "train")
    store = a_store(tmp_path / "s", rows=108)
    fill(store, source, Brightness(), drawn=2, seed=3)
    views = [
        Brightness()(view)
        for epoch in (0, 1)
        for view, _, _ in iterate_augmented(source, train_view(32), seed=3, epoch=epoch, batch_size=36, decode=PILLOW)
    ]
    np.testing.assert_allclose(store.values[36:], torch.cat(views), atol=1e-6)
    assert np.abs(store.values[36:72] - store.values[72:]).max() > 0.01


def test_undecodable_images_are_marked(images: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(images / "train", tmp_path / "data")
    (tmp_path / "data/class_1/003.jpg").write_bytes(b"no image")
    source = open_source(tmp_path / "data")
    store = a_store(tmp_path / "s")
    fill(store, source, Brightness())
    assert np.flatnonzero(store.state == BAD).tolist() == [15]
    assert not len(store.missing(range(36)))


def test_a_store_of_another_identity_is_left_alone(tmp_path: Path) -> None:
    store = a_store(tmp_path / "s")
    store.write(np.array([1]), np.ones((1, 2), dtype=np.float32), ["a"])
    store.save()
    with pytest.raises(InputError, match=r"holds other features \(rows, weights differ\)"):
        a_store(tmp_path / "s", rows=30, identity={"weights": "other"})
    assert a_store(tmp_path / "s").values[1].tolist() == [1, 1]
    assert a_store(tmp_path / "s", identity={"weights": "other"}, overwrite=True).missing(range(36)).size == 36
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        a_store(tmp_path / "folder")


def test_a_full_disk_is_noticed_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        a_store(tmp_path / "s")
    assert str(caught.value.filename).endswith("features.npy")
    assert not list((tmp_path / "s").iterdir())
    monkeypatch.undo()
    assert a_store(tmp_path / "s").missing(range(36)).size == 36


class Constant(nn.Module):
    """[B, 3, S, S] -> [B, 2], constant."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, view: Tensor) -> Tensor:
        return torch.full((len(view), 2), self.value)


def test_features_that_are_not_finite(images: Path, tmp_path: Path) -> None:
    source = open_source(images / "train")
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"^The features of class_0/000\.jpg are not finite"):
            fill(a_store(tmp_path / str(value)), source, Constant(value))
        with pytest.raises(InputError, match=r"^The features of class_0/000\.jpg are not finite"):
            extract_features(SESSION, Constant(value), source, EVALUATION)
    with pytest.raises(InputError, match=r"reach 1e\+05, more than float16 holds: use --dtype float32"):
        fill(a_store(tmp_path / "half", dtype="float16"), source, Constant(1e5))


def test_an_early_end_leaves_no_threads_to_the_garbage_collector(images: Path, tmp_path: Path) -> None:
    """A thread pool collected inside another thread's `submit` deadlocks on that thread's lock."""
    import gc
    import threading

    source = open_source(images / "train")
    before = set(threading.enumerate())
    gc.disable()
    try:
        for number in range(3):
            with pytest.raises(InputError) as caught:
                fill(a_store(tmp_path / str(number)), source, Constant(float("nan")))
            assert set(threading.enumerate()) <= before, "frames of an exception keep its threads alive"
            assert caught.value is not None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["features.npy", "state.npy", "checks.npy"])
def test_flipped_bits_are_found_and_those_rows_computed_again(
    name: str, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(images / "train")
    store = a_store(tmp_path / "s")
    fill(store, source, Brightness())
    whole = store.values.copy()
    del store
    content = bytearray((tmp_path / "s" / name).read_bytes())
    for at in (-1, -7):  # of the last rows, which are two floats, a byte, or four bytes long
        content[at] ^= 2
    (tmp_path / "s" / name).write_bytes(content)
    again = a_store(tmp_path / "s")
    assert "features are damaged and will be computed again" in caplog.text
    assert 1 <= len(again.missing(range(36))) <= 2
    fill(again, source, Brightness())
    assert np.array_equal(again.values, whole)
    assert not a_store(tmp_path / "s").missing(range(36)).size


def test_a_store_without_checksums_is_taken_as_it_is(images: Path, tmp_path: Path) -> None:
    """Stores of earlier versions have none."""
    fill(a_store(tmp_path / "s"), open_source(images / "train"), Brightness())
    (tmp_path / "s/checks.npy").unlink()
    assert not a_store(tmp_path / "s").missing(range(36)).size
    assert np.load(tmp_path / "s/checks.npy").all()


def test_what_a_kill_leaves_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for name in ("features.npy", ".identity.tmp.json"):
        (tmp_path / "s" / name).write_bytes(b"half")
    assert a_store(tmp_path / "s").missing(range(36)).size == 36


LIES: dict[str, Any] = {
    "another dtype": np.zeros((6, 4), np.float64),
    "another shape": np.zeros((6, 5), np.float32),
    "more rows": np.zeros((7, 4), np.float32),
    "in Fortran's order": np.asfortranarray(np.zeros((6, 4), np.float32)),
    "objects": np.array([[{}] * 4] * 6),
}


@pytest.mark.parametrize("lie", [*LIES, "a shape beyond the file", "a link", "cut short", "a pipe"])
def test_a_store_that_lies_is_refused_and_nothing_else_is_written(lie: str, tmp_path: Path) -> None:
    folder, precious = tmp_path / "store", tmp_path / "precious.npy"

    def opened() -> Any:
        return open_store(folder, rows=6, width=4, dtype="float32", identity={"network": "a"})

    opened()
    path = folder / "features.npy"
    np.save(precious, np.load(path))
    before = precious.read_bytes()
    if lie in LIES:
        np.save(path, LIES[lie], allow_pickle=True)
    elif lie == "a link":
        path.unlink()
        path.symlink_to(precious)
    elif lie == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif lie == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes(path.read_bytes().replace(b"(6, 4), }    ", b"(60000, 4), }"))
    size = path.lstat().st_size
    with pytest.raises(InputError, match=r"features\.npy cannot be read \(.*it "):
        opened()
    assert path.lstat().st_size == size
    assert precious.read_bytes() == before


@pytest.mark.parametrize("content", ["[]", "[" * 9000, "7", '{"rows": 1e999}'])
def test_an_identity_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    def opened() -> Any:
        return open_store(tmp_path / "store", rows=6, width=4, dtype="float32", identity={"network": "a"})

    opened()
    (tmp_path / "store/identity.json").write_text(content)
    with pytest.raises(InputError, match="holds other features"):
        opened()

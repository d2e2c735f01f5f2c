"""A conversion of any form resumes after an interruption, with the bytes of an uninterrupted one."""

from __future__ import annotations

import errno
import os
import tarfile
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.conversion import conversion, sources
from pipelines.storage.forms.base import FormSource
from pipelines.storage.forms.blobs import PackedBlob
from tests.samples.convert_runs import Run, digests
from tests.samples.form_samples import CLASSES, as_folder, encoded, items

IMAGES = items(200)


def make(form: str, root: Path) -> Path:
    folder = as_folder(root / "folder", IMAGES)
    path = root / f"a.{form}"
    if form == "parquet":
        columns = {"image": [item.data for item in IMAGES], "label": [CLASSES.index(item.label) for item in IMAGES]}
        pq.write_table(pa.table(columns), path, row_group_size=150)
    elif form == "tar.gz":
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, "photos")
    else:
        with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
            for item in IMAGES:
                transaction.put(f"{item.label}/{item.name}".encode(), item.data)
    return path


@pytest.mark.parametrize("form", ["parquet", "tar.gz", "lmdb"])
def test_resumed(run: Run, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(form, tmp_path)
    count = 0

    def failing(source: FormSource, index: int) -> np.ndarray | str:
        nonlocal count
        count += 1
        if count > 120:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a")
        return sources.read(source, index)

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "read", failing)
        assert run(source, tmp_path / "d", "--shard-size", 0.02, "--workers", 2).code == 1
    assert not (tmp_path / "d" / "manifest.json").exists()
    finished = sorted((tmp_path / "d").glob("shard-*.tar"))
    assert finished
    before = [path.stat().st_mtime_ns for path in finished]
    outcome = run(source, tmp_path / "d", "--shard-size", 0.02, "--workers", 5, "--verify")
    assert outcome.code == 0, outcome.err
    assert "all 200 images have their checksums" in outcome.out
    assert [path.stat().st_mtime_ns for path in finished] == before
    assert run(source, tmp_path / "whole", "--shard-size", 0.02, "--workers", 1).code == 0
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


def test_rows_in_any_order(tmp_path: Path) -> None:
    """Random access gives the same images as reading in order, also where it has to start again."""
    from pipelines.storage.forms import Request, find_form, open_form
    from pipelines.storage.forms.look import look_at

    for form in ("parquet", "tar.gz", "lmdb"):
        root = tmp_path / form
        root.mkdir()
        look = look_at(make(form, root))
        assert look is not None
        module = find_form(look)
        assert module is not None
        (source,) = open_form(module, look, Request()).splits.values()
        in_order = [source.read(n).tobytes() for n in range(len(source))]
        assert set(in_order) == {item.data for item in IMAGES}
        for n in np.random.default_rng(0).permutation(len(source)).tolist():
            assert source.read(n).tobytes() == in_order[n]
        source.close()


def test_a_window_that_is_too_small_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setattr("pipelines.storage.forms.blobs._CHUNK", 100)
    monkeypatch.setattr("pipelines.storage.forms.blobs._WINDOW", 300)
    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes() + encoded(1)
    (tmp_path / "a.gz").write_bytes(gzip.compress(data))
    blob = PackedBlob(tmp_path / "a.gz", "gz")
    for at in (0, 900, 4000, 3700, 3500, 10, 4990, len(data) - 5, len(data), 0):
        assert blob.read(250, at) == data[at : at + 250]
    blob.close()

"""Tars of webdataset, Parquet of pyarrow and folders of `datasets` give the views of the folder of the same images."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipelines.conversion.command import main
from pipelines.loader import Loader
from pipelines.runtime import InputError
from pipelines.storage import open_source, split_paths
from pipelines.views.spec import ViewSpec
from tests.samples.form_samples import CLASSES, Item, as_folder, encoded, items

IMAGES = sorted(items(20), key=lambda item: (item.label, item.name))  # as a folder orders them
SPECS = (
    ViewSpec(name="a", task="global", size=16, blur_kernel=3, is_target=True),
    ViewSpec(name="b", task="local", size=8, area=(0.1, 0.4), blur_kernel=3),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def older(path: Path) -> Path:
    """The path, with files that were written ten seconds ago, whose index may be cached."""
    then = time.time() - 10
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(file, (then, then))
    return path


def write_tars(folder: Path, images: list[Item], *, name: str = "train-%04d.tar", count: int = 7) -> Path:
    """Tars of webdataset, `count` samples each, with the number of the class as .cls."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / name), maxcount=count, verbose=0) as writer:
        for item in images:
            stem, _, ending = item.name.partition(".")
            writer.write({"__key__": stem, ending: item.data, "cls": CLASSES.index(item.label)})
    return folder


def table(images: list[Item]) -> pa.Table:
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    made = pa.table(
        {
            "image": pa.array([{"bytes": item.data, "path": item.name} for item in images]),
            "label": pa.array([CLASSES.index(item.label) for item in images]),
        }
    )
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(folder: Path, images: list[Item]) -> Path:
    folder.mkdir()
    for number, part in enumerate((images[:12], images[12:])):
        pq.write_table(table(part), folder / f"train-{number:05d}-of-00002.parquet", row_group_size=5)
    return folder


def write_saved(folder: Path, images: list[Item]) -> Path:
    """A folder of `Dataset.save_to_disk`."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    columns = {
        "image": [{"bytes": item.data, "path": None} for item in images],
        "label": [CLASSES.index(item.label) for item in images],
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder, num_shards=2)
    return folder


def write_zip(path: Path, images: list[Item]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for item in images:
            archive.writestr(f"{item.label}/{item.name}", item.data)
    return path


def write_tar(path: Path, images: list[Item]) -> Path:
    with tarfile.open(path, "w") as archive:
        for item in images:
            info = tarfile.TarInfo(f"{item.label}/{item.name}")
            info.size = len(item.data)
            archive.addfile(info, io.BytesIO(item.data))
    return path


WRITERS: dict[str, Callable[[Path, list[Item]], Path]] = {
    "webdataset": write_tars,
    "tar": write_tar,
    "zip": write_zip,
    "parquet": write_parquet,
    "saved": write_saved,
}


def views_of(data: object) -> str:
    """Hash of pixels, indices and labels of an epoch of views."""
    digest = hashlib.sha256()
    with Loader.of(data, SPECS, batch_size=5, seed=3) as loader:
        for batch in loader:
            for view in batch.views:
                digest.update(np.ascontiguousarray(view.numpy()).data)
            digest.update(batch.index.numpy().tobytes() + batch.labels.numpy().tobytes())
    return digest.hexdigest()


def convert(source: Path, target: Path, *options: str) -> Path:
    with pytest.raises(SystemExit) as leaving:
        main([str(source), str(target), "--shard-size", "0.005", *options])
    assert leaving.value.code == 0
    return target


@pytest.mark.parametrize("form", WRITERS)
def test_views_of_each_form(form: str, tmp_path: Path) -> None:
    """Read in place: with a new index, with the cached one, after conversion, and as a folder."""
    expected = views_of(as_folder(tmp_path / "folder", IMAGES))
    data = older(WRITERS[form](tmp_path / form, IMAGES))
    before = sorted(path.stat().st_mtime_ns for path in [data, *data.rglob("*")])
    source = open_source(data)
    assert [source.read(n).tobytes() for n in range(20)] == [item.data for item in IMAGES]
    assert [CLASSES[label] for label in source.labels] == [item.label for item in IMAGES]
    source.close()
    assert views_of(data) == expected
    assert views_of(data) == expected
    assert sorted(path.stat().st_mtime_ns for path in [data, *data.rglob("*")]) == before  # nothing written there
    assert views_of(convert(data, tmp_path / "shards")) == expected


def test_a_pattern_names_some_tars(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "wds", IMAGES)
    source = open_source(str(folder / "train-{0000..0001}.tar"))
    assert [source.read(n).tobytes() for n in range(len(source))] == [item.data for item in IMAGES[:14]]
    with pytest.raises(InputError, match=r"train-0003\.tar"):
        open_source(str(folder / "train-{0000..0003}.tar"))


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_splits_are_in_the_names_of_files(form: str, tmp_path: Path) -> None:
    data, more = tmp_path / "data", items(6, first=20)
    WRITERS[form](data, IMAGES)
    if form == "parquet":
        pq.write_table(table(more), data / "validation-00000-of-00001.parquet")
    else:
        write_tars(data, more, name="val-%04d.tar")
    train, val = split_paths(data)
    assert val is not None
    assert [len(open_source(train)), len(open_source(val))] == [20, 6]
    assert open_source(val).read(2).tobytes() == more[2].data
    assert views_of(data) == views_of(as_folder(tmp_path / "folder", IMAGES))


@pytest.mark.parametrize("form", WRITERS)
def test_changed_files(form: str, tmp_path: Path) -> None:
    """An open source says that its file changed; the next one has the new images."""
    data = older(WRITERS[form](tmp_path / form, IMAGES))
    assert len(open_source(data)) == 20  # caches the index
    opened = open_source(data)
    later = [Item(item.name, encoded(100 + n, "PNG"), item.label) for n, item in enumerate(IMAGES[:16])]
    if data.is_file():
        data.unlink()
        WRITERS[form](data, later)
    else:
        written = WRITERS[form](tmp_path / "new", later)
        for file in sorted(path for path in data.rglob("*") if path.is_file()):
            file.unlink()
        for file in sorted(path for path in written.rglob("*") if path.is_file()):
            file.rename(data / file.relative_to(written))
    if form != "saved":  # its files were mapped
        with pytest.raises(InputError, match="changed since it was indexed"):
            for n in range(20):
                opened.read(n)
    now = open_source(data)
    assert [now.read(n).tobytes() for n in range(len(now))] == [item.data for item in later]


@pytest.mark.parametrize("form", ["webdataset", "tar", "zip", "parquet", "saved"])
def test_truncated_files_are_named(form: str, tmp_path: Path) -> None:
    data = WRITERS[form](tmp_path / form, IMAGES)
    files = [data] if data.is_file() else sorted(data.rglob("*.tar")) + sorted(data.rglob("*.[pa]*r*ow*"))
    files = files or sorted(data.rglob("*.parquet"))
    with files[-1].open("r+b") as file:
        file.truncate(files[-1].stat().st_size * 2 // 3)
    with pytest.raises(InputError, match=rf"{files[-1].name}.*(truncated|damaged|begin)"):
        open_source(data)


def test_damaged_images_are_replaced_as_after_conversion(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = list(IMAGES)
    images[4] = images[4]._replace(data=b"no image")
    assert views_of(write_tars(tmp_path / "wds", images)) == views_of(as_folder(tmp_path / "folder", images))
    assert any(images[4].name.partition(".")[0] in record.getMessage() for record in caplog.records)


def test_parquet_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = write_parquet(tmp_path / "mixed", IMAGES)
    renamed = table(IMAGES).rename_columns(["picture", "label"])
    pq.write_table(renamed, mixed / "train-00001-of-00002.parquet")
    with pytest.raises(InputError, match=r"another schema.*'image' is missing"):
        open_source(mixed)
    (tmp_path / "none").mkdir()
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "none" / "a.parquet")
    with pytest.raises(InputError, match="image"):
        open_source(tmp_path / "none")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"needs the package pyarrow.*pip install 'mvssl\[formats\]'"):
        open_source(tmp_path / "none")


def test_what_has_to_be_converted_says_the_command(tmp_path: Path) -> None:
    packed = tmp_path / "a.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cat"), io.BytesIO())
        info = tarfile.TarInfo("cat/1.jpg")
        info.size = len(IMAGES[0].data)
        archive.addfile(info, io.BytesIO(IMAGES[0].data))
    cifar = tmp_path / "cifar-10-batches-bin"
    cifar.mkdir()
    rows = np.random.default_rng(0).integers(0, 10, (10_000, 3073), dtype=np.uint8)
    for name in (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"):
        (cifar / name).write_bytes(rows.tobytes())
    for path in (packed, cifar):
        with pytest.raises(InputError, match=f"mvssl-convert .*{path.name}"):
            open_source(path)


def test_two_processes_build_one_index(tmp_path: Path) -> None:
    data = older(write_tars(tmp_path / "wds", IMAGES))
    program = (
        "import sys, time; from pathlib import Path; from pipelines.storage.forms import tars\n"
        "build = tars.open_form\n"
        "def slow(*arguments):\n"
        "    Path(sys.argv[2], str(time.monotonic_ns())).touch(); time.sleep(1); return build(*arguments)\n"
        "tars.open_form = slow\n"
        "from pipelines.storage import open_source; print(open_source(sys.argv[1]).fingerprint)\n"
    )
    (tmp_path / "builds").mkdir()
    command: list[Any] = [sys.executable, "-c", program, data, tmp_path / "builds"]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    prints = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert len(prints) == 1
    assert len(list((tmp_path / "builds").iterdir())) == 1

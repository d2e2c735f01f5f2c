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
from pipelines.storage import open_source
from pipelines.storage.given import source_of
from pipelines.storage.image_facts import facts_of
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
            opened.read(0)
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


def test_folders_of_img2dataset(tmp_path: Path) -> None:
    """A table of addresses and captions beside each tar, and indices as DALI has them, are no images."""
    folder = write_tars(tmp_path / "wds", IMAGES, name="%05d.tar")
    for tar in sorted(folder.glob("*.tar")):
        pq.write_table(pa.table({"url": ["http://a"], "caption": ["a cat"]}), tar.with_suffix(".parquet"))
        tar.with_suffix(".idx").write_text("v1.2 1\njpg 512 100 000.jpg\n")
        tar.with_name(f"{tar.stem}_stats.json").write_text("{}")
    source = open_source(folder)
    assert [source.read(n).tobytes() for n in range(20)] == [item.data for item in IMAGES]


def test_lists_hold_patterns_and_splits(tmp_path: Path) -> None:
    """Beside a Parquet file; one that names no file is refused."""
    folder, table_ = write_tars(tmp_path / "wds", IMAGES[:14]), write_parquet(tmp_path / "parquet", IMAGES)
    write_tars(folder, IMAGES[14:], name="val-%04d.tar")
    source = source_of(
        [str(folder / "train-{0000..0001}.tar"), f"{folder}#val", table_ / "train-00001-of-00002.parquet"]
    )
    expected = [item.data for item in (*IMAGES, *IMAGES[12:])]
    assert [source.read(n).tobytes() for n in range(len(source))] == expected
    with pytest.raises(InputError, match="does not exist"):
        source_of([str(folder / "test-{0000..0001}.tar")])


def test_a_choice_that_only_conversion_has(tmp_path: Path) -> None:
    data = [item.data for item in IMAGES]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"left": data, "right": data}), path)
    with pytest.raises(InputError, match=r"left, right.*mvssl-convert \S+a\.parquet DST --image left"):
        open_source(path)
    with pytest.raises(InputError, match=r"is no split of .*: leave out #val"):
        open_source(f"{write_tar(tmp_path / 'a.tar', IMAGES)}#val")


def test_bytes_that_changed_in_a_zip_are_a_bad_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checksum in the zip tells, where size and time of the file do not."""
    path = older(write_zip(tmp_path / "a.zip", IMAGES))
    status, data = path.stat(), bytearray(path.read_bytes())
    data[data.index(IMAGES[4].data) + len(IMAGES[4].data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    views_of(path)
    assert f"{IMAGES[4].label}/{IMAGES[4].name}" in caplog.text
    assert "its bytes are not those that were written (checksum)" in caplog.text


def test_missing_pyarrow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_parquet(tmp_path / "parquet", IMAGES)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"needs the package pyarrow.*pip install 'mvssl\[formats\]'"):
        open_source(data)


def test_the_log_says_what_the_data_are(tmp_path: Path) -> None:
    data = older(write_tars(tmp_path / "wds", IMAGES))
    for _ in range(2):  # without and with the cached index
        notes = facts_of(open_source(data)).notes
        assert notes == (f"{data}: 20 images, WebDataset (3 tars), read in place",)
    assert "20 images, 2 Parquet files" in facts_of(open_source(write_parquet(tmp_path / "parquet", IMAGES))).notes[0]

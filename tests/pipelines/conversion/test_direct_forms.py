"""Training reads tars, zips, Parquet and Arrow files in place and makes the views that it makes of converted data."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
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

from mvssl.runs.data_record import DataRecord
from pipelines.decode import DecodeOptions
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.runtime import InputError
from pipelines.storage import Source, check_outside, open_source, split_paths
from pipelines.storage import direct as direct_module
from pipelines.storage.forms import Found, open_form, row_groups
from pipelines.storage.source import ReadsBatches
from tests.samples.convert_runs import Run
from tests.samples.form_samples import CLASSES, Item, as_folder, items
from tests.samples.loader_samples import SPECS

COUNT = 24


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def aged(path: Path) -> Path:
    """Files as if written long ago, so that their index is cached."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(file, (1_000_000_000, 1_000_000_000))
    return path


def cut(path: Path) -> Path:
    os.truncate(path, 1500)
    return path


def webdataset_tars(root: Path, images: list[Item]) -> Path:
    root.mkdir(parents=True)
    with webdataset.ShardWriter(str(root / "part-%04d.tar"), maxcount=10, verbose=0) as writer:
        for item in images:
            stem, ending = item.name.split(".")
            writer.write({"__key__": stem, ending: item.data, "cls": CLASSES.index(item.label)})
    return root


def tar(path: Path, images: list[Item], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for item in images:
            info = tarfile.TarInfo(f"{item.label}/{item.name}")
            info.size = len(item.data)
            archive.addfile(info, io.BytesIO(item.data))
    return path


def zipped(path: Path, images: list[Item], method: int) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for item in images:
            archive.writestr(f"{item.label}/{item.name}", item.data)
    return path


def table(images: list[Item]) -> pa.Table:
    rows = [{"bytes": item.data, "path": item.name} for item in images]
    return pa.table({"image": rows, "label": [CLASSES.index(item.label) for item in images]})


def parquet(root: Path, images: list[Item], compression: str = "snappy") -> Path:
    root.mkdir(parents=True)
    half = len(images) // 2
    for number, some in enumerate((images[:half], images[half:])):
        pq.write_table(table(some), root / f"{number:05d}.parquet", row_group_size=5, compression=compression)
    return root


def saved(root: Path, images: list[Item]) -> Path:
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"image": [{"bytes": i.data, "path": None} for i in images], "label": [i.label for i in images]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(root))
    return root


def arrow_file(path: Path, images: list[Item], compression: str | None) -> Path:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table(images).schema, options=options) as writer:
        writer.write_table(table(images), max_chunksize=7)
    return path


FORMS: dict[str, Callable[[Path, list[Item]], Path]] = {
    "webdataset": lambda path, images: webdataset_tars(path / "wds", images),
    "tar": lambda path, images: tar(path / "a.tar", images),
    "zip": lambda path, images: zipped(path / "a.zip", images, zipfile.ZIP_STORED),
    "deflated": lambda path, images: zipped(path / "b.zip", images, zipfile.ZIP_DEFLATED),
    "parquet": lambda path, images: parquet(path / "pq", images),
    "uncompressed parquet": lambda path, images: parquet(path / "pq", images, "none"),
    "one parquet": lambda path, images: next(parquet(path / "pq", images).glob("00000*")),
    "saved": lambda path, images: saved(path / "saved", images),
    "arrow": lambda path, images: arrow_file(path / "a.arrow", images, None),
    "lz4 arrow": lambda path, images: arrow_file(path / "a.arrow", images, "lz4"),
}


def views_hash(source: Source) -> str:
    """SHA-256 of the views and labels of two epochs."""
    digest = hashlib.sha256()
    order = Order(num_images=len(source), batch_size=8, seed=3)
    with Loader(source, SPECS, order, decode=DecodeOptions(decoder="pillow", threads=2)) as loader:
        for epoch in (0, 1):
            for batch in loader.epoch(epoch):
                for view in batch.views:
                    digest.update(np.ascontiguousarray(view.cpu().numpy()).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("form", [form for form in FORMS if form != "one parquet"])
def test_views_are_those_of_converted_data(run: Run, tmp_path: Path, form: str) -> None:
    images = items(COUNT)
    data = aged(FORMS[form](tmp_path, images))
    assert run(data, tmp_path / "converted").code == 0
    with_index = open_source(data)
    again = open_source(data)
    converted = open_source(tmp_path / "converted")
    labels = converted.labels
    for source in (with_index, again):
        assert source.classes == converted.classes
        assert source.labels.tolist() == labels.tolist()
        assert [source.read(n).tobytes() for n in range(COUNT)] == [converted.read(n).tobytes() for n in range(COUNT)]
    assert views_hash(again) == views_hash(with_index) == views_hash(converted)
    record = DataRecord.of(with_index)
    assert record.differences(DataRecord.of(converted)) == []
    assert DataRecord.of(converted).differences(record) == []


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_views_are_those_of_the_folder(tmp_path: Path, form: str) -> None:
    images = items(COUNT)
    assert views_hash(open_source(FORMS[form](tmp_path, images))) == views_hash(
        open_source(as_folder(tmp_path / "folder", images))
    )


@pytest.mark.parametrize("form", ["webdataset", "zip", "parquet", "saved"])
def test_the_index_is_built_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    data = aged(FORMS[form](tmp_path, items(COUNT)))
    built = []

    def counting(*given: Any) -> Found:
        built.append(1)
        return open_form(*given)

    monkeypatch.setattr(direct_module, "open_form", counting)
    first, second = open_source(data), open_source(data)
    assert len(built) == 1
    assert second.fingerprint == first.fingerprint
    file = next(
        path for path in sorted([data, *data.rglob("*")]) if path.suffix in (".tar", ".zip", ".parquet", ".arrow")
    )
    os.utime(file, (1_100_000_000, 1_100_000_000))
    open_source(data)
    assert len(built) == 2
    for cached in (tmp_path / "cache" / "mvssl").glob("direct-*.npz"):
        cached.write_bytes(cached.read_bytes()[:200])
    assert open_source(data).fingerprint == first.fingerprint
    assert len(built) == 3


def test_patterns_and_splits_by_name(tmp_path: Path) -> None:
    root = webdataset_tars(tmp_path / "w", items(COUNT))
    files = sorted(root.iterdir())
    assert len(open_source(f"{root}/part-{{0000..0001}}.tar")) == 20
    files[2].rename(root / "validation-0000.tar")
    for number, file in enumerate(files[:2]):
        file.rename(root / f"train-{number:04d}.tar")
    train, val = split_paths(root)
    assert (str(train), str(val)) == (f"{root}#train", f"{root}#val")
    assert [len(open_source(path)) for path in (root, train, f"{root}#val", f"{root}/train-*.tar")] == [20, 20, 4, 20]
    with pytest.raises(InputError, match="has the splits train, val but must have the split dev: choose one"):
        open_source(f"{root}#dev")


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_splits_in_an_archive(tmp_path: Path, form: str) -> None:
    images = [
        item._replace(label=f"{'val' if n % 4 == 0 else 'train'}/{item.label}") for n, item in enumerate(items(COUNT))
    ]
    train, val = split_paths(FORMS[form](tmp_path, images))
    assert val is not None
    assert [len(open_source(train)), len(open_source(val))] == [18, 6]
    assert open_source(train).classes == CLASSES


def test_a_labelled_test_split_measures_where_there_is_no_val(tmp_path: Path) -> None:
    for name, some in (("train", items(12)), ("test", items(6, first=12))):
        pq.write_table(table(some), tmp_path / f"{name}-00000-of-00001.parquet")
    train, val = split_paths(tmp_path)
    assert [len(open_source(train)), len(open_source(val or ""))] == [12, 6]


def test_converted_data_and_folders_stay_what_they_were(run: Run, tmp_path: Path) -> None:
    folder = as_folder(tmp_path / "folder", items(COUNT))
    for name in ("train", "val"):
        assert run(folder, tmp_path / "d" / name).code == 0
    for path in (tmp_path / "d" / "train", tmp_path / "d", folder, tmp_path / "nothing"):
        assert not direct_module.can_open(path)
    assert split_paths(tmp_path / "d") == (tmp_path / "d" / "train", tmp_path / "d" / "val")
    assert type(open_source(tmp_path / "d" / "val")).__name__ == "ShardSource"


def test_what_is_written_may_not_become_an_image(tmp_path: Path) -> None:
    root = webdataset_tars(tmp_path / "w", items(COUNT))
    for data in (root, Path(f"{root}#train")):
        with pytest.raises(InputError, match="must be outside"):
            check_outside(root / "run", data, field="out")


def test_a_folder_of_tars_and_images_is_ambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = webdataset_tars(tmp_path / "w", items(COUNT))
    monkeypatch.chdir(root)
    assert len(open_source(".")) == COUNT
    (root / "sample.jpg").write_bytes(items(1)[0].data)
    with pytest.raises(InputError, match=r"holds 3 \.tar and 1 images besides .*: give the files with a pattern"):
        open_source(root)
    assert len(open_source(f"{root}/*.tar")) == COUNT


@pytest.mark.parametrize("form", ["tar", "zip", "arrow", "one parquet"])
@pytest.mark.parametrize("change", ["cut", "written", "gone"])
def test_a_file_that_changes_is_named(tmp_path: Path, form: str, change: str) -> None:
    data = aged(FORMS[form](tmp_path, items(COUNT)))
    source = open_source(data)
    if change == "gone":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[: 300 if change == "cut" else None])
    why = {"cut": "has 300 bytes, not", "written": "was written again", "gone": "is missing"}[change]
    with pytest.raises(
        InputError, match=rf"{re.escape(data.name)} has changed since it was indexed \(it {why}.*: restore"
    ):
        source.read(5)
    if isinstance(source, ReadsBatches):
        with pytest.raises(InputError, match="has changed"):
            source.read_batch([1, 2])


def test_a_file_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    data = FORMS["tar"](tmp_path, items(COUNT))
    source = open_source(data)
    source.read(0)
    os.truncate(data, 2000)
    with pytest.raises(InputError, match="ends before"):
        source.read(COUNT - 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: tar(p / "a.tar.gz", items(3), "w:gz"), "a compressed tar, but must be a plain one.*mvssl-convert"),
        (lambda p: cut(FORMS["tar"](p, items(3))), "is truncated or damaged"),
        (lambda p: (p / "e.tar", (p / "e.tar").write_bytes(b""))[0], "is truncated or damaged|holds no"),
        (lambda p: (pq.write_table(pa.table({"a": [1]}), p / "a.parquet"), p / "a.parquet")[1], "no column of images"),
        (lambda p: (p / "a.parquet", (p / "a.parquet").write_bytes(b"PAR1xx"))[0], "truncated or damaged"),
        (lambda p: tar(p / "a.tar", [items(1)[0]] * 2), "twice: write it again"),
    ],
    ids=["gz", "cut", "empty", "no images", "no parquet", "twice"],
)
def test_bad_data_is_one_sentence(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        open_source(make(tmp_path))
    assert "\n" not in str(raised.value)


def test_mixed_schemas_and_other_forms_are_refused(tmp_path: Path) -> None:
    root = parquet(tmp_path / "pq", items(6))
    other = table(items(3)).set_column(1, "label", pa.array(["a", "b", "c"]))
    pq.write_table(other, root / "00002.parquet")
    with pytest.raises(InputError, match="another schema"):
        open_source(root)
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(InputError, match=r"holds data of the form hdf5 but must be .*mvssl-convert"):
        open_source(tmp_path / "a.h5")


def test_row_groups_stay_within_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups, "MOST_BYTES", 1)
    images = items(COUNT)
    source = open_source(parquet(tmp_path / "pq", images))
    order = np.random.default_rng(0).permutation(COUNT).tolist()
    assert [source.read(n).tobytes() for n in order] == [images[n].data for n in order]
    assert len(source.reader._cached) == 2  # type: ignore[attr-defined]


def test_an_index_that_leads_out_of_its_files_is_built_again(tmp_path: Path) -> None:
    data = aged(FORMS["tar"](tmp_path, items(COUNT)))
    fingerprint = open_source(data).fingerprint
    (cached,) = (tmp_path / "cache" / "mvssl").glob("direct-*.npz")
    arrays = dict(np.load(cached))
    for name, value in (("0_offset", 1 << 50), ("0_offset", -1), ("0_file", 3), ("0_labels", 9)):
        changed = {**arrays, name: np.full_like(arrays[name], value)}
        np.savez(cached, **changed)
        assert open_source(data).fingerprint == fingerprint


def test_a_damaged_image_is_replaced_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = items(COUNT)
    images[5] = images[5]._replace(data=images[5].data[:40])
    views_hash(open_source(FORMS["tar"](tmp_path, images)))
    assert len(re.findall(re.escape(images[5].name), caplog.text)) >= 1


def test_the_same_names_in_several_tars_are_different_images(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "w"
    root.mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(root / f"{number:03d}.tar")) as writer:
            for n, item in enumerate(items(4, first=4 * number)):
                writer.write({"__key__": str(n), "img.png" if n == 3 else "jpg": item.data, "cls": n % 3})
    assert run(root, tmp_path / "converted").code == 0
    source = open_source(root)
    assert [source.read(n).tobytes() for n in range(8)] == [item.data for item in items(8)]
    assert DataRecord.of(source).differences(DataRecord.of(open_source(tmp_path / "converted"))) == []

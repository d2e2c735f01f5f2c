"""Parquet, Arrow and saved data sets, written by pyarrow and `datasets`, give what the folder of their images gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.storage import open_source
from tests.samples.convert_runs import Run, assert_refused, digests
from tests.samples.form_samples import CLASSES, Item, as_folder, contents, encoded, items

EXPECTED = {(item.data, item.label) for item in items()}
HF = {
    b"huggingface": json.dumps(
        {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
    ).encode()
}


def table(images: list[Item], **changes: Any) -> pa.Table:
    columns = {
        "image": pa.array([{"bytes": item.data, "path": item.name} for item in images]),
        "label": pa.array([CLASSES.index(item.label) for item in images]),
        **changes,
    }
    return pa.table({name: column for name, column in columns.items() if column is not None})


def test_files_of_a_hub(run: Run, tmp_path: Path) -> None:
    """Two files of each split, row groups smaller and larger than a batch, names from the metadata."""
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    (data.parent / "README.md").write_text("card")
    train, val = items(150), items(9, first=150)
    for number, part in enumerate((train[:70], train[70:])):
        metadata = table(part).replace_schema_metadata(HF)
        pq.write_table(metadata, data / f"train-{number:05d}-of-00002.parquet", row_group_size=[100, 7][number])
    pq.write_table(table(val).replace_schema_metadata(HF), data / "validation-00000-of-00001.parquet")
    outcome = run(data.parent, tmp_path / "d", "--workers", 2, "--shard-size", 0.05)
    assert outcome.code == 0, outcome.err
    first = outcome.out.splitlines()[0]
    assert "is 3 Parquet files (image column 'image', label column 'label'): train 150 images, val 9 images" in first
    assert contents(tmp_path / "d" / "train") == {(item.data, item.label) for item in train}
    assert contents(tmp_path / "d" / "val") == {(item.data, item.label) for item in val}
    assert open_source(tmp_path / "d" / "val").classes == CLASSES
    assert run(data.parent, tmp_path / "e", "--workers", 3, "--shard-size", 0.05).code == 0
    assert digests(tmp_path / "d") == digests(tmp_path / "e")
    assert run(data.parent, tmp_path / "one", "--split", "val").code == 0
    assert contents(tmp_path / "one") == {(item.data, item.label) for item in val}
    beton = run(data.parent, tmp_path / "beton", "--split", "train", "--format", "beton")
    assert beton.code == 0
    assert len(open_source(tmp_path / "beton")) == 150


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_a_binary_column_and_names_as_texts(run: Run, tmp_path: Path, compression: str) -> None:
    made = pa.table(
        {
            "jpg": pa.array([item.data for item in items()], pa.large_binary()),
            "sha": pa.array([bytes(32) for _ in items()]),
            "caption": pa.array([item.name for item in items()]),
            "Class": pa.array([item.label for item in items()]).dictionary_encode(),
        }
    )
    pq.write_table(made, tmp_path / "photos", compression=compression)  # no ending
    assert run(tmp_path / "photos", tmp_path / "d").code == 0
    assert contents(tmp_path / "d") == EXPECTED
    assert run(tmp_path / "photos", tmp_path / "n", "--label", "none").code == 0
    assert open_source(tmp_path / "n").classes == ()
    assert run(tmp_path / "photos", tmp_path / "c", "--label", "caption").code == 0
    assert len(open_source(tmp_path / "c").classes) == len(items())


def test_rows_without_image_or_label(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images: list[dict[str, Any]] = [{"bytes": item.data, "path": None} for item in items()]
    images[4] = {"bytes": None, "path": "gone.jpg"}
    labels: list[int | None] = [CLASSES.index(item.label) for item in items()]
    labels[2] = None
    pq.write_table(table(items(), image=pa.array(images), label=pa.array(labels)), tmp_path / "a.parquet")
    outcome = run(tmp_path / "a.parquet", tmp_path / "d")
    assert outcome.code == 0
    assert "1 of 9 images have no label" in caplog.text
    assert "names does not exist" in (tmp_path / "d" / "quarantine.jsonl").read_text()
    expected = {(i.data, str(CLASSES.index(i.label)) if n != 2 else "") for n, i in enumerate(items()) if n != 4}
    assert contents(tmp_path / "d") == expected


def bad(name: str, tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "src"
    path.mkdir()
    part, one = path / "a.parquet", table(items())
    if name == "no images":
        pq.write_table(table(items(), image=pa.array([i.name for i in items()])), part)
        return path, "has no column of images"
    if name == "bytes that are no images":
        pq.write_table(table(items(), image=pa.array([b"text" for _ in items()])), part)
        return path, "has no column of images"
    if name == "nested":
        pq.write_table(table(items(), image=pa.array([[[1, 2], [3, 4]] for _ in items()])), part)
        return path, r"image: list<.*\(nested: images must be bytes of their own\)"
    if name == "list of images":
        pq.write_table(table(items(), image=pa.array([[{"bytes": i.data}] for i in items()])), part)
        return path, r"image: list<.*\(nested"
    if name == "several":
        data = pa.array([i.data for i in items()])
        pq.write_table(table(items(), image=None, left=data, right=data), part)
        return path, "several columns of images .*--image"
    if name == "mixed":
        pq.write_table(one, part)
        pq.write_table(table(items(), label=pa.array([i.label for i in items()])), path / "b.parquet")
        return path, "b.parquet has another schema .*'label'"
    if name == "truncated":
        pq.write_table(one, part)
        part.write_bytes(part.read_bytes()[:-100])
        return path, "is truncated or damaged"
    if name == "no Parquet":
        pq.write_table(one, part)
        (path / "b.parquet").write_bytes(b"<html>")
        return path, "does not begin as a Parquet file"
    if name == "label too large":
        pq.write_table(table(items(), label=pa.array([7] * 9)).replace_schema_metadata(HF), part)
        return path, "has the label 7 .* must be 0 to 2"
    if name == "label negative":
        pq.write_table(table(items(), label=pa.array([-3] * 9)), part)
        return path, "has the label -3"
    if name == "empty":
        pq.write_table(one.slice(0, 0), part)
        return path, "holds no images: image has no rows, or only empty ones"
    assert name == "splits and none"
    pq.write_table(one, path / "train-0.parquet")
    pq.write_table(one, path / "more.parquet")
    return path, "files of a split .* others that name none"


@pytest.mark.parametrize(
    "name",
    [
        "no images",
        "bytes that are no images",
        "nested",
        "list of images",
        "several",
        "mixed",
        "truncated",
        "no Parquet",
        "label too large",
        "label negative",
        "empty",
        "splits and none",
    ],
)
def test_what_cannot_be_read_is_said(run: Run, tmp_path: Path, name: str) -> None:
    path, message = bad(name, tmp_path)
    assert_refused(run, path, tmp_path / "d", message)


def test_files_without_rows_beside_others(run: Run, tmp_path: Path) -> None:
    one = table(items())
    (tmp_path / "src").mkdir()
    for number, part in enumerate((one.slice(0, 0), one, one.slice(0, 0))):
        pq.write_table(part, tmp_path / "src" / f"part-{number}.parquet")
    assert run(tmp_path / "src", tmp_path / "d").code == 0
    pq.write_table(one, tmp_path / "whole.parquet")
    assert run(tmp_path / "whole.parquet", tmp_path / "e").code == 0
    assert contents(tmp_path / "d") == contents(tmp_path / "e")


def test_options_that_name_no_column(run: Run, tmp_path: Path) -> None:
    pq.write_table(table(items()), tmp_path / "a.parquet")
    for option, value in (("--image", "pixels"), ("--label", "species"), ("--split", "train")):
        outcome = run(tmp_path / "a.parquet", tmp_path / "d", option, value)
        assert outcome.code == 1
        assert f"{option} is '{value}' but must be" in outcome.err
    as_folder(tmp_path / "f", items())
    assert "--label is 'x' but must be left out" in run(tmp_path / "f", tmp_path / "d", "--label", "x").err


def test_without_pyarrow(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(table(items()), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    outcome = run(tmp_path / "a.parquet", tmp_path / "d")
    assert "Reading Parquet needs the package pyarrow" in outcome.err
    assert "pip install 'mvssl[formats]'" in outcome.err


def test_data_sets_saved_by_datasets(run: Run, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})

    def made(images: list[Item]) -> datasets.Dataset:
        rows = {
            "image": [{"bytes": item.data, "path": None} for item in images],
            "label": [item.label for item in images],
        }
        return datasets.Dataset.from_dict(rows, features=features)

    made(items()).save_to_disk(tmp_path / "one", num_shards=2)
    outcome = run(tmp_path / "one", tmp_path / "d")
    assert outcome.code == 0, outcome.err
    assert "a data set that `datasets` saved" in outcome.out
    assert contents(tmp_path / "d") == EXPECTED
    both = datasets.DatasetDict({"train": made(items()), "test": made(items(3, first=9))})
    both.save_to_disk(tmp_path / "both")
    outcome = run(tmp_path / "both", tmp_path / "e")
    assert "test split is converted as val" in outcome.out
    assert contents(tmp_path / "e" / "train") == EXPECTED
    assert contents(tmp_path / "e" / "val") == {(i.data, i.label) for i in items(3, first=9)}
    arrow = next((tmp_path / "one").glob("*.arrow"))
    assert run(arrow, tmp_path / "f").code == 0  # one file of the hub's cache
    arrow.write_bytes(arrow.read_bytes()[:2000])
    assert "truncated or damaged" in run(tmp_path / "one", tmp_path / "g").err
    arrow.unlink()
    assert "which is missing" in run(tmp_path / "one", tmp_path / "g").err
    assert not (tmp_path / "g").exists()


def test_files_of_arrow(run: Run, tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "a.feather"), "wb") as sink, pa.ipc.new_file(sink, table(items()).schema) as writer:
        writer.write_table(table(items()), max_chunksize=4)
    assert run(tmp_path / "a.feather", tmp_path / "d", "--label", "none").code == 0
    assert {data for data, _ in contents(tmp_path / "d")} == {item.data for item in items()}


def test_offsets_that_lie(run: Run, tmp_path: Path) -> None:
    """Arrow itself would end the process when it reads such a value."""
    path = tmp_path / "a.arrow"
    made = pa.table({"image": pa.array([item.data for item in items()])})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_table(made)
    data = path.read_bytes()
    (length,) = {len(items()[0].data)}
    at = data.index(b"\0\0\0\0" + length.to_bytes(4, "little"))  # the first two offsets
    path.write_bytes(data[: at + 4] + (1 << 30).to_bytes(4, "little") + data[at + 8 :])
    assert "a.arrow is truncated or damaged" in run(path, tmp_path / "d").err


def test_paths_in_place_of_bytes(run: Run, tmp_path: Path) -> None:
    folder = as_folder(tmp_path / "f", items())
    images = [{"bytes": None, "path": str(folder / i.label / i.name)} for i in items()]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(table(items(), image=pa.array(images, kind)), tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", tmp_path / "d", "--label", "none").code == 0
    assert {data for data, _ in contents(tmp_path / "d")} == {item.data for item in items()}


def test_deep_images_are_measured_in_parquet(run: Run, tmp_path: Path) -> None:
    import io

    import numpy as np

    deep = io.BytesIO()
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(deep, "PNG")
    data = pa.array([encoded(1), deep.getvalue()])
    pq.write_table(pa.table({"img": data}), tmp_path / "a.parquet")
    assert "deep values 0..1023 (measured)" in run(tmp_path / "a.parquet", tmp_path / "d").out

"""A run on webdataset's tars resumes on their conversion, and one on Parquet on the tars, as if nothing had changed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from mvssl.config.recipe import Recipe
from pipelines.conversion.command import main
from tests.samples.tiny_runs import crash_at, metrics, train


@pytest.fixture(scope="module")
def forms(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`images` as tars, as Parquet, and as shards converted from the tars."""
    root = tmp_path_factory.mktemp("direct")
    (root / "tars").mkdir()
    (root / "parquet").mkdir()
    for split in ("train", "val"):
        files = sorted((images / split).rglob("*.jpg"))
        classes = sorted({file.parent.name for file in files})
        rows = [(f"{file.parent.name}_{file.stem}", file.read_bytes(), file.parent.name) for file in files]
        with webdataset.ShardWriter(str(root / "tars" / f"{split}-%04d.tar"), maxcount=10, verbose=0) as writer:
            for key, data, name in rows:
                sample = {"label": classes.index(name), "class_name": name}
                writer.write({"__key__": key, "jpg": data, "json": json.dumps(sample).encode()})
        made = pa.table(
            {
                "image": [{"bytes": data, "path": f"{key}.jpg"} for key, data, _ in rows],
                "label": [name for *_, name in rows],
            }
        )
        pq.write_table(made, root / "parquet" / f"{split}-00000-of-00001.parquet", row_group_size=7)
    with pytest.raises(SystemExit) as leaving:
        main([str(root / "tars"), str(root / "shards"), "--shard-size", "0.01"])
    assert leaving.value.code == 0
    return {name: root / name for name in ("tars", "parquet", "shards")}


@pytest.mark.parametrize(("first", "then"), [("tars", "shards"), ("parquet", "tars"), ("shards", "parquet")])
def test_resumed_on_another_form(
    first: str, then: str, forms: dict[str, Path], finished: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    with crash_at(6):
        train(tiny_recipe, forms[first], tmp_path / "run")
    train(tiny_recipe, forms[then], tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == metrics(finished)

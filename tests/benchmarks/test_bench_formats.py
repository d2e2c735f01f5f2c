"""bench_formats: every form converts to the images of the folder, and the result has a row for each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_formats
from benchmarks.bench_formats import FORMS, PIXELS, Arguments, draw, measure, summary
from pipelines.conversion.command import Convert, convert
from pipelines.runtime import InputError
from tests.samples.form_samples import contents, pixels


def test_every_form_holds_the_images_of_the_folder(tmp_path: Path) -> None:
    images = draw(12, 32)
    found = {}
    for number, (name, write) in enumerate(FORMS.items()):
        base = tmp_path / str(number)
        base.mkdir()
        convert(
            Convert(src=write(base / "images", images), dst=base / "d", label="none" if "folder" not in name else None)
        )
        found[name] = {data for data, _ in (pixels if name in PIXELS else contents)(base / "d")}
    assert len(found["folder"]) == len(found["small folder"]) == 12
    for name in FORMS:
        assert found[name] == found["small folder" if name in PIXELS else "folder"], name


def test_a_row_for_each_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_formats, "convert", lambda source, workers: {"seconds": 2.0, "cpu_seconds": 1.0, "peak_mib": 9.0}
    )
    out = tmp_path / "out.json"
    result = measure(Arguments(images=4, side=32, repeats=2, forms=("folder", "zip"), out=out), command="x")
    assert json.loads(out.read_text())["forms"] == result["forms"]
    assert result["forms"]["zip"] == {
        "images_per_second": 2.0,
        "least": 2.0,
        "most": 2.0,
        "times_folder": 1.0,
        "cpu_ms": 250.0,
        "peak_mib": 9.0,
    }
    assert summary({"zip": [{"seconds": 1.0, "cpu_seconds": 1.0, "peak_mib": 1.0}]}, 5)["zip"]["times_folder"] is None
    with pytest.raises(InputError, match="forms has 'rar' but must be of folder"):
        Arguments(forms=("rar",))

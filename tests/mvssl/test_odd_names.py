"""Files and folders whose names are not UTF-8: everything that is written about them can be read again."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mvssl.cli import features
from mvssl.config.options import RunOptions
from mvssl.monitor.loggers import MetricLoggers
from mvssl.runs.folder import RunFolder
from mvssl.runs.run_log import run_log
from pipelines.conversion.command import Convert, convert
from pipelines.files import write_whole
from pipelines.names import visible
from pipelines.storage import open_source

CAFE, UMLAUT = os.fsdecode(b"caf\xe9.jpg"), os.fsdecode(b"\xe4")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder and a class whose names are not UTF-8, with one good image and one damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / os.fsdecode(b"data\xff")
    (folder / UMLAUT).mkdir(parents=True)
    Image.new("RGB", (48, 48), (90, 30, 60)).save(folder / UMLAUT / CAFE)
    (folder / UMLAUT / os.fsdecode(b"bad\xe9.jpg")).write_bytes((folder / UMLAUT / CAFE).read_bytes()[:300])
    return folder


def test_keys_and_classes_are_visible_and_files_are_read(data: Path) -> None:
    source = open_source(data)
    assert [source.key(0), source.key(1)] == [r"\xe4/bad\xe9.jpg", r"\xe4/caf\xe9.jpg"]
    assert source.classes == (r"\xe4",)
    assert source.read(1).tobytes() == (data / UMLAUT / CAFE).read_bytes()


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_features_of_such_files(data: Path, tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / os.fsdecode(b"f\xe9." + ending.encode())
    arguments = ["--untrained", "--arch", "resnet10t", "--resize", "32", "--crop", "32", "--device", "cpu"]
    assert features.body([str(data), str(out), *arguments]) == 0
    if ending == "npy":
        rows = list(csv.reader(out.with_suffix(".csv").read_text(encoding="utf-8").splitlines()))
        assert rows[1:] == [["0", r"\xe4/caf\xe9.jpg", "0", r"\xe4"]]
        assert np.load(out).shape == (1, 512)
    else:
        from pyarrow import parquet

        table = parquet.read_table(io.BytesIO(out.read_bytes()))
        assert table["key"].to_pylist() == [r"\xe4/caf\xe9.jpg"]
        assert table["class"].to_pylist() == [r"\xe4"]


@pytest.mark.parametrize("form", ["shards", "beton"])
def test_conversion_of_such_files(data: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / os.fsdecode(b"out\xe9")
    convert(Convert(src=data, dst=out, format=form))  # type: ignore[arg-type]
    source = open_source(out)
    assert (source.key(0), source.classes) == (r"\xe4/caf\xe9", (r"\xe4",))
    (bad,) = map(json.loads, (out / "quarantine.jsonl").read_text(encoding="utf-8").splitlines())
    assert bad["key"] == r"\xe4/bad\xe9.jpg"


def test_warnings_about_them_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strict = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    with run_log(Console(file=strict, width=200)) as open_log:
        open_log(tmp_path / "train.log")
        logging.getLogger("mvssl.data").warning("image %s is bad", CAFE)
    strict.flush()
    assert strict.buffer.getvalue() == b"warning: image caf\\xe9.jpg is bad\n"
    assert "WARNING image caf\\xe9.jpg is bad" in (tmp_path / "train.log").read_text(encoding="utf-8")
    assert "Logging error" not in capsys.readouterr().err


def test_pages_about_them_are_written(tmp_path: Path) -> None:
    write_whole(tmp_path / "page.html", f"<p>{CAFE} é</p>")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == r"<p>caf\xe9.jpg é</p>"


def test_what_tensorboard_cannot_write_to_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path / UMLAUT)
    loggers = MetricLoggers(folder, RunOptions(log=("tensorboard", "csv")), first_step=0)
    loggers.write(1, {"train/loss": 1.0})
    loggers.close()
    assert (folder.csv / "train.csv").exists()
    assert "tensorboard is left out" in caplog.text


@pytest.mark.parametrize("name", [b"caf\xe9.jpg", "größe.jpg".encode()])
@pytest.mark.parametrize("of", ["folder", "list"])
def test_where_the_system_is_not_utf8(tmp_path: Path, name: bytes, of: str) -> None:
    """Without Python's UTF-8 mode in the C locale, names are ASCII with surrogates; also from a cached index."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / os.fsdecode(name)).write_bytes(b"content")
    (tmp_path / "d" / "list.txt").write_bytes(name + b"\n")
    for path in [tmp_path / "d", *(tmp_path / "d").iterdir()]:
        os.utime(path, (1e9, 1e9))
    code = (
        "import sys; from pipelines.storage import open_source; s = open_source(sys.argv[1]);"
        "print(sys.getfilesystemencoding(), ascii(s.key(0)), s.read(0).tobytes(), s.read_batch([0])[0].tobytes())"
    )
    path = tmp_path / "d" if of == "folder" else tmp_path / "d" / "list.txt"
    setting = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "XDG_CACHE_HOME": str(tmp_path / "c")}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, path], capture_output=True, text=True, env=os.environ | setting, check=False
        )
        expected = ascii(visible(os.fsdecode(name)))
        assert done.stdout == f"ascii {expected} b'content' b'content'\n", done.stderr

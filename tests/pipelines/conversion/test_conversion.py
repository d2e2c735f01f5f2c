"""mvssl-convert from folders, lists and shards: the same bytes, also after kills, full disks and lost sources."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.storage import open_source
from pipelines.storage.folder import FolderSource
from pipelines.storage.shards import ShardSource
from tests.samples.convert_runs import COUNT, Run, digests
from tests.samples.data_faults import limited_files


def test_same_bytes_for_any_number_of_workers(run: Run, folder: Path, tmp_path: Path) -> None:
    for workers in (1, 5):
        outcome = run(folder, tmp_path / f"w{workers}", "--workers", workers, "--shard-size", 0.2)
        assert outcome.code == 0
        assert "40 images" in outcome.out
        assert "0 quarantined" in outcome.out
    one = digests(tmp_path / "w1")
    assert one == digests(tmp_path / "w5")
    assert sum(name.endswith(".tar") for name in one) >= 5
    assert set(one) - {name for name in one if name.endswith(".tar")} == {
        "checksums.npy",
        "index.npy",
        "keys.npy",
        "manifest.json",
        "quarantine.jsonl",
        "warnings.jsonl",
    }
    manifest = json.loads((tmp_path / "w1" / "manifest.json").read_text())
    assert manifest["count"] == COUNT
    assert manifest["classes"] == ["a", "b"]
    assert manifest["class_counts"] == [20, 20]
    assert manifest["image_bytes"] == sum(path.stat().st_size for path in folder.rglob("*.jpg"))
    assert manifest["versions"]["numpy"] == np.__version__
    for shard in manifest["shards"]:
        assert one[shard["name"]] == shard["sha256"]
        assert shard["bytes"] <= 0.2e6 + 20 * 2048 + 10240


def test_kill_and_resume(run: Run, folder: Path, tmp_path: Path) -> None:
    """After a SIGKILL the same command gives the bytes of an uninterrupted run."""
    dst = tmp_path / "killed"
    command = [folder, dst, "--shard-size", "0.1", "--workers", "1"]
    # The first image after the first finished shard blocks, so the kill always comes in the middle.
    slow = (
        "import sys, time, pathlib\nfrom pipelines.storage.folder import FolderSource\n"
        "from pipelines.conversion.command import main\n"
        "read = FolderSource.read\n"
        "def waiting(self, index):\n"
        "    if list(pathlib.Path(sys.argv[2]).glob('.convert/part-*.npz')): time.sleep(600)\n"
        "    return read(self, index)\n"
        "FolderSource.read = waiting\nmain()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *map(str, command)], stderr=subprocess.DEVNULL)
    try:
        parts = dst / ".convert"
        deadline = time.monotonic() + 60
        while not list(parts.glob("part-*.npz")) or not list(dst.glob("*.tar.tmp")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = sorted(dst.glob("*.tar"))
    assert finished
    assert not (dst / "manifest.json").exists()
    with pytest.raises(ValueError, match="not finished"):
        open_source(dst)
    before = [path.stat().st_mtime_ns for path in finished]
    outcome = run(*command)
    assert outcome.code == 0
    assert [path.stat().st_mtime_ns for path in finished] == before  # not written again
    assert f"{COUNT} images (" in outcome.out
    converted_now = int(outcome.out.split("; ")[1].split(" images")[0])
    assert 0 < converted_now < COUNT
    run(folder, tmp_path / "whole", "--shard-size", "0.1")
    assert digests(dst) == digests(tmp_path / "whole")


def test_full_disk_keeps_finished_shards(run: Run, folder: Path, tmp_path: Path) -> None:
    src = Path(shutil.copytree(folder, tmp_path / "src"))
    pixels = np.random.default_rng(1).integers(0, 256, (500, 700, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(src / "b" / "large.jpg", quality=95)  # larger than any shard before it
    dst = tmp_path / "d"
    with limited_files(200_000):
        outcome = run(src, dst, "--shard-size", 0.1)
    assert outcome.code == 1
    assert outcome.err.startswith("error: File too large (")
    assert outcome.err.count("\n") == 1
    assert "shard-" in outcome.err
    kept = sorted(dst.glob("*.tar"))
    assert len(kept) >= 5
    assert not list(dst.glob("*.tmp"))  # their space is freed
    kept[2].write_bytes(kept[2].read_bytes()[:-512])  # detected on resume, and converted again
    outcome = run(src, dst, "--shard-size", 0.1)
    assert outcome.code == 0
    assert run(src, tmp_path / "whole", "--shard-size", 0.1).code == 0
    assert digests(dst) == digests(tmp_path / "whole")


def test_source_that_goes_away(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unmounted disk stops the conversion instead of quarantining the rest of the data."""
    src = Path(shutil.copytree(folder, tmp_path / "src"))
    read = FolderSource.read

    def unmounting(source: FolderSource, index: int) -> np.ndarray:
        if index == COUNT // 2 and src.exists():
            src.rename(tmp_path / "away")
        return read(source, index)

    monkeypatch.setattr(FolderSource, "read", unmounting)
    outcome = run(src, tmp_path / "d", "--shard-size", 0.1, "--workers", 1)
    assert outcome.code == 1
    assert outcome.err.startswith("error: No such file or directory (")
    assert not (tmp_path / "d" / "manifest.json").exists()
    monkeypatch.setattr(FolderSource, "read", read)
    (tmp_path / "away").rename(src)
    assert run(src, tmp_path / "d", "--shard-size", 0.1).code == 0
    assert len(open_source(tmp_path / "d")) == COUNT


def test_train_and_val(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Val lacks the class "b" but is numbered as train."""
    for name in ("train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "val/c/1.jpg", "val/a/2.jpg"):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    outcome = run(tmp_path / "src", tmp_path / "d")
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 3
    train, val = open_source(tmp_path / "d" / "train"), open_source(tmp_path / "d" / "val")
    assert train.classes == val.classes == ("a", "b", "c")
    assert train.labels.tolist() == [0, 1, 2]
    assert val.labels.tolist() == [0, 2]
    path = tmp_path / "src" / "val" / "new" / "1.jpg"
    path.parent.mkdir()
    Image.new("RGB", (9, 9)).save(path)
    outcome = run(tmp_path / "src", tmp_path / "other")
    assert outcome.code == 0
    assert "val has classes that train lacks (new)" in caplog.text
    val = open_source(tmp_path / "other" / "val")
    assert val.classes == ("a", "b", "c", "new")  # behind the others, which keep their numbers
    assert val.labels.tolist() == [0, 2, 3]


def test_list_and_shards_as_source(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{folder}/b/01.jpg dog\n{folder}/a/00.jpg cat\n{folder}/b/01.jpg dog\n")
    assert run(tmp_path / "list.txt", tmp_path / "d").code == 0
    source = open_source(tmp_path / "d")
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [1, 0, 1]
    assert source.key(0).endswith("b/01")
    assert source.key(2) == source.key(0) + "_1"
    assert source.read(2).tobytes() == (folder / "b" / "01.jpg").read_bytes()
    assert run(tmp_path / "d", tmp_path / "smaller", "--max-size", 50).code == 0
    small = open_source(tmp_path / "smaller")
    assert isinstance(small, ShardSource)
    assert np.max(small.sizes) == 50
    assert small.labels.tolist() == [1, 0, 1]


def test_plain_progress_lines(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0, 10)
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: float(next(ticks)))
    outcome = run(folder, tmp_path / "d", "--workers", 1)
    lines = outcome.err.splitlines()
    assert any(line.startswith("converting: 20 of 40, ") for line in lines)
    assert all(line.endswith(" left") for line in lines[:-1] if line.startswith("converting"))

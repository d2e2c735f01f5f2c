"""mvssl-convert from folders and lists: the command, what it keeps, what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.storage import open_source
from pipelines.storage.shards import ShardSource
from tools.conversion import shards as shards_module
from tools.conversion.destination import Destination
from tools.convert import main

COUNT = 40
Outcome = namedtuple("Outcome", ["code", "out", "err"])
Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return Outcome(leaving.value.code, output.out, output.err)

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = root / "ab"[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (160, 200 + number, 3), dtype=np.uint8)).save(path, quality=90)
    return root


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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
    """SIGKILL in the middle; the same command then gives what an uninterrupted run gives."""
    dst = tmp_path / "killed"
    command = [folder, dst, "--shard-size", "0.1", "--workers", "1"]
    # The first image read after the first finished shard waits for ever, so the kill always comes in the middle.
    slow = (
        "import sys, time, pathlib\nfrom pipelines.storage.folder import FolderSource\nfrom tools.convert import main\n"
        "read = FolderSource.read\n"
        "def waiting(self, index):\n"
        "    if list(pathlib.Path(sys.argv[2]).glob('.convert/part-*.npz')): time.sleep(600)\n"
        "    return read(self, index)\n"
        "FolderSource.read = waiting\nmain()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow, *map(str, command)], stderr=subprocess.DEVNULL)
    parts = dst / ".convert"
    deadline = time.monotonic() + 60
    while not list(parts.glob("part-*.npz")) or not list(dst.glob("*.tar.tmp")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
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
    assert [path.stat().st_mtime_ns for path in finished] == before  # kept, not written again
    assert f"{COUNT} images (" in outcome.out
    converted_now = int(outcome.out.split("; ")[1].split(" images")[0])
    assert 0 < converted_now < COUNT
    run(folder, tmp_path / "whole", "--shard-size", "0.1")
    assert digests(dst) == digests(tmp_path / "whole")


@contextmanager
def limited_files(limit: int) -> Iterator[None]:
    """Files cannot grow above `limit` bytes: a write fails in its middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_what_is_finished(run: Run, folder: Path, tmp_path: Path) -> None:
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
    assert not list(dst.glob("*.tmp"))  # its space is given back
    kept[2].write_bytes(kept[2].read_bytes()[:-512])  # seen on resume, and converted again
    outcome = run(src, dst, "--shard-size", 0.1)
    assert outcome.code == 0
    assert run(src, tmp_path / "whole", "--shard-size", 0.1).code == 0
    assert digests(dst) == digests(tmp_path / "whole")


def test_disk_that_is_too_small_is_refused_at_once(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda _: usage)
    outcome = run(folder, tmp_path / "d")
    assert outcome.code == 1
    assert "0.0 GB free but the conversion needs" in outcome.err
    assert not list((tmp_path / "d").glob("*.tar*"))


@pytest.mark.parametrize("place", ["file", "file/below", "file/below/deeper"])
def test_unwritable_destination(run: Run, folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    outcome = run(folder, tmp_path / place)
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert str(tmp_path / "file") in outcome.err
    assert "Traceback" not in outcome.err


def test_destination_of_another_conversion(run: Run, folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "d"
    assert run(folder, dst, "--shard-size", 0.2).code == 0
    before = digests(dst)
    again = run(folder, dst, "--shard-size", 0.2)
    assert again.code == 0
    assert "already" in again.out
    for arguments in ((folder, dst, "--shard-size", 0.3), (folder / "a", dst, "--shard-size", 0.2)):
        other = run(*arguments)
        assert other.code == 1
        assert "of another source or with other options" in other.err
        assert digests(dst) == before
    (dst / "notes.txt").write_text("mine")
    assert run(folder / "a", dst, "--shard-size", 0.2, "--overwrite").code == 0
    assert len(open_source(dst)) == COUNT // 2
    assert (dst / "notes.txt").read_text() == "mine"
    (dst / "notes.txt").unlink()
    assert run(folder / "a", tmp_path / "fresh", "--shard-size", 0.2).code == 0
    assert digests(dst) == digests(tmp_path / "fresh")


def test_damaged_result_is_not_called_finished(run: Run, folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "d"
    assert run(folder, dst).code == 0
    os.truncate(dst / "shard-000000.tar", 1000)
    outcome = run(folder, dst)
    assert outcome.code == 1
    assert "shard-000000.tar has 1000 bytes" in outcome.err
    assert run(folder, dst, "--overwrite").code == 0
    assert len(open_source(dst)) == COUNT


def test_unfinished_conversion_of_another_source(run: Run, folder: Path, tmp_path: Path) -> None:
    dst = tmp_path / "d"
    first = Destination(dst)
    first.prepare({"source": "other"}, overwrite=False)
    first.release()
    outcome = run(folder, dst)
    assert outcome.code == 1
    assert "holds an unfinished conversion of another source" in outcome.err


def test_folder_with_other_files_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("mine")
    for more in ([], ["--overwrite"]):
        outcome = run(folder, tmp_path / "d", *more)
        assert outcome.code == 1
        assert "holds other files" in outcome.err


def test_two_conversions_at_once(run: Run, folder: Path, tmp_path: Path) -> None:
    first = Destination(tmp_path / "d")
    first.prepare({"any": 1}, overwrite=False)
    outcome = run(folder, tmp_path / "d", "--overwrite")
    assert outcome.code == 1
    assert "another mvssl-convert is writing" in outcome.err
    first.release()
    assert run(folder, tmp_path / "d", "--overwrite").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{src}", "{src}/shards"], "lies in SRC"),
        (["{src}", "{src}"], "lies in SRC"),
        (["{tmp}/nowhere", "{tmp}/d"], "does not exist"),
        (["{tmp}/empty", "{tmp}/d"], "holds no images"),
        (["{src}", "{tmp}/d", "--max-size", "0"], "--max-size is 0 but must be 1 or more"),
        (["{src}", "{tmp}/d", "--shard-size", "-1"], "--shard-size is -1.0 but must be above 0"),
        (["{src}", "{tmp}/d", "--shard-size", "nan"], "--shard-size is nan but must be above 0"),
        (["{src}", "{tmp}/d", "--workers", "0"], "--workers is 0"),
        (["{src}", "{tmp}/d", "--val-labels", "{tmp}/x"], "--val-labels is for ImageNet's val archive"),
        (["{src}", "{tmp}/d", "--classes", "{tmp}/x"], "--classes {tmp}/x does not exist"),
    ],
)
def test_wrong_arguments(run: Run, folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    names = {"src": folder, "tmp": tmp_path}
    outcome = run(*(argument.format(**names) for argument in arguments))
    assert outcome.code == 1
    assert outcome.err.startswith("error: ")
    assert message.format(**names) in outcome.err
    assert not (tmp_path / "d").exists()


def test_usage_errors_exit_with_2(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run(folder).code == 2
    assert run(folder, tmp_path / "d", "--shard-size", "big").code == 2
    assert run("--help").code == 0


def test_train_and_val(run: Run, tmp_path: Path) -> None:
    """Val has no class "b": its labels are still those of train."""
    for name in ("train/a/1.jpg", "train/b/2.jpg", "train/c/3.jpg", "val/c/1.jpg", "val/a/2.jpg"):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    outcome = run(tmp_path / "src", tmp_path / "d")
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 2
    train, val = open_source(tmp_path / "d" / "train"), open_source(tmp_path / "d" / "val")
    assert train.classes == val.classes == ("a", "b", "c")
    assert train.labels.tolist() == [0, 1, 2]
    assert val.labels.tolist() == [0, 2]
    path = tmp_path / "src" / "val" / "new" / "1.jpg"
    path.parent.mkdir()
    Image.new("RGB", (9, 9)).save(path)
    outcome = run(tmp_path / "src", tmp_path / "other")
    assert outcome.code == 1
    assert "the class 'new'" in outcome.err
    assert not (tmp_path / "other").exists()


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
    assert small.sizes.max() == 50
    assert small.labels.tolist() == [1, 0, 1]


def test_plain_progress_lines(run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.conversion.progress._LINE_EVERY", 0.0)
    outcome = run(folder, tmp_path / "d", "--workers", 1)
    lines = outcome.err.splitlines()
    assert any(line.startswith("converting: 20 of 40 images, ") for line in lines)
    assert all(line.endswith(" s left") for line in lines if line.startswith("converting"))

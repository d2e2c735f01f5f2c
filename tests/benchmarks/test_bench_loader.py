"""The benchmark of loaders runs end to end and tells what it promises."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import bench_loader
from benchmarks.bench_loader import Arguments, setups
from benchmarks.loader_contenders import batches_of_turn, indices_of
from benchmarks.page_cache import cached_share, drop, files_of
from pipelines.errors import InputError
from pipelines.order import Order
from pipelines.storage import open_source

COUNT = 12
SMALL = {"batch_size": 4, "num_batches": 3, "repeats": 2, "size": 32, "local_size": 16, "blur_kernel": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen noisy pictures of 64 pixels."""
    root = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(0)
    for n in range(COUNT):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / f"{n:02d}.jpg")
    return root


def test_the_command_writes_what_it_promises(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "loader.json"
    words = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [str(folder), "--decoders", "pillow", "--workers", "2", *words, "--cold", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_loader", *command])
    assert bench_loader.body() == 0
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert (result["benchmark"], result["device"], result["cold"]) == ("loader", "cpu", True)
    assert (result["views_per_image"], result["sizes"]) == (5, [32, 32, 16, 16, 32])
    assert set(result["contenders"]) == {"folder + pillow", "DataLoader"}
    for row in result["contenders"].values():
        assert row["views_per_second"] == pytest.approx(5 * row["images_per_second"])
        assert row["spread"]["min"] <= row["images_per_second"] <= row["spread"]["max"]
        assert row["spread"]["n"] == 2
        assert 0 <= row["cached_share_before_turns"] <= 1
    ours, theirs = result["contenders"]["folder + pillow"], result["contenders"]["DataLoader"]
    assert set(ours["stage_seconds"]) == {"storage", "decode", "views"}
    assert all(seconds > 0 for seconds in ours["stage_seconds"].values())
    assert (ours["stage_images"], ours["bad"], theirs["workers"]) == (24, 0, 2)
    if sys.platform == "linux":
        assert (ours["peak_memory_mib"]["processes"], theirs["peak_memory_mib"]["processes"]) == (1, 3)
        for row in (ours, theirs):
            assert 50 < row["peak_memory_mib"]["pss"] <= row["peak_memory_mib"]["rss"]
    assert set(result["times_dataloader"]) == {"folder + pillow"}
    assert (result["left_out"], result["failed"]) == ({}, {})
    assert {"packages", "cores", "gpus"} <= set(result["environment"])
    assert result["environment"]["command"].startswith(f"python -m benchmarks.bench_loader {folder.name} --device cpu")
    assert str(folder) not in out.read_text()


def test_a_turn_is_exact_and_ends_with_an_epoch() -> None:
    order = Order(num_images=13, batch_size=4, seed=0)  # three steps an epoch
    assert batches_of_turn(order, num_batches=2, first_epoch=5) == [(5, 1)]
    assert batches_of_turn(order, num_batches=3, first_epoch=5) == [(5, 0)]
    assert batches_of_turn(order, num_batches=7, first_epoch=5) == [(5, 2), (6, 0), (7, 0)]
    indices = indices_of(order, [(5, 2), (6, 0)])
    assert indices == [order.batch(5, 2).tolist(), order.batch(6, 0).tolist()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "data is missing"),
        ({"decoders": ()}, "decoders is empty"),
        ({"workers": 0}, "workers is 0"),
        ({"repeats": 0}, "repeats is 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(Arguments(data=(folder,)), **changes)


def test_data_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="'folder' twice"):
        setups(Arguments(data=(folder, folder)))
    with pytest.raises(InputError, match="at most 3"):
        setups(Arguments(data=(folder,), batch_size=4, num_batches=4, cold=True))
    with pytest.raises(InputError, match="lower batch_size"):
        setups(Arguments(data=(folder,), batch_size=13))


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache is told and dropped on Linux")
def test_dropped_files_leave_the_cache(folder: Path) -> None:
    files = files_of(open_source(folder))
    assert len(files) == COUNT
    for file in files:
        file.read_bytes()
    assert cached_share(files) == 1.0
    drop(files)
    assert cached_share(files) in (0.0, 1.0)  # 1 on a file system in memory

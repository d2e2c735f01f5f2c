"""bench_lock measures this loader and another version's beside a thread that runs Python."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import bench_lock
from benchmarks.bench_lock import ROOT, Arguments, measure
from pipelines.errors import InputError

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="the loop and the loader need a core each"
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for n in range(16):
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{n}.jpg")
    return folder


@needs_two_cores
def test_both_versions_take_turns(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, out = tmp_path / "other", tmp_path / "out.json"
    other.mkdir()
    (other / "pipelines").symlink_to(ROOT / "pipelines")
    words = [str(photos), "--other", str(other), "--batch-size", "4", "--size", "32", "--local-size", "16"]
    more = ["--batches", "3", "--repeats", "1", "--seconds", "60", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_lock", *words, *more])
    assert bench_lock.body() == 0
    result = json.loads(out.read_text())
    assert result["contenders"].keys() == {"this", "other"}
    for own in result["contenders"].values():
        assert own["images_per_second"] > 0
        assert own["lost_milliseconds"] > -1  # two clocks, and a loop that loses nothing
        assert own["spread"]["n"] == 1
    assert str(tmp_path) not in result["environment"]["command"]


def test_what_cannot_be_is_named(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"other is .* must be a checkout of this project"):
        Arguments(data=photos, other=tmp_path)
    with pytest.raises(InputError, match="batches is 0"):
        Arguments(data=photos, batches=0)
    if len(os.sched_getaffinity(0)) >= 2:
        with pytest.raises(InputError, match=r"The loader of .* failed: .*nowhere"):
            measure(Arguments(data=tmp_path / "nowhere", repeats=1), command="")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(InputError, match="one core only"):
        measure(Arguments(data=photos), command="")

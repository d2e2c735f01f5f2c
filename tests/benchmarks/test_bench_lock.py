"""bench_lock measures this loader and another version's beside a thread that runs Python."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks import bench_lock
from benchmarks.bench_lock import ROOT, Arguments, measure
from pipelines.runtime import InputError

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="the loop and the loader need a core each"
)


@needs_two_cores
def test_both_versions_take_turns(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, out = tmp_path / "other", tmp_path / "out.json"
    other.mkdir()
    (other / "pipelines").symlink_to(ROOT / "pipelines")
    words = [str(folder), "--other", str(other), "--batch-size", "4", "--size", "32", "--local-size", "16"]
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


def test_what_cannot_be_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"other is .* must be a checkout of this project"):
        Arguments(data=folder, other=tmp_path)
    with pytest.raises(InputError, match="batches is 0"):
        Arguments(data=folder, batches=0)
    if len(os.sched_getaffinity(0)) >= 2:
        with pytest.raises(InputError, match=r"The loader of .* failed: .*nowhere"):
            measure(Arguments(data=tmp_path / "nowhere", repeats=1), command="")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(InputError, match="one core only"):
        measure(Arguments(data=folder), command="")

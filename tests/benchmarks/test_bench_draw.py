"""The benchmark of draws measures both ways and tells what it promises."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_draw
from benchmarks.bench_draw import Arguments, measure
from pipelines.runtime import InputError
from pipelines.views.native.sampling import native_obstacle


@pytest.mark.skipif(native_obstacle() is not None, reason="needs a C compiler")
def test_both_ways_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, threads = tmp_path / "draws.json", torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench_draw", "--images", "8", "64", "--repeats", "3", "--out", str(out)])
    assert bench_draw.body() == 0
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert torch.get_num_threads() == threads
    assert list(result["images"]) == ["8", "64"]
    for row in result["images"].values():
        each = row["milliseconds"]
        assert set(each) == {"draw", "draw, torch", "jobs", "jobs, torch", "check"}
        assert min(each.values()) > 0
        slow, fast = each["draw, torch"] + each["jobs, torch"], each["draw"] + each["jobs"]
        assert row["times_faster"] == pytest.approx(slow / fast)
    assert result["environment"]["command"] == "python -m benchmarks.bench_draw --images 8 64 --repeats 3"


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"images is \(8, 0\) but must be 1 or more"):
        Arguments(images=(8, 0))
    with pytest.raises(InputError, match="repeats is 0"):
        Arguments(repeats=0)
    monkeypatch.setattr(bench_draw, "native_obstacle", lambda: "no compiler")
    with pytest.raises(InputError, match=r"The C library cannot be used \(no compiler\): there is nothing to compare"):
        measure(Arguments(), command="")

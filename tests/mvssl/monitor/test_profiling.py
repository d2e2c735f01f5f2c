"""Profiles of steps: sums over spans, and the files and lines of --profile."""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch._C._autograd import DeviceType

from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.monitor.profiling import (
    Entry,
    Span,
    StepProfile,
    count_launches,
    covered,
    device_spans,
    format_table,
    profile_steps,
    time_by_name,
)
from mvssl.training.preflight import dry_run, profile_run
from pipelines.runtime import InputError

SPANS = [Span("b", 4, 9), Span("a", 0, 2), Span("a", 1, 3), Span("c", 5, 6), Span("a", 20, 24)]


def test_the_device_is_busy_in_any_span() -> None:
    """[0, 3], [4, 9] and [20, 24]: counted tick by tick."""
    ticks = {tick for span in SPANS for tick in range(int(span.begin), int(span.end))}
    assert covered(SPANS) == len(ticks) == 12
    assert covered([]) == 0


def test_entries_are_times_and_numbers_per_step() -> None:
    assert time_by_name(SPANS, steps=2) == (Entry("a", 0.004, 1.5), Entry("b", 0.0025, 0.5), Entry("c", 0.0005, 0.5))
    lines = format_table(time_by_name(SPANS, steps=2), milliseconds=0.01, rows=1)
    assert [line.split() for line in lines[1:]] == [
        ["0.004", "40.0%", "1.5", "a"],
        ["0.003", "30.0%", "1.0", "(2", "others)"],
    ]


def event(name: str, device: DeviceType, *, annotation: bool = False) -> Any:
    return SimpleNamespace(
        name=name,
        device_type=device,
        is_user_annotation=annotation,
        time_range=SimpleNamespace(start=1.0, end=2.0),
    )


def test_launches_and_kernels_are_told_apart() -> None:
    calls = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync"]
    others = ["cudaStreamSynchronize", "cudaEventRecord", "aten::copy_", "Memcpy of mine"]
    events = [event(name, DeviceType.CPU) for name in calls + others]
    events += [event(name, DeviceType.CUDA) for name in ("sgemm", "Memcpy HtoD", "triton_poi_0")]
    events.append(event("## Call CompiledFxGraph ##", DeviceType.CUDA, annotation=True))
    assert count_launches(events) == len(calls)
    assert [span.name for span in device_spans(events)] == ["sgemm", "Memcpy HtoD", "triton_poi_0"]


@pytest.mark.parametrize(
    ("busy", "host", "words"),
    [
        (99.0, 100.0, "none"),
        (60.0, 99.0, "launching"),
        (60.0, 20.0, "gaps between kernels"),
        (None, 9.0, "the CPU"),
    ],
)
def test_the_bottleneck(busy: float | None, host: float, words: str) -> None:
    profile = StepProfile(
        milliseconds=100.0,
        host_milliseconds=host,
        launches=None,
        kernels=None,
        busy_milliseconds=busy,
        entries=(),
    )
    assert profile.bottleneck().startswith(words)


def test_a_step_on_the_cpu() -> None:
    """A matrix product and a pause of the host."""
    x = torch.randn(300, 300)

    def step() -> None:
        x @ x
        time.sleep(0.01)

    profile = profile_steps(step, steps=4, device=torch.device("cpu"))
    assert profile.milliseconds >= 10
    assert profile.host_milliseconds >= 10
    assert (profile.launches, profile.kernels, profile.busy_share) == (None, None, None)
    products = {entry.name: entry.number for entry in profile.entries}
    assert products["aten::mm"] == 1


def test_profile_writes_a_trace_and_a_table(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "profile"
    options = RunOptions(data=images, out=out, device="cpu")
    profile_run(tiny_recipe, options, Console(width=100), steps=2)
    said = capsys.readouterr().out
    assert "step alone" in said
    assert "with the loader" in said
    assert str(out) in said
    numbers = json.loads((out / "profile.json").read_text())
    assert numbers["recipe"]["name"] == tiny_recipe.name
    assert numbers["milliseconds"] > 0
    assert numbers["fed_milliseconds"] > 0
    names = {name for name, *_ in numbers["entries"]}
    assert any("convolution" in name for name in names)
    assert "convolution" in (out / "profile.txt").read_text()
    with gzip.open(out / "trace.json.gz") as file:
        assert json.load(file)["traceEvents"]
    with pytest.raises(InputError, match=r"out is '.*profile', which exists: name another folder.*--overwrite"):
        profile_run(tiny_recipe, options, Console(quiet=True), steps=2)
    profile_run(tiny_recipe, replace(options, overwrite=True), Console(quiet=True), steps=2)


def test_profile_needs_a_folder_and_leaves_none_when_it_fails(
    images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="out is missing: name the folder for the trace"):
        profile_run(tiny_recipe, RunOptions(data=images), Console(quiet=True), steps=2)
    with pytest.raises(InputError, match="does not exist"):
        profile_run(tiny_recipe, RunOptions(data=tmp_path / "none", out=tmp_path / "p"), Console(quiet=True), steps=2)
    assert not (tmp_path / "p").exists()


@pytest.mark.slow
def test_a_short_run_is_profiled_beyond_its_end(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An epoch of 4 steps: too few batches to measure the loader; the step alone reuses the last batch."""
    recipe = replace(tiny_recipe, epochs=1)
    profile_run(recipe, RunOptions(data=images, out=tmp_path / "p", device="cpu"), Console(width=100), steps=5)
    said = capsys.readouterr().out
    assert "step alone" in said
    assert "with the loader" not in said


def test_a_dry_run_on_a_gpu_reports_launches_and_the_bottleneck(
    images: Path, tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the profile of a GPU; the rest runs on the CPU."""
    told = StepProfile(
        milliseconds=100.0,
        host_milliseconds=99.0,
        launches=2500.0,
        kernels=2600.0,
        busy_milliseconds=60.0,
        entries=(),
    )
    monkeypatch.setattr("mvssl.training.preflight.profile_steps", lambda step, **options: told)
    monkeypatch.setattr("mvssl.training.preflight._on_gpu", lambda device: True)
    dry_run(tiny_recipe, RunOptions(data=images, device="cpu"), Console(width=200))
    said = capsys.readouterr().out
    assert "2,500 a step, of 2,600 kernels" in said
    assert "60.0 % of a step; bottleneck: launching" in said
    assert "80.0 source images/s" in said  # 8 images in 100 ms


@pytest.mark.gpu
def test_a_replay_is_one_launch() -> None:
    x = torch.zeros(1 << 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            x += 1

    def eager() -> None:
        for _ in range(10):
            x.add_(1)

    device = torch.device("cuda")
    replayed, launched = (profile_steps(step, steps=5, device=device) for step in (graph.replay, eager))
    assert (replayed.launches, replayed.kernels) == (1, 10)
    assert (launched.launches, launched.kernels) == (10, 10)
    assert device_spans([]) == []

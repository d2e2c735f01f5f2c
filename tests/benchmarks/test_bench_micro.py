"""bench_micro: each micro-benchmark measures what it names, and refuses what it cannot measure."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import bench_micro
from benchmarks.bench_micro import CANDIDATES, ROOT, Fused, Gil, Linear, Sampling, candidates, launched_with, launchings
from benchmarks.compiled.view_kernels import KERNELS, Arguments, kernel_bytes, mean_bytes, table
from benchmarks.report import tables
from pipelines import ViewSpec, draw
from pipelines.runtime import InputError
from pipelines.views.native import native_obstacle
from tests.benchmarks.conftest import Bench

needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="the loop and the loader need a core each"
)


@pytest.mark.skipif(native_obstacle() is not None, reason="needs a C compiler")
def test_sampling_in_c_and_torch_is_measured(bench: Bench) -> None:
    threads = torch.get_num_threads()
    result, _ = bench(bench_micro, "sampling", "--images", 8, 64, "--repeats", 3)
    assert torch.get_num_threads() == threads
    assert list(result["images"]) == ["8", "64"]
    for row in result["images"].values():
        each = row["milliseconds"]
        assert set(each) == {"draw", "draw, torch", "jobs", "jobs, torch", "check"}
        assert min(each.values()) > 0
        slow, fast = each["draw, torch"] + each["jobs, torch"], each["draw"] + each["jobs"]
        assert row["times_faster"] == pytest.approx(slow / fast)
    assert result["environment"]["command"] == "python -m benchmarks.bench_micro sampling --images 8 64 --repeats 3"


def test_sampling_refuses_invalid_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"images is \(8, 0\) but must be 1 or more"):
        Sampling(images=(8, 0))
    with pytest.raises(InputError, match="repeats is 0"):
        Sampling(repeats=0)
    monkeypatch.setattr(bench_micro, "native_obstacle", lambda: "no compiler")
    with pytest.raises(InputError, match=r"The C library cannot be used \(no compiler\): there is nothing to compare"):
        Sampling().measure("")


@pytest.fixture
def engine() -> Any:
    return pytest.importorskip("pipelines.views.fused.engine", reason="Triton is not installed on this platform")


@needs_two_cores
def test_both_checkouts_are_measured_next_to_a_python_thread(folder: Path, tmp_path: Path, bench: Bench) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "pipelines").symlink_to(ROOT / "pipelines")
    words = ["--other", other, "--batch-size", 4, "--size", 32, "--local-size", 16, "--batches", 3]
    result, _ = bench(bench_micro, "gil", folder, *words, "--repeats", 1, "--seconds", 60)
    assert result["contenders"].keys() == {"this", "other"}
    for own in result["contenders"].values():
        assert own["images_per_second"] > 0
        assert own["lost_milliseconds"] > -1  # two clocks, and a loop that loses nothing
        assert own["spread"]["n"] == 1


def test_gil_refuses_invalid_arguments(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"other is .* must be a checkout of this project"):
        Gil(data=folder, other=tmp_path)
    with pytest.raises(InputError, match="batches is 0"):
        Gil(data=folder, batches=0)
    if len(os.sched_getaffinity(0)) >= 2:
        with pytest.raises(InputError, match=r"The loader of .* failed: .*nowhere"):
            Gil(data=tmp_path / "nowhere", repeats=1).measure("")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(InputError, match="one core only"):
        Gil(data=folder).measure("")


@pytest.mark.parametrize("name", sorted(CANDIDATES))
def test_current_launches_are_among_the_candidates(engine: Any, name: str) -> None:
    launch = engine.LAUNCHES[name]
    assert (launch.constants, launch.num_warps) in list(candidates(name))
    assert [name for name in engine.LAUNCHES if name not in ("turned_rows", "rotate")] == list(CANDIDATES)
    constants, warps = next(iter(candidates(name)))
    with launched_with(name, constants, warps):
        assert (engine.LAUNCHES[name].constants, engine.LAUNCHES[name].num_warps) == (constants, warps)
    assert engine.LAUNCHES[name] is launch


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_tuning_without_a_gpu_is_refused() -> None:
    with pytest.raises(InputError, match="there is no CUDA device here; run this on a machine with a GPU"):
        Fused().measure("")


@pytest.mark.gpu
def test_tuning_times_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.bench_micro.WARPS", (4,))
    result = Fused(num_images=8, repeats=2).measure("again")
    assert all(kernel["best"]["milliseconds"] > 0 for kernel in result["kernels"].values())
    assert result["environment"]["command"] == "again"


def test_current_launches_are_timed_first_and_every_candidate_once(engine: Any) -> None:
    timed = [(name, tuple(sorted(constants.items())), warps) for name, constants, warps in launchings(engine.LAUNCHES)]
    count = len(CANDIDATES)
    launches = {name: engine.LAUNCHES[name] for name in CANDIDATES}
    current = [(name, tuple(sorted(launch.constants.items())), launch.num_warps) for name, launch in launches.items()]
    assert timed[:count] == current
    every = [(name, tuple(sorted(found.items())), warps) for name in CANDIDATES for found, warps in candidates(name)]
    assert sorted(timed) == sorted(every)


def test_bytes_are_those_counted_by_hand() -> None:
    """A crop of 30 x 80 pixels to a view of 40: the columns shrink by 2, the rows grow."""
    specs = (ViewSpec(name="a", task="t", size=40, blur=0.0), ViewSpec(name="b", task="t", size=40, blur=1.0))
    params = draw(specs, torch.tensor([[30, 80]]), seed=0, epoch=0, index=[0])
    crop = torch.tensor([0, 0, 30, 80]).expand(2, 1, 4)
    moved = kernel_bytes(specs, dataclasses.replace(params, crop=crop), value_bytes=2)
    plain = {name: int(count[0, 0]) for name, count in moved.items()}
    blurred = {name: int(count[1, 0]) for name, count in moved.items()}
    # Taps: 2 pixels of the coarser grid to each side and one: 9 of the columns, 5 of the rows. int16, int32 pairs.
    column_weights, row_weights, bounds = 9 * 40 * 2, 5 * 40 * 2, 40 * 2 * 4
    assert plain == {
        "weights": column_weights + row_weights + 2 * bounds + 2 * 4,
        "columns": 30 * 80 * 3 + column_weights + bounds + 30 * 40 * 3,
        "rows": 30 * 40 * 3 + row_weights + bounds + 40 * 40 * 3,
        "color": 40 * 40 * 3 + 40 * 40 * 3 * 2,
        "down": 0,
        "along": 0,
    }
    assert blurred == plain | {
        "color": 40 * 40 * 3 + 40 * 40 * 3 * 4,
        "down": 40 * 40 * 3 * 8,
        "along": 40 * 40 * 3 * (4 + 2),
    }


def test_every_kernel_is_counted_in_its_order(engine: Any) -> None:
    assert tuple(name for name in engine.LAUNCHES if name not in ("turned_rows", "rotate")) == KERNELS


def test_means_follow_the_specs() -> None:
    """Blurred are 1 + 0.1 + 2 * 0.5 * (96 / 224)**2 + 0.5 views of 224 pixels."""
    moved = mean_bytes(height=375, width=500, value_bytes=2)
    blurred = (1.6 * 224**2 + 1.0 * 96**2) * 3
    assert abs(moved["down"] / (8 * blurred) - 1) < 0.02
    assert abs(moved["along"] / (6 * blurred) - 1) < 0.02
    assert moved["columns"] > 3 * 375 * 500 * (3 * 0.625 + 2 * 0.165) * 0.95  # the crops alone


def test_unmeasured_kernels_are_blank_in_the_table() -> None:
    blank, partly = table(Arguments()), table(Arguments(), measured={"rows": 0.5})
    assert len(blank) == len(KERNELS) + 3
    assert all(line.endswith(" | |") for line in blank[2:])
    assert [line for line in partly if line not in blank] == [blank[4].removesuffix("|") + "0.500 |"]
    whole = table(Arguments(), measured=dict.fromkeys(KERNELS, 0.5))
    assert whole[-1].endswith("| 3.000 |"), "all are their sum"


def write_features(path: Path, *, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, 300)
    centres = np.random.default_rng(0).normal(size=(6, 8))
    np.save(path, (centres[labels] + rng.normal(size=(300, 8))).astype(np.float32))
    rows = [f"{n},image{n},{label},class{label}" for n, label in enumerate(labels)]
    path.with_suffix(".csv").write_text("\n".join(["row,key,label,class", *rows]) + "\n")
    return path


def test_linear_compares_equally_accurate_classifiers(tmp_path: Path) -> None:
    train, val = write_features(tmp_path / "train.npy", seed=1), write_features(tmp_path / "val.npy", seed=2)
    asked = Linear(train=train, val=val, epochs=20, repeats=1, whole=True)
    result = asked.measure("")
    contenders = result["contenders"]
    assert list(contenders) == ["one setting", "the grid, raced", "scikit-learn, best C", "the grid, all epochs"]
    top1 = {name: own["top1"] for name, own in contenders.items()}
    assert min(top1.values()) > 0.6
    assert max(top1.values()) - min(top1.values()) < 0.06
    assert contenders["one setting"]["times_one_setting"] == 1
    lines = tables.linear({"linear_cpu": result})
    assert [line.split("|")[1].strip() for line in lines[2:6]] == list(contenders)
    (tmp_path / "val.csv").unlink()
    with pytest.raises(InputError, match="write them with mvssl-features"):
        bench_micro.load_features(val)

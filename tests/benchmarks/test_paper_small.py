"""The paper's comparison tunes all arms alike, gives all cells one budget, and resumes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from benchmarks import paper_small
from benchmarks.paper.cells import (
    ARMS,
    METHODS,
    OPTIMIZERS,
    SETTINGS,
    TUNING_SEED,
    VARIANTS,
    Cell,
    Setting,
    grid,
    kind_of,
    make_recipe,
    plan,
)
from benchmarks.paper.results import Results
from benchmarks.paper.run_cell import pack, unpack, write_splits
from benchmarks.paper_small import Arguments, Queue, compare, run_or_diverge
from mvssl.training.monitor import Diverged
from pipelines.runtime import InputError
from pipelines.views.spec import tasks

TINY = dataclasses.replace(
    SETTINGS["cpu"],
    classes=2,
    train_images=16,
    tuning_images=3,
    epochs=2,
    tuning_epochs=1,
    batch_size=8,
    marks=2,
    precision="fp32",
)
SIMSIAM = Cell(method="simsiam", variant="two-view", seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("paper") / "data"
    generator = np.random.default_rng(0)
    for split, count in (("train", 21), ("val", 3)):
        for name in ("a", "b"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{n:02d}.jpg")
    return root


def row(cell: Cell, setting: Setting = TINY, **measured: Any) -> dict[str, Any]:
    return {"cell": dataclasses.asdict(cell), "setting": dataclasses.asdict(setting), **measured}


def tuned(cell: Cell, accuracies: list[float], setting: Setting = TINY) -> list[dict[str, Any]]:
    """Results of tuning a cell's arm, in the order of the grid."""
    points = grid(cell.method, cell.optimizer, setting)
    assert len(points) == len(accuracies)
    cells = [dataclasses.replace(cell, variant=cell.arm, seed=TUNING_SEED, point=point.name) for point in points]
    return [row(one, setting, tuning_knn=value) for one, value in zip(cells, accuracies, strict=True)]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_all_cells_have_one_budget_and_differ_where_they_should(setting: Setting) -> None:
    for method, variant, optimizer in product(METHODS, VARIANTS, OPTIMIZERS):
        cell = Cell(method=method, variant=variant, optimizer=optimizer, seed=3)
        for point in grid(method, optimizer, setting):
            recipe = make_recipe(cell, point, setting)
            assert (recipe.method, recipe.seed) == (method, 3)
            assert (recipe.epochs, recipe.batch_size) == (setting.epochs, setting.batch_size)
            assert recipe.backbone.name == setting.backbone
            assert (recipe.optimizer.base_lr, recipe.target_decay) == (point.base_lr, point.target_decay)
            assert recipe.predictors == ("shared" if variant.startswith("shared") else "per-view")
        names = ["global"] if variant == "two-view" else ["global", "local"]
        if variant.endswith(" + cutout"):
            names.append("cutout")
        assert tasks(recipe.views) == tuple(names)
        # PAPER.md section 4: sums of terms and tasks, for SimSiam means.
        total = sum(recipe.task_weights.values())
        assert total == pytest.approx(1.0 if method == "simsiam" else max(2.0, len(tasks(recipe.views))))
        assert recipe.backbone.init == ("timm" if setting == SETTINGS["cpu"] else "release")
    point = grid("byol", "paper", setting)[0]
    shared, per_view = (
        make_recipe(Cell(method="byol", variant=variant, seed=0), point, setting) for variant in ("shared", "per-view")
    )
    assert dataclasses.replace(shared, name=per_view.name, predictors="per-view") == per_view


def test_the_papers_optimisers() -> None:
    """PAPER.md section 5."""
    assert [kind_of(method, "paper") for method in ("byol", "simsiam", "mocov3")] == ["lars", "sgd", "lars"]
    assert {kind_of(method, "adamw") for method in METHODS} == {"adamw"}


def test_every_arm_is_tuned_over_the_same_points_and_the_most_telling_cells_come_first() -> None:
    cells = plan(TINY, seeds=(1, 2, 3))
    assert len(set(cells)) == len(cells) == len({cell.name for cell in cells})
    for method, optimizer in product(METHODS, OPTIMIZERS):
        points = [point.name for point in grid(method, optimizer, TINY)]
        for arm in ARMS:
            found = [
                c.point for c in cells if (c.method, c.optimizer, c.variant) == (method, optimizer, arm) and c.point
            ]
            assert found == points
        for variant in VARIANTS:
            seeds = [
                c.seed
                for c in cells
                if (c.method, c.optimizer, c.variant, c.point) == (method, optimizer, variant, None)
            ]
            assert seeds == [1, 2, 3]
    runs = [cell for cell in cells if cell.point is None]
    assert [(cell.method, cell.variant, cell.seed) for cell in runs[:2]] == [
        ("byol", "shared", 1),
        ("byol", "per-view", 1),
    ]
    assert TUNING_SEED not in {cell.seed for cell in runs}
    assert plan(TINY, (1, 2, 3), methods=("simsiam",)) == [cell for cell in cells if cell.method == "simsiam"]


def test_a_cell_waits_for_tuning_and_takes_the_best_point() -> None:
    cell = Cell(method="byol", variant="per-view + cutout", seed=2)
    accuracies = [0.1, 0.2, 0.3, 0.3, 0.1, 0.2, 0.0, 0.1]
    rows = tuned(cell, accuracies)
    best = grid("byol", "paper", TINY)[2]
    assert Results(TINY, rows).point(cell) == best  # the first of two that are as good
    assert Results(TINY, rows[:-1]).point(cell) is None
    assert list(Results(TINY, rows[:-1]).ready([cell])) == []
    assert list(Results(TINY, rows).ready([cell])) == [(cell, best)]
    run = row(cell, point=dataclasses.asdict(best), knn=0.5)
    done = Results(TINY, [*rows, run])
    assert done.done(cell)
    assert list(done.ready([cell])) == []
    assert done.runs("byol", "per-view + cutout", "paper") == [run]


def test_points_of_another_settings_tuning_are_taken_by_name_and_recorded(tmp_path: Path) -> None:
    cell = Cell(method="byol", variant="shared", seed=2)
    names = [point.name for point in grid("byol", "paper", TINY)]
    accuracies = [0.5 if name == "slow target" else 0.1 for name in names]
    other = Results(TINY, tuned(cell, accuracies))
    here = Results(SETTINGS["gpu"], tuned=("paper_small_cpu", other))
    point = here.point(cell)
    assert point is not None
    assert (point.name, point.target_decay) == ("slow target", 0.99667), "about the middle of its own grid"
    assert here.point(dataclasses.replace(cell, variant="two-view")) is None
    kept = here.add(cell, point, {"knn": 0.5}, out=tmp_path / "gpu.jsonl", command="")
    assert kept["point_from"] == {
        "results": "paper_small_cpu",
        "tuning_knn": dict(zip(names, accuracies, strict=True)),
    }
    assert here.done(cell)
    assert Results.read(tmp_path / "gpu.jsonl", SETTINGS["gpu"]).runs("byol", "shared", "paper") == [kept], (
        "also without the other"
    )


def test_the_gpus_first_cells_are_the_first_rows_of_the_table() -> None:
    tuning = paper_small.tuning_of(Arguments(setting="gpu").tuned_by)
    assert tuning is not None
    cells = plan(SETTINGS["gpu"], (1, 2, 3), tune=False)
    assert {cell.point for cell in cells} == {None}
    assert [(cell.method, cell.variant, cell.seed) for cell in cells[:6]] == [
        ("byol", variant, seed) for seed in (1, 2, 3) for variant in ("shared", "per-view")
    ]
    results = Results(SETTINGS["gpu"], tuned=tuning)
    assert all(results.point(cell) is not None for cell in cells), "the committed cells tune all of them"
    assert Arguments(setting="gpu", tune=True).tuned_by is None
    assert Arguments(setting="cpu").tuned_by is Arguments(setting="cpu_release").tuned_by is None


def test_missing_tuning_of_another_setting_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_small, "RESULTS", tmp_path)
    monkeypatch.setitem(SETTINGS, "rehearsal", TINY)
    arguments = Arguments(data=data, setting="rehearsal", methods=("simsiam",), out=tmp_path / "out", runs=tmp_path)
    with pytest.raises(InputError, match=r"cpu\.jsonl lacks the tuning of simsiam-paper-shared-seed1 \(and 29"):
        compare(arguments, data, Console(quiet=True))


def test_a_run_with_a_point_that_tuning_no_longer_chooses_is_run_anew() -> None:
    """As when the grid was widened after the run."""
    cell = Cell(method="byol", variant="shared", seed=2)
    points = grid("byol", "paper", TINY)
    old = Results(
        TINY,
        [
            *tuned(cell, [0.1, 0.4, *[0.3] * (len(points) - 2)]),
            row(cell, point=dataclasses.asdict(points[2]), knn=0.5),
        ],
    )
    assert not old.done(cell)
    assert list(old.ready([cell])) == [(cell, points[1])]
    assert old.runs("byol", "shared", "paper") == []
    queue = Queue(old, [cell], expected=1, seconds=None, most=None)
    assert queue.left == 1
    old.rows.pop(dataclasses.replace(cell, seed=TUNING_SEED, point=points[1].name))
    assert old.done(cell), "while tuning is under way, nothing is known against it"


def test_images_of_training_tuning_and_test_are_disjoint(data: Path, tmp_path: Path) -> None:
    splits = write_splits(data, tmp_path / "runs", TINY)
    parts = [set(path.read_text().splitlines()) for path in (splits.train, splits.tuning, splits.test)]
    assert [len(part) for part in parts] == [2 * 16, 2 * 3, 2 * (2 + 3)]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert sum("/val/" in line for line in parts[2]) == 6


def test_no_cell_is_begun_that_would_not_end_in_time() -> None:
    cells = plan(TINY, seeds=(1,))
    whole = 100 * TINY.tuning_epochs / TINY.epochs  # of one that tunes
    assert Queue(Results(TINY), cells, expected=100, seconds=0.9 * whole, most=None).take() is None
    queue = Queue(Results(TINY), cells, expected=100, seconds=0.9 * whole, most=None)
    queue.note(cells[0], 0.5 * whole)  # so they take half of that here
    first = queue.take()
    assert first is not None
    assert first[0] == cells[0]
    queue.note(cells[0], whole)
    assert queue.take() is None
    queue.note(cells[0], 0.5 * whole)  # the one before compiled
    assert queue.take() is not None
    limited = Queue(Results(TINY), cells, expected=100, seconds=None, most=2)
    assert [limited.take() is None for _ in range(3)] == [False, False, True]


def test_it_resumes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, "cpu", TINY)
    cells = plan(TINY, seeds=(1,), optimizers=("paper",))
    cells = [cell for cell in cells if (cell.method, cell.variant) == ("simsiam", "two-view")]
    cells.append(Cell(method="mocov3", variant="shared", seed=1))
    monkeypatch.setattr(paper_small, "plan", lambda *_, **__: cells)
    out, runs = tmp_path / "results.jsonl", tmp_path / "runs"
    out.write_text("".join(json.dumps(result) + "\n" for result in tuned(cells[-1], [0.1] * 8)))  # of another machine
    said = Console(record=True, width=200, file=io.StringIO())
    arguments = Arguments(data=data, out=out, runs=runs, device="cpu", jobs=2)
    assert compare(dataclasses.replace(arguments, cells=2), data, said)
    first = Results.read(out, TINY)
    assert [cell in first.rows for cell in cells] == [True, True, *[False] * 6]
    assert "6 of 8 cells are left" in said.export_text()

    before = out.read_text()
    assert compare(arguments, data, Console(quiet=True))
    found = Results.read(out, TINY)
    assert set(cells) <= found.rows.keys()
    assert out.read_text().startswith(before)
    assert not [path for path in runs.iterdir() if path.is_dir()], "checkpoints of finished cells are deleted"
    measured = found.rows[SIMSIAM]
    chosen = found.point(SIMSIAM)
    assert chosen is not None
    assert measured["point"] == dataclasses.asdict(chosen)
    assert (measured["steps"], measured["test_images"]) == (8, 10)
    for measure in ("knn", "linear"):
        assert measured[measure] == pytest.approx(unpack(measured[f"{measure}_hits"], 10).mean())
    mocov3 = found.rows[cells[-1]]
    assert [mark["step"] for mark in mocov3["signals"]] == [4, 8]
    assert mocov3["signals"][0]["cosine"]["predictor"].keys() == {"global", "local", "global/local"}
    assert mocov3["curves"].keys() >= {"step", "loss/global", "loss/local", "grad_norm"}

    changed = dataclasses.replace(TINY, epochs=3)
    with pytest.raises(InputError, match=r"is of another setting \(epochs differ\): give another --out"):
        Results.read(out, changed)
    out.write_text(before + '{"cell": 1\n')
    with pytest.raises(InputError, match=r"results\.jsonl does not hold results of cells .*: remove what is broken"):
        Results.read(out, TINY)


def test_a_folder_of_cells_is_read_and_extended(tmp_path: Path) -> None:
    """As earlier versions wrote them, a file a cell."""
    cell = Cell(method="byol", variant="shared", seed=2)
    points = grid("byol", "paper", TINY)
    for result in tuned(cell, [0.1] * len(points)):
        (tmp_path / f"{Cell(**result['cell']).name}.json").write_text(json.dumps(result, indent=2))
    found = Results.read(tmp_path, TINY)
    assert found.point(cell) == points[0]
    found.add(cell, points[0], {"knn": 0.5}, out=tmp_path, command="")
    assert Results.read(tmp_path, TINY).rows == found.rows
    assert len(found.rows) == len(points) + 1


def test_which_images_were_right_survives_packing() -> None:
    import torch

    right = torch.rand(37, generator=torch.Generator().manual_seed(0)) > 0.5
    assert unpack(pack(right), 37).tolist() == right.tolist()


def test_a_run_that_diverges_is_a_result(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: object, **__: object) -> dict[str, Any]:
        raise Diverged(f"The loss of step 3 is not finite; see {tmp_path / 'run'}/failure.json")

    monkeypatch.setattr(paper_small, "run_cell", diverge)
    point = grid("simsiam", "paper", TINY)[0]
    splits = write_splits(data, tmp_path / "lists", TINY)
    measured = run_or_diverge(SIMSIAM, point, TINY, splits, tmp_path / "run", device="cpu", threads=1)
    assert measured["tuning_knn"] == 0.0
    assert "step 3" in measured["diverged"]
    assert str(tmp_path) not in measured["diverged"]
    assert Results(TINY, [row(SIMSIAM, **measured)]).runs("simsiam", "two-view", "paper") == []


def test_workers_end_with_a_killed_command() -> None:
    program = """
        import os, time
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from benchmarks.paper_small import _stop_with_parent
        if __name__ == "__main__":
            with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_stop_with_parent) as pool:
                print(pool.submit(os.getpid).result(), flush=True)
                pool.submit(time.sleep, 600).result()
    """
    command = [sys.executable, "-c", "exec(compile(__import__('sys').argv[1], 'p', 'exec'))", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker went on for ten seconds")


def test_invalid_data_and_arguments_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a folder with train/ and val/"):
        write_splits(tmp_path, tmp_path / "runs", TINY)
    with pytest.raises(InputError, match="has 2 classes but the setting needs 3"):
        write_splits(data, tmp_path / "runs", dataclasses.replace(TINY, classes=3))
    with pytest.raises(InputError, match="has 21 images but the setting needs 22"):
        write_splits(data, tmp_path / "runs", dataclasses.replace(TINY, train_images=19))
    with pytest.raises(InputError, match="seeds is"):
        Arguments(seeds=(0, 1))
    with pytest.raises(InputError, match="jobs is 0"):
        Arguments(jobs=0)
    with pytest.raises(InputError, match=r"methods is \(\) but must be some of byol, simsiam, mocov3: give one"):
        Arguments(methods=())

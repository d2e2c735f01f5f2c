"""Runs below a folder: how far each came, in what state, and what is named instead of a run."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mvssl.cli.train import body
from mvssl.config.recipe import Recipe
from mvssl.runs.jsonl import read_jsonl
from mvssl.runs.listing import find_runs, last_row, run_state
from pipelines.runtime import InputError
from tests.samples.tiny_runs import STEPS, crash_at, train


@pytest.fixture(scope="module")
def folder(finished: Path, images: Path, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, one that was killed, one that begins, a damaged one, and folders of others."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(finished, root / "done", symlinks=True)
    with crash_at(6):
        train(replace(tiny_recipe, seed=2), images, root / "deep" / "er" / "killed", log_every=1)
    with crash_at(2):
        train(tiny_recipe, images, root / "young", log_every=1)
    shutil.copytree(finished, root / "damaged", symlinks=True)
    (root / "damaged" / "config.json").write_text('{"recipe": ')
    shutil.rmtree(root / "damaged" / "checkpoints")
    (root / "foreign").mkdir()
    (root / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    (root / "link").symlink_to(root / "done")
    (root / "empty").mkdir()
    return root


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    assert body(["runs", *arguments]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_each_run_is_listed_with_its_state(folder: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = listed(capsys, str(folder), "--json")
    runs: dict[str, dict[str, Any]] = {Path(run["path"]).name: run for run in json.loads(out)}
    assert {name: run["state"] for name, run in runs.items()} == {
        "done": "finished",
        "killed": "resumable",
        "young": "no checkpoint",
        "damaged": "broken",
    }
    rows = list(read_jsonl(folder / "done" / "metrics.jsonl"))
    done = runs["done"]
    assert (done["step"], done["steps"], done["epochs"], done["epochs_done"]) == (STEPS, STEPS, 3, 3.0)
    assert done["loss"] == [row["loss"] for row in rows if row["kind"] == "train"][-1]
    assert done["knn"] == [row["top1"] for row in rows if row["kind"] == "knn"][-1]
    assert (done["recipe"], done["k"], done["data"]) == ("demo", 5, str(images))
    summary = json.loads((folder / "done" / "summary.json").read_text())
    assert done["images_per_second"] == summary["images_per_second"]
    assert (runs["killed"]["step"], runs["killed"]["epochs_done"], runs["killed"]["resumable"]) == (6, 1.5, True)
    assert (runs["young"]["step"], runs["young"]["knn"]) == (2, None)
    assert "config.json cannot be read" in runs["damaged"]["reason"]
    assert "foreign is no run: its config.json is no run's" in err
    assert "empty" not in out + err


@pytest.mark.parametrize("value", ['"low"', "NaN", "true"])
def test_a_loss_that_is_no_number_breaks_its_run_only(
    value: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("good", "second", "bad", "early"):
        shutil.copytree(finished, tmp_path / name, symlinks=True)
    lines = (tmp_path / "bad" / "metrics.jsonl").read_text().splitlines(keepends=True)
    damaged = f'{{"kind": "train", "step": 12, "loss": {value}}}\n'
    (tmp_path / "bad" / "metrics.jsonl").write_text("".join([*lines, damaged]))
    (tmp_path / "early" / "metrics.jsonl").write_text("".join([damaged, *lines]))
    out, _ = listed(capsys, str(tmp_path))
    assert "bad/metrics.jsonl is damaged (" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("bad ")] == ["broken"]
    rows = {Path(row["path"]).name: row for row in json.loads(listed(capsys, str(tmp_path), "--json")[0])}
    assert (rows["bad"]["loss"], rows["early"]["state"]) == (None, "finished")
    page = tmp_path / "page.html"
    assert body(["report", str(tmp_path), "--out", str(page)]) == 0
    err = capsys.readouterr().err
    for words in ("bad", "early", "left out: ", "metrics.jsonl is damaged"):
        assert words in err
    assert "good" in page.read_text()


def test_folders_of_other_programs_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (*((f"model-{number:03}", "{}") for number in range(120)), ("a", "{"), ("b", '{"a": 1,')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    out, err = listed(capsys, str(tmp_path))
    assert out.startswith("no runs below")
    first, second, foreign = err.splitlines()
    assert f"{tmp_path}/a is no run: its config.json cannot be read (" in first
    assert f"{tmp_path}/b is no run: its config.json cannot be read (" in second
    assert f"{tmp_path}/model-002 and 117 more are no run: its config.json is no run's" in foreign


def test_a_stopped_a_diverged_and_a_running_run(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(finished, path, symlinks=True)
    summary = json.loads((path / "summary.json").read_text())
    for stopped_by, state in (("SIGTERM", "stopped"), ("divergence", "diverged"), (None, "finished")):
        (path / "summary.json").write_text(json.dumps(summary | {"stopped_by": stopped_by}))
        found = run_state(path)
        assert (found.state, found.stopped_by) == (state, "SIGTERM" if state == "stopped" else None)
    lock = os.open(path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert run_state(path).state == "running"
    finally:
        os.close(lock)
    (path / "summary.json").write_text("[1]")
    assert "summary.json is damaged" in run_state(path).reason
    (path / "summary.json").unlink()
    assert run_state(path).state == "finished"  # by its last checkpoint
    config = json.loads((path / "config.json").read_text())
    config["recipe"]["epochs"] = 6
    del config["checksum"]
    (path / "config.json").write_text(json.dumps(config))  # as --extend does
    assert (run_state(path).state, run_state(path).epochs_done) == ("resumable", 3.0)


def test_newest_first_or_in_another_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = time.time()
    for age, name in enumerate(("young", "damaged", "done", "deep/er/killed")):
        for path in (folder / name).glob("*.*"):
            os.utime(path, (now - age, now - age))

    def order(*arguments: str) -> list[str]:
        lines = listed(capsys, str(folder), *arguments)[0].splitlines()
        return [line.split()[0] for line in lines[1:] if not line.startswith("/")]

    assert order() == ["young", "damaged", "done", "deep/er/killed"]
    assert order("--sort", "oldest") == ["deep/er/killed", "done", "damaged", "young"]
    assert order("--sort", "name") == ["damaged", "done", "deep/er/killed", "young"]
    assert order("--sort", "epochs")[:2] == ["done", "deep/er/killed"]
    assert order("--sort", "loss")[-1] == "damaged"
    assert order("--sort", "knn")[0] in ("done", "deep/er/killed")


def test_the_table_fits_a_terminal_and_is_whole_in_a_pipe(finished: Path, tmp_path: Path) -> None:
    from io import StringIO

    from mvssl.cli.runs import runs

    name = "a_very_long_name_of_a_run_" * 4
    shutil.copytree(finished, tmp_path / name, symlinks=True)
    terminal, pipe = StringIO(), StringIO()
    runs([str(tmp_path)], Console(file=terminal, force_terminal=True, width=80, color_system=None))
    runs([str(tmp_path)], Console(file=pipe, width=80))
    assert len(terminal.getvalue().splitlines()) == len(pipe.getvalue().splitlines()) == 2
    assert all(len(line) <= 80 for line in terminal.getvalue().splitlines())
    assert "3/3" in terminal.getvalue()
    assert name in pipe.getvalue()


def test_the_last_row_of_a_kind_is_found_far_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "knn", "step": 1, "top1": 0.5}] + [{"kind": "train", "step": n, "loss": 1.0} for n in range(9000)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"kind": "train", "step": 9')
    assert path.stat().st_size > 3 << 16
    assert last_row(path, "knn") == rows[0]
    assert last_row(path, "train") == rows[-1]
    assert last_row(path, "other") is None
    assert last_row(tmp_path / "none", "knn") is None
    path.write_text('{"kind": "knn"\n')
    with pytest.raises(InputError, match=r"metrics.jsonl is damaged"):
        last_row(path, "knn")


def test_nothing_to_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert listed(capsys, str(tmp_path))[0] == f"no runs below {tmp_path}\n"
    assert listed(capsys, str(tmp_path), "--json")[0] == "[]\n"
    with pytest.raises(InputError, match=r"^runs is '.*nowhere', which does not exist: give run folders"):
        body(["runs", str(tmp_path / "nowhere")])


def test_folders_below_runs_are_not_searched(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    shutil.copytree(finished, tmp_path / "run" / "inner", symlinks=True)
    assert find_runs(tmp_path).runs == [tmp_path / "run"]

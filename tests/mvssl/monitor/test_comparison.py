"""The page that compares runs: differences, curves, last numbers, and what is not comparable."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mvssl.cli.train import body
from mvssl.config.recipe import Recipe
from mvssl.monitor.comparison import labels, render
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_jsonl
from pipelines.runtime import InputError
from tests.samples.tiny_runs import train


@pytest.fixture(scope="module")
def pair(finished: Path, images: Path, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of which the second one has another seed and learning rate, and is twice as long."""
    root = tmp_path_factory.mktemp("pair")
    shutil.copytree(finished, root / "first", symlinks=True)
    optimizer = replace(tiny_recipe.optimizer, base_lr=1.0)
    train(replace(tiny_recipe, seed=7, optimizer=optimizer, epochs=6), images, root / "second")
    return root


def table(page: str, title: str) -> dict[str, list[str]]:
    """First cell and the others of each row of the table under a title, without its head."""
    found = re.search(rf"<h2>{title}</h2>.*?(<table>.*?</table>)", page, re.DOTALL)
    assert found is not None
    rows = [[cell.text or "" for cell in row] for row in ElementTree.fromstring(found[1])]
    return {head: rest for head, *rest in rows[1:]}


def page_of(*paths: Path) -> str:
    return render([RunFolder(path) for path in paths])


def test_only_fields_that_differ_are_shown(pair: Path) -> None:
    page = page_of(pair / "first", pair / "second")
    assert table(page, "What differs") == {"seed": ["0", "7"], "epochs": ["3", "6"], "optimizer.base_lr": ["3", "1"]}


def test_last_numbers_with_the_best_one_marked(pair: Path) -> None:
    page = page_of(pair / "first", pair / "second")
    numbers = table(page, "Last numbers")
    last = []
    for name in ("first", "second"):
        rows = list(read_jsonl(pair / name / "metrics.jsonl"))
        last.append([row["loss"] for row in rows if row["kind"] == "train"][-1])
    expected = [f"{loss:.4f}{' (best)' if loss == min(last) else ''}" for loss in last]
    assert numbers["loss"] == expected
    assert numbers["epochs"] == ["3 of 3", "6 of 6"]
    assert numbers["state"] == ["finished", "finished"]
    assert "The planned epochs differ" in page


def test_curves_of_all_runs_lie_over_each_other_by_step_and_by_epoch(pair: Path) -> None:
    page = page_of(pair / "first", pair / "second")
    figures = re.findall(r"<figcaption>(.*?)</figcaption>\s*(<svg.*?</svg>)", page, re.DOTALL)
    titles = [title for title, _ in figures]
    assert titles.count("Loss") == titles.count("Learning rate") == titles.count("Source images/s") == 2
    for title, svg in figures:
        root = ElementTree.fromstring(svg)
        assert [name.text for name in root.iter("title")] == ["first", "second"], title
        lines = [line.attrib for line in root.iter("polyline")]
        assert [line["class"] for line in lines] == ["curve c0 d0", "curve c1 d0"]
    by_step, by_epoch = (ElementTree.fromstring(svg) for title, svg in figures if title == "Loss")
    ends = [[line.attrib["points"].split()[-1] for line in svg.iter("polyline")] for svg in (by_step, by_epoch)]
    assert ends[0] == ends[1]  # the steps of an epoch are as many in both
    assert float(ends[0][1].split(",")[0]) > float(ends[0][0].split(",")[0])
    assert "src=" not in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_what_is_not_comparable_is_said(pair: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "train" / "class_0" / "000.jpg").unlink()
    recipe = replace(
        tiny_recipe, epochs=1, predictors="shared", evaluation=replace(tiny_recipe.evaluation, k=(3, 1), resize=40)
    )
    train(recipe, tmp_path / "data", tmp_path / "other")
    page = page_of(pair / "first", tmp_path / "other")
    for text in (
        "other was trained on other images than first: 1 image fewer (class_0/000)",
        "kNN is not comparable: evaluation.k differs (first 5, 1, other 3, 1)",
        "kNN is not comparable: evaluation.resize differs (first 32, other 40)",
        "the validation images come from other places",
        "Losses are not comparable",
    ):
        assert text in page, text
    assert "(best)" not in "".join(
        table(page, "Last numbers")["loss"] + table(page, "Last numbers")["kNN top-1, k=1, last"]
    )


def test_a_run_that_is_not_finished_is_said(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair / "first", tmp_path / "stopped", symlinks=True)
    path = tmp_path / "stopped" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stopped_by": "SIGINT"}))
    assert "stopped is not finished (stopped by SIGINT)" in page_of(pair / "first", tmp_path / "stopped")


def test_command_takes_runs_folders_and_patterns(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare.html"
    pages = []
    for arguments in ([str(pair)], [f"{pair}/*"], [str(pair / "first"), str(pair / "second"), str(pair / "first")]):
        assert body(["report", *arguments, "--out", str(out)]) == 0
        pages.append(out.read_text())
    assert pages[0] == pages[1] == pages[2]
    assert body(["report", str(pair / "second")]) == 0
    assert "Training curves" in (pair / "second" / "report.html").read_text()
    shutil.copytree(pair, tmp_path / "more", symlinks=True)
    (tmp_path / "more" / "second" / "config.json").write_text("{")
    shutil.rmtree(tmp_path / "more" / "second" / "checkpoints")
    capsys.readouterr()
    assert body(["report", str(tmp_path / "more"), str(pair / "second"), "--out", str(out)]) == 0
    assert "second is left out: " in capsys.readouterr().err
    for wrong, message in (
        ([str(pair / "nowhere")], "does not exist"),
        ([str(tmp_path / "more" / "second"), str(pair / "first")], "config.json cannot be read"),
        ([str(pair), "--out", str(tmp_path / "page.pdf")], r"must end in .html"),
        ([], "runs is missing"),
    ):
        with pytest.raises((InputError, SystemExit), match=None if not wrong else message):
            body(["report", *wrong])


def test_names_tell_runs_apart() -> None:
    assert labels([RunFolder(Path("/x/a")), RunFolder(Path("/y/b"))]) == ["a", "b"]
    assert labels([RunFolder(Path("/x/seed1/run")), RunFolder(Path("/x/seed2/run"))]) == ["seed1/run", "seed2/run"]
    assert len(set(labels([RunFolder(Path("/a\n")), RunFolder(Path("/a\\n"))]))) == 2
    with pytest.raises(InputError, match=r"^report was given 1 runs to compare but takes 2 to 48"):
        render([RunFolder(Path("/x/a"))])

"""Hostile names of everything in a run: displays, logs, tables, pages and plots show them and obey none of them."""

from __future__ import annotations

import csv
import io
import os
import re
from contextlib import chdir
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given, settings
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from mvssl.cli import eval as eval_cli
from mvssl.cli import features as features_cli
from mvssl.cli import train as train_cli
from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.evaluate.compare import RunSummary, plot
from mvssl.monitor.console import Status, TrainingProgress
from mvssl.monitor.loggers import MetricLoggers
from mvssl.monitor.pictures import plain_labels, plot_losses, show_plainly
from mvssl.monitor.report import make_chart, templates
from mvssl.runs.checked_json import write_json
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import JsonLines
from mvssl.weights.backbone_file import loading_code
from pipelines.conversion.command import Convert, convert
from pipelines.names import visible
from tests.samples.hostile_names import PIECES, names, unseen

ALL = "".join(PIECES)


class Page(HTMLParser):
    """The names of a page's tags, its text and the values of its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.values: list[str | None] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.values += [value for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@given(names)
@example(ALL)
def test_pages_show_the_visible_form(name: str) -> None:
    template = '<title>{{ name }}</title><p class="{{ name }}">{% for n in [name] %}{{ n }}{% endfor %}</p>'
    page = templates().from_string(template).render(name=name)
    assert unseen(page) == []
    read = Page(page)
    assert read.tags == ["title", "p"]
    assert read.values == [visible(name)]
    assert read.text == 2 * visible(name)


@given(names)
@example(ALL)
def test_charts_show_the_visible_form(name: str) -> None:
    chart = make_chart(name, {name: [(1.0, 2.0), (2.0, 1.0)], "other": [(1.0, 1.0)]})
    page = templates().get_template("chart.svg.j2").render(chart=chart)
    assert unseen(page, lines=True) == []
    read = Page(page)
    assert visible(name) in read.values
    assert visible(name) in read.text
    assert set(read.tags) <= {"svg", "line", "text", "circle", "polyline", "div", "span"}


def status(task: str) -> Status:
    return Status(
        step=1, steps=2, epoch=1, epochs=2, losses={task: 1.25, "b": 0.5}, learning_rate=0.4, tau=0.99, memory_gib=1.0,
        images_per_second=10.0, views_per_image=2, data_wait=0.0, seconds_left=1.0,
    )  # fmt: skip


@given(names)
@example("[/t]")
@example(ALL)
def test_the_console_shows_tasks(task: str) -> None:
    plain = Console(file=io.StringIO(), width=20)
    display = TrainingProgress(plain, steps=2, done=0)
    display.show(status(task))
    assert isinstance(plain.file, io.StringIO)
    assert f"loss {visible(task, 40)} 1.2500  b 0.5000" in plain.file.getvalue()
    assert unseen(plain.file.getvalue()) == ["\n"]
    wide = Console(file=io.StringIO(), width=300)
    wide.print(status(task).panel())
    assert isinstance(wide.file, io.StringIO)
    assert f"loss  {visible(task, 40)} 1.2500  b 0.5000" in wide.file.getvalue()


@settings(max_examples=20)
@given(names)
@example("[/t]\x1b[31m\n=1")
def test_csv_tables_of_tasks_are_continued(task: str) -> None:
    with TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch))
        for step in (1, 2):
            loggers = MetricLoggers(folder, RunOptions(log=("csv",)), first_step=step - 1)
            loggers.write(step, {f"train/{task}": -0.5, "train/lr": 0.1})
            loggers.close()
        with (folder.csv / "train.csv").open(newline="", encoding="utf-8") as file:
            text = file.read()
        assert unseen(text, lines=True) == []
        head, *rows = csv.reader(io.StringIO(text, newline=""))
        assert [*head[:1], *head[2:]] == ["step", "lr"]
        assert head[1].removeprefix("'") == visible(task, 10**6)
        assert rows == [["1", "-0.5", "0.1"], ["2", "-0.5", "0.1"]]


def test_tensorboard_has_the_visible_form(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = MetricLoggers(RunFolder(tmp_path), RunOptions(log=("tensorboard",)), first_step=0)
    loggers.write(1, {f"train/{task}": 1.0 for task in PIECES})
    loggers.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {visible(f"train/{task}") for task in PIECES}


def drawn(label: str, *, plainly: bool) -> np.ndarray:
    """Pixels of a legend with this label; `plainly` as this project's plots show names."""
    figure = Figure(figsize=(3, 1), dpi=60)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = axes.plot([0, 1])
    legend = axes.legend(lines, plain_labels([label]) if plainly else [label])
    if plainly:
        show_plainly(legend.get_texts(), [label])
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.filterwarnings("error")  # a character that the font lacks, a label that is left out
def test_plots_show_names_as_they_are() -> None:
    """Against matplotlib's own rule, which escapes a dollar sign."""
    escaped = drawn(r"a \$x^2\$", plainly=False)
    assert not np.array_equal(escaped, drawn("a $x^2$", plainly=False))
    assert np.array_equal(escaped, drawn("a $x^2$", plainly=True))
    assert np.array_equal(drawn("a\\n", plainly=False), drawn("a\n", plainly=True))
    assert np.array_equal(drawn(r"\u65e5", plainly=False), drawn("日", plainly=True))
    for name in ("_hidden", "$", ALL, *PIECES):
        drawn(name, plainly=True)


@pytest.mark.filterwarnings("error")
def test_pictures_of_hostile_names_are_drawn(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        lines.write({"kind": "train", "step": step, "loss": 1.0, **{f"loss/{task}": 1.0 for task in PIECES[:12]}})
    lines.close()
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")
    runs = [
        RunSummary(
            name=name, about=name, steps=2, curves={"loss": ([1, 2], [2.0, 1.0])}, results={name: (0.5, 0.4, 0.6)}
        )
        for name in ("_x", "$y^$", "\n", ALL)
    ]
    plot(runs, tmp_path / "compare.png")


@pytest.mark.parametrize("name", [*(piece for piece in PIECES if len(piece) < 100), ALL[:200]])
def test_loading_code_loads_the_file(name: str) -> None:
    code = "\n".join(loading_code("resnet18", name))
    assert unseen(code, lines=True) == []
    asked: list[str] = []

    class Timm:
        @staticmethod
        def create_model(architecture: str, *, num_classes: int, checkpoint_path: str) -> None:
            asked.append(checkpoint_path)

    exec(code.replace("import timm\n", ""), {"timm": Timm})
    assert asked == [name]


FILE, CLASS, TASK = "bad\n[red]\x1b[31m\u202e.jpg", "=1+1\x1b[31m[bold]", "[/t]\x1b[32m\n$x^2$=<script>"


NOTES = ALL[:90].replace("\0", "")


def test_a_whole_run_of_hostile_names(tiny_recipe: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Training, report, evaluation, comparison, features and conversion; then every text file that they wrote."""
    root = tmp_path / "[/d]\x1b[33m\n<b>"
    generator = np.random.default_rng(0)
    for name in (CLASS, "-b"):
        for number in range(8):
            path = root / "train" / name / f"{'-=' if number else '%s{}'}{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    (root / "train" / CLASS / FILE).write_bytes(b"\xff\xd8\xff broken")
    views = [replace(view, name=f"{view.name}[/v]\a", task=f"{TASK}{view.task}" if view.task else None)
             for view in tiny_recipe.views]  # fmt: skip
    recipe = replace(tiny_recipe, views=tuple(views), name="[/n]\x9b31m\n", epochs=1)
    write_json(tmp_path / "[/r]\n.json", to_dict(recipe))
    out = "_run[/o]\x1b[34m\n$z$"
    one = ["--device", "cpu", "--resize", "32", "--crop", "32"]
    commands = [
        lambda: train_cli.body(
            ["[/r]\n.json", "--data", str(root), "--out", out, "--device", "cpu", "--notes", NOTES,
             "--tags", "[/tag]\x1b[35m", "--log", "csv", "tensorboard"]),
        lambda: train_cli.body(["report", out]),
        lambda: train_cli.body(["doctor", "--data", str(root / "none")]),
        lambda: eval_cli.body(["knn", "--run", out, "--k", "3", *one]),
        lambda: eval_cli.body(["compare", out]),
        lambda: features_cli.body([str(root / "train"), "f.npy", "--run", out, *one]),
        lambda: convert(Convert(src=root, dst=Path("sh[/z]\x1b[36m"))),
    ]  # fmt: skip
    with chdir(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        for command in commands:
            command()
    printed = "".join(capfd.readouterr())
    assert unseen(printed, lines=True) == []
    for name in (FILE, CLASS, TASK, out, recipe.name):
        assert visible(name) in printed
    log = (tmp_path / out / "train.log").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in log)
    texts = [
        path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".log", ".csv", ".html", ".txt")
    ]
    assert {"train.log", "report.html", "train.csv", "f.csv", "config.json"} <= {path.name for path in texts}
    for path in texts:
        assert unseen(path.read_text(encoding="utf-8"), lines=True) == [], path
    page = Page((tmp_path / out / "report.html").read_text(encoding="utf-8"))
    assert {"script", "b"} & set(page.tags) == {"b"}  # tiles have bold numbers
    for name in (FILE, TASK, out, recipe.name):
        assert visible(name) in page.text
    with (tmp_path / "f.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shown = {visible(name) for name in (CLASS, "-b")}
    assert {row["class"].removeprefix("'") for row in rows} == shown
    assert all(row["class"].startswith("'") and row["key"].startswith("'") for row in rows)
    assert {os.path.dirname(row["key"].removeprefix("'")) for row in rows} == shown

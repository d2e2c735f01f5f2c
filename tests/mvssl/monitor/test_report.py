"""The report of a run."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvssl.cli import train as train_cli
from mvssl.config.recipe import Recipe
from mvssl.monitor.report import Curve, format_number, log_ticks, make_chart, render, templates, ticks
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_jsonl
from pipelines.runtime import InputError

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")


class Page(HTMLParser):
    """The tags of a page and its text; checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_a_finished_run_has_a_self_contained_report(finished: Path, tiny_recipe: Recipe) -> None:
    text = (finished / "report.html").read_text()
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object"}
    sources = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert sources
    assert all(value is not None and value.startswith("data:image/png;base64,") for value in sources)
    assert "url(" not in text
    rows = list(read_jsonl(finished / "metrics.jsonl"))
    last = [row for row in rows if row["kind"] == "train"][-1]
    knn = [row for row in rows if row["kind"] == "knn"][-1]
    for words in (
        f"{last['loss']:.4f}",
        f"{100 * knn['top1']:.2f} %",
        "Loss per task",
        "the bottleneck is",
        "timm.create_model",
        tiny_recipe.name,
        "epoch 3 of 3",
        f"torch {importlib.metadata.version('torch')}",
        "global_1",
    ):
        assert words in page.text, words
    assert {"global", "local", "cutout"} <= set(page.text.split())
    assert text.count("<svg") >= 7


def test_reports_of_unfinished_runs(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "<b>run</b>"
    shutil.copytree(finished, run, symlinks=True)
    for name in ("metrics.jsonl", "throughput.jsonl", "views.png", "train.log", "report.html", "summary.json"):
        (run / name).unlink()
    page = Page(render(RunFolder(run)))
    assert "Nothing has been logged yet." in page.text
    assert "<b>run</b>" in page.text  # as text, not as a tag
    (run / "failure.json").write_text('{"loss": "nan & more"}')
    assert train_cli.body(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "nan & more" in Page((tmp_path / "page.html").read_text()).text
    assert "page.html" in capsys.readouterr().out


def test_runs_from_before_summary_json_have_a_report(finished: Path, tmp_path: Path) -> None:
    """Everything but the bottleneck and the undecodable images, for which train.log is not searched."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    (run / "summary.json").unlink()
    page = Page(render(RunFolder(run)))
    assert "Loss per task" in page.text
    assert "the bottleneck is" not in page.text
    assert "Undecodable images" not in page.text


MEASURED = "resize 256 (bilinear), crop 224, target network, linear layer from zero"


def test_a_report_shows_notes_tags_evaluations_and_undecodable_images(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    config = json.loads((run / "config.json").read_text())
    config["options"] |= {"notes": "first & best", "tags": ["a<b"], "run_name": "mine"}
    del config["checksum"]
    (run / "config.json").write_text(json.dumps(config))
    summary = json.loads((run / "summary.json").read_text())
    assert "None." in Page(render(RunFolder(run))).text
    summary["bad_images"] = {f"<{n}>.jpg": "truncated" for n in range(60)}
    (run / "summary.json").write_text(json.dumps(summary))
    conditions = {"resize": 256, "crop": 224, "interpolation": "bilinear", "network": "target", "head_start": "zero"}
    result = {"evaluation": "linear", "network": "online", "identity": {}, "conditions": conditions}
    result["results"] = {"top1": 0.5, "top1_interval_95": [0.25, 0.75]}
    (run / "eval").mkdir()
    (run / "eval/linear-online.json").write_text(json.dumps(result))
    text = Page(render(RunFolder(run))).text
    for words in (
        "first & best",
        "a<b",
        "mine",
        "<49>.jpg: truncated",
        "60 images",
        "50.00 %",
        "25.0 to 75.0 %",
    ):
        assert words in text, words
    assert MEASURED in text
    assert "<50>.jpg" not in text
    (run / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"summary\.json is damaged .*: delete it"):
        render(RunFolder(run))


def test_folders_without_a_report(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run folder"):
        train_cli.body(["report", str(tmp_path)])
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    before = (run / "report.html").read_bytes()
    (run / "metrics.jsonl").write_text('{"kind": \n')
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged"):
        train_cli.body(["report", str(run)])
    assert (run / "report.html").read_bytes() == before
    with pytest.raises(InputError, match=r"must end in \.html"):
        train_cli.body(["report", str(run), "--out", str(tmp_path / "page.pdf")])


@pytest.mark.skipif(not BROWSER, reason="no headless browser here (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_readable_in_a_browser_in_light_and_dark_mode(finished: Path, tmp_path: Path, width: int) -> None:
    """The screenshots are in pytest's temporary folder."""
    seen = {}
    for mode, scheme in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{mode}-{width}.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},1600"]
        options += [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}"]
        page = (finished / "report.html").resolve().as_uri()
        subprocess.run([BROWSER, *options, page], check=True, capture_output=True, timeout=120)
        seen[mode] = np.asarray(Image.open(picture).convert("L"), dtype=np.float64)
    assert seen["light"].mean() > 180
    assert seen["dark"].mean() < 90
    for pixels in seen.values():
        assert pixels.std() > 5  # not empty
        assert np.ptp(pixels[:1000, -8:]) < 3  # nothing is cut off at the right edge


def svg(curves: Mapping[str, Curve]) -> str:
    return templates().get_template("chart.svg.j2").render(chart=make_chart("loss", curves))


def test_curves() -> None:
    drawn = svg({"a<b": [(1, 1.0), (2, 4.0), (3, 2.0)], "nan": [(1, math.nan), (2, 2.0)], "empty": []})
    page = Page(drawn)
    lines = [attributes["points"] for tag, attributes in page.tags if tag == "polyline"]
    (first, top, last), (single,) = (
        [tuple(map(float, point.split(","))) for point in (line or "").split()] for line in lines
    )
    assert first[0] < top[0] < last[0]
    assert top[1] < last[1] < first[1]  # y points down
    assert single[0] == top[0]
    assert "a<b" in page.text
    assert make_chart("none", {"none": []}) is None
    assert 300 < svg({"a": [(step, 1.0) for step in range(5000)]}).count(",") < 450


def test_logarithmic_curves_leave_zero_out() -> None:
    chart = make_chart("norm", {"norm": [(1, 0.0), (2, 0.1), (3, 10.0)]}, log=True)
    assert chart is not None
    assert len(chart.curves["norm"]) == 2
    assert [tick.label for tick in chart.y_ticks] == ["0.1", "1", "10"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (-5, 1234), (7, 7), (0, 0), (1e-6, 3e-6)])
def test_ticks_are_round_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 9
    assert found[0] <= low
    assert found[-1] >= high
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert float(f"{steps[0]:.0e}") == pytest.approx(steps[0])


def test_logarithmic_ticks() -> None:
    assert [format_number(10**tick) for tick in log_ticks(math.log10(0.45), math.log10(4))] == [
        "0.2",
        "0.5",
        "1",
        "2",
        "5",
    ]
    assert [format_number(10**tick) for tick in log_ticks(-2.5, 3.2)] == [
        "0.001",
        "0.01",
        "0.1",
        "1",
        "10",
        "100",
        "1000",
        "10k",
    ]
    assert log_ticks(0, 0)[0] == 0

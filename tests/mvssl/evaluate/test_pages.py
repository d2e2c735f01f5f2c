"""The pages of mvssl-eval: what they show against scikit-learn and the files, of any images, without network."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors

import mvssl.evaluate.pages.write as pages
from mvssl.cli import eval as eval_cli
from mvssl.cli import train as train_cli
from mvssl.config.evaluation import BackboneSource
from mvssl.config.recipe import Recipe
from mvssl.evaluate.features import extract_features
from mvssl.evaluate.pages import scatter_page
from mvssl.evaluate.pages.gallery import Gallery, evenly
from mvssl.evaluate.pages.neighbour_page import neighbour_page
from mvssl.evaluate.projection import Projection, pca
from mvssl.evaluate.session import Session
from mvssl.weights.load import load_backbone
from pipelines.names import visible
from pipelines.runtime import InputError
from pipelines.storage import open_source
from tests.samples.hostile_names import PIECES
from tests.samples.tiny_runs import train, write_images


class Page(HTMLParser):
    """The tags of a page in order, each with its attributes, and the text that follows it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        assert "http" not in page.replace("http-equiv", "")
        self.feed(page)
        self.close()
        for tag, values in self.tags:
            for name in ("src", "href", "data", "action"):
                assert values.get(name, "data:").startswith(("data:image/jpeg;base64,", "#", "data:"))
            assert tag not in ("link", "iframe", "object", "form")
            assert not any(name.startswith("on") for name in values)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if self.texts:
            self.texts[-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [values for name, values in self.tags if name == tag]

    def data(self) -> dict[str, Any]:
        """What the script of the map reads."""
        (place,) = [n for n, (_, values) in enumerate(self.tags) if values.get("id") == "data"]
        held: dict[str, Any] = json.loads(self.texts[place])
        return held

    def rows(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """Of the page of neighbours: key of each query, and kind and key of its neighbours."""
        found: list[tuple[str, list[tuple[str, str]]]] = []
        kind = ""
        for tag, values in self.tags:
            if values.get("class") == "pairs":
                break
            if values.get("class") == "query":
                found.append(("", []))
            elif tag == "li":
                kind = values["class"]
            elif tag == "img" and not found[-1][0]:
                found[-1] = (values["alt"], found[-1][1])
            elif tag == "img":
                found[-1][1].append((kind, values["alt"]))
        return found


def evaluate(*arguments: object) -> int:
    return eval_cli.body([str(argument) for argument in arguments])


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run."""
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_neighbours_are_those_of_the_features(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("neighbours", "--run", run, "--images", 5, "--k", 4) == 0
    assert f"Page: {run / 'neighbours.html'}" in capsys.readouterr().out
    rows = read(run / "neighbours.html").rows()
    loaded = load_backbone(BackboneSource(run=run))
    train_images, val = (open_source(images / split) for split in ("train", "val"))
    bank, queries = (
        extract_features(Session(device=torch.device("cpu")), loaded.backbone, source, loaded.evaluation).values.numpy()
        for source in (train_images, val)
    )
    _, nearest = NearestNeighbors(n_neighbors=4, metric="cosine").fit(bank).kneighbors(queries)
    at = evenly(12, 5).tolist()
    assert [key for key, _ in rows] == [val.key(n) for n in at]
    for (query, found), n in zip(rows, at, strict=True):
        assert [key for _, key in found] == [train_images.key(m) for m in nearest[n]]
        for kind, key in found:
            assert kind == ("right" if key.split("/")[0] == query.split("/")[0] else "wrong")
    report = (run / "report.html").read_text()
    assert 'href="neighbours.html"' in report
    assert f"mvssl-eval scatter --run {run}" in report


def test_the_map_has_the_thumbnail_and_place_of_every_image(run: Path, images: Path) -> None:
    assert evaluate("map", "--run", run, "--umap", "off") == 0
    page = read(run / "scatter.html")
    data, source = page.data(), open_source(images / "val")
    assert data["names"] == [source.key(n) for n in range(12)]
    assert [data["classes"][label] for label in data["labels"]] == [key.split("/")[0] for key in data["names"]]
    (sprite,) = [values["src"] for values in page.all("img") if values.get("id") == "sprite"]
    with Image.open(io.BytesIO(base64.b64decode(sprite.partition(",")[2]))) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=float)
    for n, name in enumerate(data["names"]):  # tests' images have the brightness of their class
        top, left = n // data["columns"] * data["tile"], n % data["columns"] * data["tile"]
        tile = pixels[top : top + data["tile"], left : left + data["tile"]]
        assert abs(tile.mean() - np.asarray(Image.open(images / "val" / name)).mean()) < 5
    loaded = load_backbone(BackboneSource(run=run))
    values = extract_features(Session(device=torch.device("cpu")), loaded.backbone, source, loaded.evaluation).values
    expected = pca(values / values.norm(dim=1, keepdim=True)).points
    points = np.array(data["projections"][0]["points"]) * [1, -1]  # y grows downwards on a screen
    scale = np.ptp(expected, axis=0).max() / np.ptp(points, axis=0).max()
    assert np.allclose((points - points.mean(axis=0)) * scale, expected - expected.mean(axis=0), atol=1e-3)


def test_attention_is_a_page_and_a_picture(run: Path) -> None:
    assert evaluate("attention", "--run", run, "--images", 3) == 0
    page = read(run / "attention.html")
    assert len(page.all("img")) == 6
    with Image.open(run / "attention.png") as picture:
        assert picture.height > 3 * 112
    untrained = ("--untrained", "--arch", "test_vit", "--crop", 64, "--resize", 64)
    data = run.parent / "vit"
    assert evaluate("attention", *untrained, "--data", open_source_path(run), "--out", data, "--images", 2) == 0
    page = read(data / "attention.html")
    assert len(page.all("img")) == 2 * (2 + 2)  # two heads
    assert "Attention maps" in "".join(page.texts)


def open_source_path(run: Path) -> str:
    held: dict[str, Any] = json.loads((run / "config.json").read_text())
    return str(held["options"]["data"])


@pytest.mark.parametrize("command", ["neighbours", "scatter", "attention"])
def test_any_images_will_do(command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unlabelled, greyscale and few, with names that a page could take for markup."""
    names = [piece for piece in PIECES if len(piece) < 100 and not {"/", "\0"} & set(piece) and piece != "."]
    odd = tmp_path / "odd"
    odd.mkdir()
    for n, name in enumerate([*names[:3], "<b>&amp;'\"", "<script>alert(1)<\u2215script>"]):
        Image.new("L", (40 + n, 50), 30 * n).save(odd / f"{name}.png")
    some = ("--umap", "off") if command == "scatter" else ()
    page = tmp_path / "new" / f"{command}.html"
    assert evaluate(command, "--run", run, "--data", odd, "--out", page, *some) == 0
    read(page)
    keys = {visible(path.name) for path in odd.iterdir()}
    found = read(page)
    if command == "scatter":
        assert set(found.data()["names"]) == keys
    else:
        assert keys <= {values.get("alt", "") for values in found.all("img")}
    shutil.rmtree(odd)
    odd.mkdir()
    Image.new("L", (40, 50), 90).save(odd / "only.png")
    capsys.readouterr()
    assert evaluate(command, "--run", run, "--data", odd, "--out", tmp_path / "one", *some) == 0
    read(tmp_path / "one" / f"{command}.html")


def test_damaged_images_are_left_out_and_counted(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    for n, path in enumerate([*sorted(images.rglob("*.jpg")), *sorted((images / "val").rglob("*.jpg"))]):
        (copy / f"{n:02d}.jpg").parent.mkdir(exist_ok=True)
        shutil.copy(path, copy / f"{n:02d}.jpg")
    (copy / "09.jpg").write_bytes(b"no image")
    for command, name in (("neighbors", "neighbours"), ("attention", "attention")):
        assert evaluate(command, "--run", run, "--data", copy, "--out", tmp_path / "out") == 0
        assert "09.jpg" not in {values.get("alt") for values in read(tmp_path / f"out/{name}.html").all("img")}
    text = "".join(read(tmp_path / "out/neighbours.html").texts)
    assert f"the 60 images of {copy} (1 that cannot be decoded left out)" in text
    assert "--max-images" not in capsys.readouterr().out


def test_a_misspelt_evaluation_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'scater' but must be one of .*: did you mean scatter\?"):
        evaluate("scater")


def test_large_sets_are_sampled_and_cached_features_are_used(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("neighbours", "--run", run, "--max-images", 10, "--images", 50) == 0
    shown = capsys.readouterr().out
    assert "10 of the 36 images" in shown
    assert "Computing 10 of 10 features" in shown
    page = read(run / "neighbours.html")
    assert "Compared with 10 of the 36 images" in "".join(page.texts)
    assert len(page.rows()) == 10
    assert evaluate("knn", "--run", run, "--k", 3) == 0
    capsys.readouterr()
    assert evaluate("neighbours", "--run", run, "--max-images", 10) == 0
    assert "Computing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("neighbours", "--k", "0"), "k is 0 but must be at least 1 and at most 50"),
        (("scatter", "--max-images", "50000"), "max_images is 50000 but must be at least 1 and at most 20,000"),
        (("attention", "--kind", "attention"), "kind is 'attention' but ResNet has no attention"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence(
    arguments: tuple[str, ...], words: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, InputError)) as stopped:
        evaluate(*arguments, "--run", finished, "--out", tmp_path / "out")
    said = f"{stopped.value} {capsys.readouterr().err}".replace("│", " ")
    assert words in " ".join(said.split())


def gallery(count: int, width: int = 8, *, classes: int = 0, noise: bool = False) -> Gallery:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, classes), width))
    labels = np.arange(count) % max(1, classes)

    def thumbnail(row: int) -> Image.Image:
        if noise:
            return Image.fromarray(np.random.default_rng(row).integers(0, 256, (112, 112, 3), dtype=np.uint8))
        return Image.new("RGB", (112, 112), (row % 256, 0, 0))

    return Gallery(
        features=torch.from_numpy(centres[labels] + 0.3 * rng.normal(size=(count, width))),
        keys=tuple(f"image {n}" for n in range(count)),
        classes=tuple(f"class {label}" if classes else "" for label in labels),
        thumbnail=thumbnail,
        total=count,
        where="somewhere",
    )


def test_wrong_labels_duplicates_and_outliers_are_found() -> None:
    some = gallery(60, classes=3)
    features = some.features.clone()
    features[10] = 2 * features[25]  # of another size, in the same direction
    features[40] = -features[:3].mean(dim=0)
    wrong = list(some.classes)
    wrong[7] = "class 0" if wrong[7] != "class 0" else "class 1"
    page = neighbour_page(
        Gallery(features=features, keys=some.keys, classes=tuple(wrong), thumbnail=some.thumbnail, total=60, where="x"),
        about=["about"],
        images=2,
    )
    part = dict(zip(re.findall(r"<h2>([^<]*)</h2>", page), page.split("<h2>")[1:], strict=True))
    assert 'alt="image 7"' in part["Contradicted by their neighbours"].split('class="near"')[0]
    pair = re.findall(r'alt="([^"]*)"', part["Most similar pairs"])[:2]
    assert set(pair) == {"image 10", "image 25"}
    assert 'alt="image 40"' in part["Far from all others"].split('class="near"')[0]


def test_the_size_of_a_map_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter_page, "SPRITE_BYTES", 200_000)
    some = gallery(1500, noise=True)  # noise is what JPEG is worst at
    page = scatter_page.scatter_page(
        some, {"PCA": Projection(points=np.random.default_rng(0).normal(size=(1500, 2)))}, about=[]
    )
    assert len(page) < 200_000 * 4 / 3 + 150_000
    assert Page(page).data()["tile"] < 96


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_of_the_map_is_javascript(tmp_path: Path) -> None:
    script = Path(scatter_page.__file__).with_name("scatter.js")
    subprocess.run(["node", "--check", str(script)], check=True)
    assert not re.search(r"\{\{|\{%|\{#", script.read_text())  # which Jinja would read


def test_a_run_ends_with_its_pages(
    images: Path,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pages, "TRAINED_PER_SHOWN", 2)

    def broken(*_: Any, **__: Any) -> str:
        raise ZeroDivisionError("no map today")

    monkeypatch.setattr(pages, "scatter_page", broken)
    out = tmp_path / "a run"
    assert train(tiny_recipe, images, out).steps == 12
    assert "scatter.html could not be written: no map today" in capsys.readouterr().out
    assert not (out / "scatter.html").exists()
    assert "the 36 images of" in "".join(read(out / "neighbours.html").texts)
    assert len(read(out / "attention.html").all("img")) == 16
    assert base64.b64encode((out / "views.png").read_bytes()).decode() in (out / "report.html").read_text()
    elsewhere = tmp_path / "reports" / "r.html"
    elsewhere.parent.mkdir()
    assert train_cli.body(["report", str(out), "--out", str(elsewhere)]) == 0
    links = re.findall(r'<a href="([^"#]*)"', elsewhere.read_text())
    assert [(elsewhere.parent / unquote(link)).resolve().name for link in links] == [
        "neighbours.html",
        "attention.html",
    ]
    assert all((elsewhere.parent / unquote(link)).exists() for link in links)
    assert "mvssl-eval scatter --run" in elsewhere.read_text()


def test_a_short_run_has_no_pages(finished: Path) -> None:
    assert not list(finished.glob("neighbours.*")) + list(finished.glob("attention.*"))


def test_labels_by_name_need_no_common_numbers(run: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "other", classes=2, per_class=2, seed=5)
    (tmp_path / "other/class_1").rename(tmp_path / "other/unknown")
    assert evaluate("neighbours", "--run", run, "--val", tmp_path / "other") == 0
    kinds = {query.split("/")[0]: {kind for kind, _ in near} for query, near in read(run / "neighbours.html").rows()}
    assert kinds["unknown"] == {"wrong"}
    assert kinds["class_0"] <= {"right", "wrong"}

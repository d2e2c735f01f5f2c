"""The contact sheet shows the source, the crop boxes and the views it was given."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import mvssl
from mvssl.config.serialize import to_dict
from pipelines import DecodedBatch, InputError, ViewEngine, ViewSpec, draw
from pipelines.view_sheet import Options, run
from pipelines.views.sheet import _applied, view_sheet


def test_sheet_shows_views_and_boxes() -> None:
    image = np.zeros((120, 180, 3), dtype=np.uint8)
    image[:] = (10, 200, 30)
    batch = DecodedBatch.from_images([image, image[:, :60], image[:3]], index=[0, 1, 2])
    specs = [
        ViewSpec(name="one", task="t", size=32, is_target=True, flip=0, jitter_p=0, grayscale=0, blur=0),
        ViewSpec(name="two", task=None, size=16, is_target=True, flip=0, jitter_p=0, grayscale=0, blur=0),
    ]
    params = draw(specs, batch.sizes, seed=0, epoch=0, index=batch.index)
    sheet = np.array(view_sheet(batch, specs, params, ViewEngine(specs, dtype=torch.bfloat16)(batch, params)))

    def count(colour: tuple[int, ...]) -> int:
        return int((np.abs(sheet.astype(int) - colour).max(axis=-1) <= 2).sum())

    assert count((10, 200, 30)) > 3 * (176**2 + 88**2)  # three rows of both views, and the sources
    for colour in ("#d1495b", "#00798c"):
        assert count(ImageColor.getrgb(colour)) > 500  # frames and badges of both views' crops


def test_captions_say_how_a_view_is_turned() -> None:
    spec = ViewSpec(name="a", task="t", flip=1.0, vertical_flip=1.0, quarter_turns=1.0, rotate=(-20, -20), size=32)
    params = draw([spec], [[50, 50]] * 30, seed=0, epoch=0, index=range(30))
    for n, turns in enumerate(params.quarter_turns[0].tolist()):
        words = ["flip", "vertical flip", *([f"turn {90 * turns}°"] if turns else []), "rotate -20°"]
        assert _applied(params.view(0), n)[: len(words)] == words


def test_command_writes_a_picture_or_says_why_not(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for n in range(3):
        Image.new("RGB", (50 + n, 40), (n * 80, 100, 20)).save(data / f"{n}.jpg")
    out = tmp_path / "sheet.png"
    command = [sys.executable, "-m", "pipelines.view_sheet", str(data), str(out), "--size", "64", "--local-size", "32"]
    root = Path(__file__).parents[3]

    done = subprocess.run([*command, "--num-images", "3"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as picture:
        assert picture.width > 900

    with pytest.raises(InputError, match=r"num_images is 4 but .* has only 3 images"):
        run(Options(data=data, out=out, num_images=4))
    for path in data.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match="None of the 3 chosen images"):
        run(Options(data=data, out=out, num_images=3))


def test_the_views_of_any_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the JSON that mvssl-train --print-config writes, as a file or on standard input."""
    data, out, views = tmp_path / "data", tmp_path / "sheet.png", tmp_path / "recipe.json"
    data.mkdir()
    Image.new("RGB", (50, 40), (200, 100, 20)).save(data / "a.jpg")
    recipe = mvssl.recipes.byol_resnet50_200ep()
    quarter = ViewSpec(name="quarter", task="quarter", size=112, area=(0.05, 0.25), blur=0.0)
    text = json.dumps(to_dict(dataclasses.replace(recipe, views=(*recipe.views, quarter))))
    views.write_text(text)
    run(Options(data=data, out=out, num_images=1, views=views))
    with Image.open(out) as picture:
        from_file = picture.tobytes()
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    run(Options(data=data, out=out, num_images=1, views=Path("-")))
    with Image.open(out) as picture:
        assert picture.tobytes() == from_file
    run(Options(data=data, out=out, num_images=1))
    with Image.open(out) as picture:
        assert picture.tobytes() != from_file  # the paper's five views

    for broken, words in (
        ("{", "cannot be read as JSON"),
        ("{}", "has no list of views"),
        ('{"views": [{"name": "a", "task": "t", "sise": 8}]}', "unknown field 'sise'"),
        ('{"views": [{"name": "a"}]}', "is no view"),
        ('{"views": [{"name": "a", "task": "t", "size": 9}]}', r"ViewSpec\('a'\).size is 9"),
    ):
        views.write_text(broken)
        with pytest.raises(InputError, match=words):
            run(Options(data=data, out=out, num_images=1, views=views))


@pytest.mark.parametrize("count", [1, 9])
def test_any_number_of_views(count: int) -> None:
    specs = [ViewSpec(name=f"v{i}", task="t", size=8, blur=0, is_target=True) for i in range(count)]
    batch = DecodedBatch.from_images([torch.zeros((1, 1, 3), dtype=torch.uint8)], index=[0])
    params = draw(specs, batch.sizes, seed=0, epoch=0, index=[0])
    sheet = view_sheet(batch, specs, params, ViewEngine(specs)(batch, params))
    assert sheet.width > 300 + count * 96

"""What README.md says is true: its links lead somewhere, its commands parse, its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from PIL import Image

import pipelines
from mvssl.cli import train as train_cli
from mvssl.recipes import PUBLISHED, all_recipes
from pipelines.conversion.command import Convert

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    page: (ROOT / page).read_text()
    for page in (
        "README.md",
        ".github/CONTRIBUTING.md",
        "pipelines/README.md",
        "pipelines/views/README.md",
        "mvssl/training/README.md",
        "mvssl/runs/README.md",
        "mvssl/evaluate/README.md",
        "mvssl/recipes/README.md",
        "mvssl/methods/README.md",
        "tools/README.md",
    )
}
TEXT, RECIPES = PAGES["README.md"], PAGES["mvssl/recipes/README.md"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


PYTHON = blocks("README.md", "python")
COMMANDS = [
    (page, line)
    for page in PAGES
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if not link.startswith("http")]
    for link in links:
        file, _, heading = link.partition("#")
        target = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert target.exists(), link
        headings = (
            [line.lstrip("# ").lower().replace(" ", "-") for line in target.read_text().splitlines()] if heading else []
        )
        assert not heading or heading in headings, link


@pytest.mark.parametrize("page", PAGES)
def test_files_and_modules_that_are_named_exist(page: str) -> None:
    named = set(re.findall(r"`((?:pipelines|mvssl|tools|benchmarks|tests)/[\w/.]*)`", PAGES[page]))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme_leads_to_every_page() -> None:
    assert [page for page in PAGES if page != "README.md" and f"]({page}" not in TEXT] == []


def test_no_placeholder_is_left() -> None:
    text = "\n".join(PAGES.values())
    assert re.findall(r"^[A-Z_]{6,}$|TODO|[A-Z]+_(?:TIME|OUTPUT|TABLE)", text, flags=re.MULTILINE) == []


def test_every_recipe_is_in_the_table() -> None:
    assert [name for name in all_recipes() if f"| `{name}` |" not in RECIPES] == []


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, line in COMMANDS if "mvssl-train " in line])
def test_training_commands_parse(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, owner in (("mine.toml", "mvssl/recipes/README.md"), ("texture.toml", "pipelines/views/README.md")):
        Path(name).write_text(*blocks(owner, "toml"))
    words = shlex.split(line, comments=True)  # perhaps behind torchrun, perhaps before a pipe
    arguments = words[words.index("mvssl-train") + 1 :]
    if arguments[0] in ("doctor", "--list", "report", "runs"):
        return
    end = next((place for place, word in enumerate(arguments) if word in ("|", ">")), len(arguments))
    if arguments[0].startswith("-"):  # no recipe: one is fitted to the images
        images = Path(arguments[arguments.index("--data") + 1])
        images.mkdir()
        Image.new("RGB", (64, 48)).save(images / "1.png")
    parsed = train_cli.parse(arguments[:end])
    if not parsed.print_config:
        assert parsed.options.data is not None
        assert parsed.dry_run or parsed.options.out is not None


def test_conversion_commands_parse() -> None:
    """Those in bash blocks and those in the table of sources."""
    lines = [line for _, line in COMMANDS if line.startswith("mvssl-convert ")]
    lines += re.findall(r"\| `(mvssl-convert [^`]+)` \|", PAGES["pipelines/README.md"])
    parsed = [tyro.cli(Convert, args=shlex.split(line, comments=True)[1:]) for line in lines]
    assert {config.format for config in parsed} == {"shards", "beton"}


def test_the_view_example_runs() -> None:
    example = next(block for block in PYTHON if "DecodedBatch" in block)
    images = [np.zeros((30 + n, 50, 3), dtype=np.uint8) for n in range(3)]
    names: dict[str, Any] = {"images": images}
    exec(example, names)
    shapes = [tuple(view.shape) for view in names["views"]]
    assert shapes == [(3, 3, 224, 224), (3, 3, 224, 224), (3, 3, 96, 96), (3, 3, 96, 96), (3, 3, 224, 224)]


def test_every_preset_of_views_is_named() -> None:
    presets = [name for name in pipelines.__all__ if name.endswith("_views")]
    assert len(presets) == 10
    assert [name for name in presets if f"`{name}`" not in PAGES["pipelines/views/README.md"]] == []


def test_published_numbers_are_those_of_the_recipes() -> None:
    for name in all_recipes():
        number = f"{PUBLISHED[name]:g} %" if name in PUBLISHED else ""
        row = next(line for line in RECIPES.splitlines() if line.startswith(f"| `{name}` |"))
        assert (f"| {number} [paper] |" in row) if number else ("[paper]" not in row)
        assert f"| `{name}` |" not in TEXT or f"| {number} |" in next(
            r for r in TEXT.splitlines() if f"| `{name}` |" in r
        )

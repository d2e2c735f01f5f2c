"""What README.md says is true: its links lead somewhere, its commands parse, its Python runs."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

import mvssl
import pipelines
from mvssl.cli import train as train_cli
from mvssl.cli.help import published
from mvssl.recipes import all_recipes
from pipelines.views.spec import ViewSpec, tasks
from tools.convert import Convert

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)).replace("\\\n", " ")
TOML = re.findall(r"```toml\n(.*?)```", TEXT, flags=re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_files_and_modules_that_are_named_exist() -> None:
    named = set(re.findall(r"`((?:pipelines|mvssl|tools|benchmarks|tests)/[\w/.]*)`", TEXT))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_no_placeholder_is_left() -> None:
    assert re.findall(r"^[A-Z_]{6,}$|TODO|[A-Z]+_(?:TIME|OUTPUT|TABLE)", TEXT, flags=re.MULTILINE) == []


def test_every_recipe_is_in_the_table() -> None:
    assert [name for name in all_recipes() if f"| `{name}` |" not in TEXT] == []


@pytest.mark.parametrize("line", [line for line in BASH.splitlines() if "mvssl-train " in line])
def test_training_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quarter.toml").write_text(TOML[0])
    words = shlex.split(line, comments=True)  # perhaps behind torchrun, perhaps before a pipe
    arguments = words[words.index("mvssl-train") + 1 :]
    parsed = train_cli.parse(arguments[: arguments.index("|")] if "|" in arguments else arguments)
    if not parsed.print_config:
        assert parsed.options.data is not None
        assert parsed.dry_run or parsed.options.out is not None


def test_conversion_commands_parse() -> None:
    """Those in bash blocks and those in the table of sources."""
    lines = [line for line in BASH.splitlines() if line.startswith("mvssl-convert ")]
    lines += re.findall(r"\| `(mvssl-convert [^`]+)` \|", TEXT)
    parsed = [tyro.cli(Convert, args=shlex.split(line, comments=True)[1:]) for line in lines]
    assert {config.format for config in parsed} == {"shards", "beton"}


def test_the_view_example_runs() -> None:
    example = next(block for block in PYTHON if "DecodedBatch" in block)
    images = [np.zeros((30 + n, 50, 3), dtype=np.uint8) for n in range(3)]
    names: dict[str, Any] = {"images": images}
    exec(example, names)
    shapes = [tuple(view.shape) for view in names["views"]]
    assert shapes == [(3, 3, 224, 224), (3, 3, 224, 224), (3, 3, 96, 96), (3, 3, 96, 96), (3, 3, 224, 224)]


def test_the_view_type_example_makes_a_fourth_task() -> None:
    example = next(block for block in PYTHON if "quarter" in block)
    names: dict[str, object] = {
        "ViewSpec": ViewSpec,
        "dataclasses": dataclasses,
        "recipe": mvssl.recipes.byol_resnet50_200ep(),
    }
    exec(example, names)
    recipe = names["recipe"]
    assert isinstance(recipe, mvssl.Recipe)
    assert tasks(recipe.views) == ("global", "local", "cutout", "quarter")


def test_the_view_type_example_in_toml_is_the_one_in_python(tmp_path: Path) -> None:
    example = next(block for block in PYTHON if "quarter" in block)
    base = mvssl.recipes.byol_resnet50_200ep()
    names: dict[str, Any] = {"ViewSpec": ViewSpec, "dataclasses": dataclasses, "recipe": base}
    exec(example, names)
    path = tmp_path / "quarter.toml"
    path.write_text(TOML[0])
    assert mvssl.load_recipe(path) == dataclasses.replace(names["recipe"], task_weights={"quarter": 0.5})


def test_every_preset_of_views_is_named() -> None:
    presets = [name for name in pipelines.__all__ if name.endswith("_views")]
    assert len(presets) == 7
    assert [name for name in presets if f"`{name}`" not in TEXT] == []


def test_published_numbers_are_those_of_the_recipes() -> None:
    for name, make in all_recipes().items():
        number = published(make.__doc__ or "")
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| `{name}` |"))
        assert (f"| {number} [paper] |" in row) if number else ("[paper]" not in row)

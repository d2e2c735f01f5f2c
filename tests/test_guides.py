"""What the guides say is true: their commands are run where that takes seconds, and parsed where it would take days."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tyro

import mvssl
import mvssl.methods
from mvssl.cli import train as train_cli
from mvssl.cli.evaluations import CompareArguments, KnnArguments, LinearArguments
from mvssl.config.recipe import Recipe
from mvssl.recipes import all_recipes
from pipelines.conversion.command import Convert
from pipelines.views.spec import tasks

ROOT = Path(__file__).resolve().parent.parent


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / guide).read_text(), flags=re.DOTALL)


def lines(guide: str) -> list[str]:
    text = "\n".join(blocks(guide, "bash")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def run_bash(text: str, folder: Path) -> str:
    """Run a block of a guide as a reader would who has installed the project; gives what it printed."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "2",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_first_hour(tmp_path: Path) -> None:
    for block in blocks("tools/README.md", "bash"):
        run_bash(block, tmp_path)
    for name in (
        "runs/first/report.html",
        "runs/first/views.png",
        "runs/first/eval/knn-untrained.json",
        "runs/first/eval/linear-fast-online.json",
        "runs/first/eval/neighbours-online.png",
        "sheet.png",
        "both.png",
        "features.npy",
        "features.csv",
        "backbone.safetensors",
        "backbone.pt2",
    ):
        assert (tmp_path / name).stat().st_size > 0, name


def test_the_papers_commands_parse(tmp_path: Path) -> None:
    seen = set()
    for line in lines("mvssl/recipes/README.md"):
        words = shlex.split(line)
        if words[0] == "torchrun":
            words = words[words.index("--no-python") + 1 :]
        seen.add(words[0])
        if words[0] == "mvssl-convert":
            assert tyro.cli(Convert, args=words[1:]).dst.parent == Path("imagenet")
        elif words[0] == "mvssl-train":
            continue  # parsed by the tests of README
        elif words[:2] == ["mvssl-eval", "linear"]:
            assert tyro.cli(LinearArguments, args=words[2:]).protocol == "release"
        elif words[:2] == ["mvssl-eval", "knn"]:
            assert tyro.cli(KnnArguments, args=words[2:]).source.untrained
        elif words[:2] == ["mvssl-eval", "compare"]:
            assert len(tyro.cli(CompareArguments, args=words[2:]).runs) == 2
        else:
            raise AssertionError(f"nothing tests {line}")
    assert seen == {"mvssl-convert", "mvssl-train", "mvssl-eval"}
    (tmp_path / "mine.toml").write_text(*blocks("mvssl/recipes/README.md", "toml"))
    recipe = mvssl.load_recipe(tmp_path / "mine.toml")
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer.warmup_epochs) == (100, 512, 5)
    named = set(
        re.findall(r"\b(?:byol|simsiam|mocov3)_resnet50_200ep\w*", (ROOT / "mvssl/recipes/README.md").read_text())
    )
    assert named <= set(all_recipes())
    assert len(named) >= 5


def test_the_method_of_the_guide_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("mvssl/methods/README.md", "python")
    (tmp_path / "smooth.py").write_text(code)
    monkeypatch.setattr(mvssl.methods, "__path__", [*mvssl.methods.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        method = mvssl.methods.get_method("smooth")
        recipe = train_cli.parse(["demo", "--method", "smooth"]).recipe
        z, t = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.randn(6, 5, dtype=torch.float64)
        loss = method.make_loss(recipe)(z, t)
        loss.backward()
        difference = (F.normalize(z) - F.normalize(t)).abs()
        expected = torch.where(difference < 0.1, difference**2 / 0.2, difference - 0.05).mean()
        torch.testing.assert_close(loss, expected)
        assert z.grad is not None
        assert z.grad.abs().max() > 0
    finally:
        sys.modules.pop("mvssl.methods.smooth", None)


def test_the_view_type_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in blocks("pipelines/views/README.md", "python"):
        exec(code, names)
    recipe = names["recipe"]
    assert isinstance(recipe, Recipe)
    assert tasks(recipe.views) == ("global", "local", "cutout", "texture")
    Path("texture.toml").write_text(*blocks("pipelines/views/README.md", "toml"))
    assert mvssl.load_recipe("texture.toml") == recipe, "the TOML file says what the Python says"
    run_bash("python -m tools.make_demo_dataset photos --num-train 8 --num-val 4 --classes 2", tmp_path)
    for block in blocks("pipelines/views/README.md", "bash"):
        run_bash(block, tmp_path)
    assert (tmp_path / "texture.png").stat().st_size > 0

"""Another project's `pipelines` is noticed by the first import of mvssl; other folders of a user do not disturb it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mvssl
import pipelines  # noqa: F401  (loaded, as for whoever imports mvssl after it)
from mvssl.own_pipelines import other_pipelines

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a folder, which Python looks in first, as a script or PYTHONPATH=. makes it do."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def theirs(folder: Path, kind: str) -> Path:
    """Another project's `pipelines`; gives its path."""
    if kind == "module":
        (folder / "pipelines.py").write_text("")
        return folder / "pipelines.py"
    (folder / "pipelines").mkdir()
    (folder / "pipelines" / "__init__.py").write_text("")
    (folder / "pipelines" / "runtime.py").write_text("InputError = None\n")
    return folder / "pipelines"


@pytest.mark.parametrize("kind", ["package", "module"])
@pytest.mark.parametrize("code", ["import mvssl", "import mvssl.cli.train", "import pipelines, mvssl"])
def test_another_pipelines_is_named_in_one_sentence(code: str, kind: str, tmp_path: Path) -> None:
    found = theirs(tmp_path, kind)
    done = python(code, tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: the package pipelines is {found} but must be {ROOT / 'pipelines'}")
    assert "rename yours" in last


@pytest.mark.parametrize("command", ["train", "eval", "features", "export", "convert"])
def test_a_command_says_so_without_a_traceback(command: str, tmp_path: Path) -> None:
    found = theirs(tmp_path, "package")
    script = (
        f"import sys\nsys.argv = ['/bin/mvssl-{command}', '--help']\nfrom mvssl.cli.{command} import main\nmain()\n"
    )
    done = python(script, tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: the package pipelines is {found} but must be ")
    assert done.stderr.count("\n") == 1


def test_a_missing_pipelines_is_no_pipelines_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert other_pipelines() is None
    monkeypatch.delitem(sys.modules, "pipelines")
    assert other_pipelines() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert other_pipelines() == "missing"


def test_folders_of_a_user_with_other_names_do_not_collide(tmp_path: Path) -> None:
    for name in ("tools", "tests", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text("")
        (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / "pipelines").mkdir()  # without __init__.py any package of that name goes before it
    done = python("import mvssl, tools.mine, tests.mine, benchmarks.mine; print(mvssl.recipes.demo().name)", tmp_path)
    assert (done.stdout, done.returncode) == ("demo\n", 0), done.stderr


def test_the_public_names_are_imported_when_they_are_used(tmp_path: Path) -> None:
    check = "import sys, mvssl\nassert 'torch' not in sys.modules\nfrom mvssl import *\n"
    done = python(f"{check}print(*(name for name in mvssl.__all__ if name in globals()))", tmp_path)
    assert done.stdout.split() == mvssl.__all__, done.stderr
    assert mvssl.evaluate.__name__ == "mvssl.evaluate"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mvssl.nothing

"""The wheel and the sdist that `python -m build` makes, installed in a fresh environment, used far from the clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.samples.beton_samples import write_jpegs

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = sorted(PROJECT["scripts"])


def run(*command: str | Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@dataclass(frozen=True, kw_only=True)
class Built:
    wheel: Path
    sdist: Path
    folder: Path
    python: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both files, built from what git would commit, and an environment with the wheel and nothing else of ours."""
    base = tmp_path_factory.mktemp("distributions")
    clone, out = base / "clone", base / "dist"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    # Without isolation: the build's one requirement, setuptools, is installed, and a test needs no network.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, folder=clone)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    venv.create(base / "env", with_pip=True)
    python = base / "env/bin/python"
    # The libraries of the environment that runs the tests; its own mvssl is a .pth file, which is not read from there.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", folder=base).stdout.strip()
    Path(site, "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel, folder=base)
    return Built(wheel=wheel, sdist=sdist, folder=base, python=python)


def test_the_wheel_has_all_files_that_are_used_and_no_others(built: Built) -> None:
    wheel = set(zipfile.ZipFile(built.wheel).namelist())
    ours = {
        str(path.relative_to(ROOT))
        for package in ("mvssl", "pipelines")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".md" and "__pycache__" not in path.parts
    }
    assert ours >= {"mvssl/monitor/report.html.j2", "pipelines/views/native/views.c", "pipelines/on_threads.h"}
    assert {name for name in wheel if ".dist-info/" not in name} == ours
    assert any(name.endswith("licenses/.github/LICENSE") for name in wheel)


def test_the_metadata_are_those_of_the_project(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        metadata = message_from_bytes(wheel.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("mvssl", PROJECT["version"])
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert set(metadata.get_all("Provides-Extra") or []) == PROJECT["optional-dependencies"].keys()
    needed = {Requirement(text).name for text in metadata.get_all("Requires-Dist") or [] if "extra ==" not in text}
    assert needed == {Requirement(text).name for text in PROJECT["dependencies"]}
    assert str(metadata.get_payload()).startswith("# mvssl")


def test_the_sdist_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert {"pyproject.toml", "README.md", "mvssl", "pipelines"} <= {path.name for path in source.iterdir()}
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "again", folder=source)
    (again,) = (tmp_path / "again").glob("*.whl")
    with zipfile.ZipFile(again) as second, zipfile.ZipFile(built.wheel) as first:
        contents = [{n: f.read(n) for n in f.namelist() if not n.endswith("RECORD")} for f in (first, second)]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_there_with_its_version_and_help(command: str, built: Built) -> None:
    program = built.folder / "env/bin" / command
    assert run(program, "--version", folder=built.folder).stdout == f"mvssl {PROJECT['version']}\n"
    assert f"usage: {command}" in run(program, "--help", folder=built.folder, NO_COLOR="1").stdout


def test_the_installed_package_converts_and_trains(built: Built, tmp_path: Path) -> None:
    """So its C sources, templates and recipes are found where pip put them."""
    write_jpegs(tmp_path / "photos", count=8)
    bin_ = built.folder / "env/bin"
    where = run(
        built.python, "-c", "import mvssl, pipelines; print(mvssl.__file__, pipelines.__file__)", folder=tmp_path
    )
    assert all(str(built.folder) in path for path in where.stdout.split())
    run(bin_ / "mvssl-convert", "photos", "shards", folder=tmp_path)
    done = run(
        *(bin_ / "mvssl-train", "demo", "--data", "shards", "--out", "run", "--epochs", "1", "--batch-size", "4"),
        *("--evaluation.k", "3"),
        folder=tmp_path,
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        OMP_NUM_THREADS="1",
    )
    assert "done: 2 steps" in done.stdout
    assert (tmp_path / "run/report.html").is_file()


def test_the_extras_are_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    extras = set(PROJECT["optional-dependencies"]) - {"test"}
    assert set(re.findall(r"^\| `\[(\w+)\]` \|", readme, flags=re.MULTILINE)) == extras

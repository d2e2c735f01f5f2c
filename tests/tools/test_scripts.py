"""The shell scripts, run on a copy of the repository with a fake environment, so that nothing is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runtime import InputError
from tools.demo_summary import FILES, summary

ROOT = Path(__file__).resolve().parent.parent.parent
BASH = shutil.which("bash") or "/bin/bash"
# All that the scripts may use: coreutils and sed.
COMMANDS = ["bash", "cat", "cp", "cut", "dirname", "env", "id", "ls", "mkdir", "mktemp", "rm", "sed", "sleep", "tail"]
COMMANDS += ["timeout", "touch"]

# A fake ENV/bin/python: records its arguments, exits as the files beside it say, else runs the real interpreter.
FAKE_PYTHON = """#!{bash}
here="$(dirname "$0")"
printf '%s\\n' "$*" >>"$here/calls"
case "$*" in
    *"-m pip --version"*) exit 0 ;;
    "-") exit "$(cat "$here/ffcv-exit" 2>/dev/null || echo 0)" ;;
    *"import torch"*) exit 0 ;;
    *"import ffcv"*) exit 0 ;;
    *"-m pip install"*) echo "the last line of pip"; exit "$(cat "$here/pip-exit" 2>/dev/null || echo 0)" ;;
    *"-m ruff check"*) exit 0 ;;
    *"-m ruff format"*) exit 0 ;;
    *"-m mypy"*) exit "$(cat "$here/mypy-exit" 2>/dev/null || echo 0)" ;;
    *"-m pytest"*) echo "== 3 passed in 0.01s =="; exit "$(cat "$here/pytest-exit" 2>/dev/null || echo 0)" ;;
    *"-m tools.make_demo_dataset"*) mkdir -p "$3/train/a" "$3/train/b"; exit 0 ;;
    *"-m venv --clear"*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; exit 0 ;;
    *"import ensurepip"*) exit "$(cat "$here/ensurepip-exit" 2>/dev/null || echo 0)" ;;
esac
exec {python} "$@"
"""


class Tree:
    """A copy of the scripts in a folder with a space, a fake environment and a minimal PATH."""

    def __init__(self, base: Path) -> None:
        self.root = base / "my repo"
        self.env = base / "an env"
        self.bare = base / "bare"
        self.elsewhere = base / "elsewhere"
        for folder in (self.root / ".ci", self.env / "bin", self.bare, self.elsewhere):
            folder.mkdir(parents=True)
        shutil.copytree(ROOT / "tools", self.root / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "pipelines").symlink_to(ROOT / "pipelines")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        shutil.copy(ROOT / ".ci" / "run", self.root / ".ci")
        for command in COMMANDS:
            found = shutil.which(command)
            assert found is not None, command
            (self.bare / command).symlink_to(found)
        self.script(self.env / "bin" / "python", FAKE_PYTHON.format(bash=BASH, python=f"'{sys.executable}'"))

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def bash(self, command: str, *, env: Path | None) -> subprocess.CompletedProcess[str]:
        """Run a command from another folder; `env` is the active environment."""
        variables = {"PATH": str(self.bare), "HOME": str(self.elsewhere), "TMPDIR": str(self.elsewhere)}
        if env is not None:
            variables["VIRTUAL_ENV"] = str(env)
        return subprocess.run(
            [BASH, "-c", command],
            env=variables,
            cwd=self.elsewhere,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        quoted = " ".join(f"'{argument}'" for argument in (str(self.root / script), *arguments))
        return self.bash(f"exec {quoted}", env=self.env)

    def setup(self, env: Path | None, extras: str = "test") -> subprocess.CompletedProcess[str]:
        return self.bash(
            f"set -euo pipefail; . '{self.root}/tools/setup_env.sh'; setup_env {extras}; echo \"PYTHON=$PYTHON\"",
            env=env,
        )

    def calls(self, what: str) -> list[str]:
        return [line for line in (self.env / "bin" / "calls").read_text().splitlines() if what in line]

    def say(self, name: str, code: int) -> None:
        (self.env / "bin" / name).write_text(str(code))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.parametrize("script", ["tools/demo.sh", "tools/test.sh", "tools/install_ffcv.sh", ".ci/run"])
def test_script_can_be_started(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert (ROOT / script).read_text().startswith("#!/usr/bin/env bash\n")


def test_setup_installs_once_and_again_after_a_change(tree: Tree) -> None:
    first = tree.setup(tree.env)
    assert first.returncode == 0, first.stderr
    assert f"PYTHON={tree.env}/bin/python" in first.stdout
    assert len(tree.calls("-m pip install")) == 1
    assert tree.calls("-m pip install")[0].endswith(f"-e {tree.root}[test]")
    assert tree.setup(tree.env).returncode == 0
    assert len(tree.calls("-m pip install")) == 1, "nothing has changed"
    assert tree.setup(tree.env, extras="").returncode == 0
    assert tree.calls("-m pip install")[1].endswith(f"-e {tree.root}"), "other extras are a separate installation"
    with (tree.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert tree.setup(tree.env).returncode == 0
    assert len(tree.calls("-m pip install")) == 3


def test_failed_installation_is_shown_and_tried_again(tree: Tree) -> None:
    tree.say("pip-exit", 7)
    failed = tree.setup(tree.env)
    assert failed.returncode == 1
    assert "the last line of pip" in failed.stderr
    assert "error: the installation failed" in failed.stderr
    tree.say("pip-exit", 0)
    assert tree.setup(tree.env).returncode == 0
    assert len(tree.calls("-m pip install")) == 2


def test_stale_environment_is_refused(tree: Tree) -> None:
    result = tree.setup(tree.elsewhere / "gone")
    assert result.returncode == 1
    assert "VIRTUAL_ENV" in result.stderr
    assert "unset VIRTUAL_ENV" in result.stderr


def test_old_python_is_refused(tree: Tree) -> None:
    tree.script(tree.bare / "python3", f"#!{BASH}\ncase \"$*\" in *'sys.exit('*) exit 1 ;; *) echo 3.10.4 ;; esac\n")
    result = tree.setup(None)
    assert result.returncode == 1
    assert "Python 3.10.4 is too old: install Python 3.11 or newer" in result.stderr
    assert not (tree.root / ".venv").exists()


def test_missing_python_is_said(tree: Tree) -> None:
    result = tree.setup(None)
    assert result.returncode == 1
    assert "install Python 3.11 or newer" in result.stderr


def test_python_without_venv_says_what_to_install(tree: Tree) -> None:
    """Bare Debian: python3 without ensurepip; and no apt-get, uv or virtualenv."""
    shutil.copy(tree.env / "bin" / "python", tree.bare / "python3")
    (tree.bare / "ensurepip-exit").write_text("1")
    result = tree.setup(None)
    assert result.returncode == 1
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"apt-get install python{version}-venv" in result.stderr


def test_environment_is_created_once_if_none_is_active(tree: Tree) -> None:
    shutil.copy(tree.env / "bin" / "python", tree.bare / "python3")
    for _ in range(2):
        result = tree.setup(None)
        assert result.returncode == 0, result.stderr
        assert f"PYTHON={tree.root}/.venv/bin/python" in result.stdout
    calls = (tree.bare / "calls").read_text()
    assert calls.count(f"-m venv --clear {tree.root}/.venv") == 1


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        (("-k", "two words"), "-m not timing -k two words"),
        (("-x", "-m", "not slow", "tests/tools"), "-m (not slow) and not timing -x tests/tools"),
        (("-m", "timing"), "-m timing"),
    ],
)
def test_suite_passes_arguments_and_ends_with_a_summary(tree: Tree, arguments: tuple[str, ...], passed: str) -> None:
    result = tree.run("tools/test.sh", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    (call,) = tree.calls("-m pytest")  # without the kernels
    assert call.endswith(f"--dist loadfile --no-loadscope-reorder {passed}")
    assert "== 3 passed in 0.01s ==" in result.stdout.splitlines()[-3:]
    assert result.stdout.splitlines()[-1].startswith("All passed in ")


def test_ffcv_is_not_installed_twice(tree: Tree) -> None:
    result = tree.run("tools/install_ffcv.sh")
    assert (result.returncode, result.stdout) == (0, f"FFCV is installed in {tree.env}.\n")
    assert not tree.calls("-m pip install")


def test_missing_packages_of_ffcv_are_named_with_the_commands_and_the_suite_continues(tree: Tree) -> None:
    """This PATH has neither the libraries nor apt-get."""
    tree.say("ffcv-exit", 1)
    alone = tree.run("tools/install_ffcv.sh")
    assert alone.returncode == 1
    assert "FFCV is not installed: it needs g++ pkg-config libopencv-dev libturbojpeg0-dev" in alone.stdout
    assert "apt-get install -y --no-install-recommends g++ pkg-config libopencv-dev" in alone.stdout
    assert f"{tree.env}/bin/python -m pip install --no-deps ffcv==1.0.2" in alone.stdout
    suite = tree.run("tools/test.sh")
    assert suite.returncode == 0, suite.stdout + suite.stderr
    assert "Note: without FFCV its tests are skipped" in suite.stdout


def test_ffcv_is_compiled_if_its_requirements_are_installed(tree: Tree) -> None:
    tree.say("ffcv-exit", 1)
    for command in ("g++", "pkg-config"):
        tree.script(tree.bare / command, f"#!{BASH}\nexit 0\n")
    result = tree.run("tools/install_ffcv.sh")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [call.split("off ")[1] for call in tree.calls("-m pip install")] == [
        "numba tqdm opencv-python-headless setuptools",
        "--no-deps ffcv==1.0.2",
    ]
    tree.say("pip-exit", 1)
    failed = tree.run("tools/install_ffcv.sh")
    assert failed.returncode == 1
    assert "the last line of pip" in failed.stdout
    assert "FFCV is not installed: pip failed" in failed.stdout


@pytest.mark.parametrize(("knob", "name"), [("mypy-exit", "types"), ("pytest-exit", "tests")])
def test_suite_fails_if_any_part_fails_and_runs_all_parts(tree: Tree, knob: str, name: str) -> None:
    tree.say(knob, 1)
    result = tree.run("tools/test.sh")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith(f"FAILED: {name}")
    assert tree.calls("-m pytest")


@pytest.mark.parametrize("code", [0, 3])
def test_ci_calls_the_suite_and_returns_its_code(tree: Tree, code: int) -> None:
    tree.script(tree.root / "tools" / "test.sh", f'#!{BASH}\necho "CI=$CI"\nexit {code}\n')
    result = tree.run(".ci/run")
    assert (result.returncode, result.stdout) == (code, "CI=true\n")


def knn_result(top1: float) -> str:
    """The part of mvssl-eval knn's result that the summary reads."""
    return json.dumps({"results": {"settings": [{"k": 20, "top1": top1}]}})


def test_demo_runs_all_steps_and_stops_at_a_failed_one(tree: Tree) -> None:
    """With fake commands that create the files of the real ones."""
    bin_ = tree.env / "bin"
    make = 'mkdir -p "$5"; touch "$5/report.html" "$5/views.png" "$5/losses.png" "$5/metrics.jsonl"'
    tree.script(bin_ / "mvssl-convert", f'#!{BASH}\nmkdir -p "$2"\n')
    tree.script(bin_ / "mvssl-train", f'#!{BASH}\n{make}; echo "seed $7"\n')
    untrained, trained = (f"echo '{knn_result(top1)}'" for top1 in (0.2, 0.5))
    measure = (
        f'mkdir -p "$3/eval"; if [ "$4" = --untrained ]; then {untrained} >"$3/eval/knn-untrained.json"; '
        f'else {trained} >"$3/eval/knn-online.json"; fi'
    )
    tree.script(bin_ / "mvssl-eval", f"#!{BASH}\n{measure}\n")
    tree.script(bin_ / "mvssl-export", f'#!{BASH}\ntouch "$4"\n')
    result = tree.run("tools/demo.sh", "--seed", "3", "--out", "some where")
    out = tree.elsewhere / "some where"
    assert result.returncode == 0, result.stdout + result.stderr
    for words in ("seed 3", str(out), "untrained   20.0 %", "trained     50.0 %", "chance 50.0 %"):
        assert words in result.stdout
    assert (out / "backbone.safetensors").exists()

    tree.script(bin_ / "mvssl-train", f"#!{BASH}\nexit 1\n")
    again = tree.run("tools/demo.sh", "--out", "some where")
    assert again.returncode == 1
    assert 'the demo stopped at "3/6 Pre-train multi-task BYOL"' in again.stderr
    assert not (out / "backbone.safetensors").exists(), (
        "a result of the earlier demo would be taken for one of this demo"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed"], "--seed needs a value"),
        (["--seed", "one"], "--seed is one but must be a whole number"),
        (["--sed", "1"], "unknown argument --sed"),
    ],
)
def test_demo_refuses_wrong_arguments(tree: Tree, arguments: list[str], message: str) -> None:
    result = tree.run("tools/demo.sh", *arguments)
    assert result.returncode == 1
    assert message in result.stderr


def test_demo_does_not_touch_other_folders(tree: Tree) -> None:
    mine = tree.elsewhere / "photos" / "images"
    mine.mkdir(parents=True)
    (mine / "beach.jpg").write_bytes(b"precious")
    result = tree.run("tools/demo.sh", "--out", "photos")
    assert result.returncode == 1
    assert "choose a new or empty folder" in result.stderr
    assert (mine / "beach.jpg").read_bytes() == b"precious"


def test_summary_names_missing_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"lacks shards, run/report\.html, run/views\.png"):
        summary(tmp_path)


def test_summary_is_an_error_if_training_has_not_helped(tmp_path: Path) -> None:
    for name, _ in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch() if "." in name else (tmp_path / name).mkdir(exist_ok=True)
    for kind in "abcd":
        (tmp_path / "images" / "train" / kind).mkdir(parents=True)
    for which, top1 in (("untrained", 0.2), ("online", 0.5)):
        (tmp_path / "run" / "eval" / f"knn-{which}.json").write_text(knn_result(top1))
    assert "chance 25.0 %" in summary(tmp_path)
    (tmp_path / "run" / "eval" / "knn-online.json").write_text(knn_result(0.2))
    with pytest.raises(InputError, match="Training has not helped"):
        summary(tmp_path)

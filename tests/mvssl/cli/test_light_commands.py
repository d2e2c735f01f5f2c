"""Help, lists, printed recipes and the doctor import neither torch nor other libraries that take seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pipelines
from mvssl.cli import doctor

HEAVY = ("torch", "timm", "matplotlib", "nvidia", "triton", "jinja2", "safetensors")
AT_EXIT = f"""
import atexit, runpy, sys
sys.argv = sys.argv[1:]
atexit.register(lambda: print("imported:", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr))
"""


def imported(code: str, *arguments: str) -> set[str]:
    """The heavy libraries that a new process has imported when it ends; `arguments` are its command line."""
    command = [sys.executable, "-c", AT_EXIT + code, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    last = done.stderr.rstrip("\n").split("\n")[-1]
    assert last.startswith("imported:"), done.stderr
    return set(last.split()[1:])


def imported_by_command(line: str) -> set[str]:
    """Those of a command such as "eval --help"."""
    name, *arguments = line.split()
    run = f"runpy.run_module('mvssl.cli.{name}', run_name='__main__', alter_sys=True)"
    return imported(run, f"mvssl-{name}", *arguments)


@pytest.mark.parametrize(
    "line",
    [
        *("train", "train --help", "train --list", "train report --help", "train doctor --help"),
        *("train laptop --help", "train laptop --help-all", "train laptop --print-config"),
        *("train laptop --epochs 3 --cache host --print-config", "train labtop", "train laptop --no-such-option"),
        *("convert --help", "eval", "eval --help", "eval knn --help", "eval linear --help", "eval finetune --help"),
        *(
            "eval compare --help",
            "eval map --help",
            "eval attention --help",
            "eval no-such-evaluation",
            "eval knn",
            "features --help",
            "features",
            "export --help",
        ),
    ],
)
def test_what_computes_nothing_imports_no_heavy_library(line: str) -> None:
    assert imported_by_command(line) == set()


@pytest.mark.parametrize("module", ["mvssl", "pipelines", "mvssl.recipes", "mvssl.config.options", "pipelines.decode"])
def test_packages_import_no_heavy_library(module: str) -> None:
    assert imported(f"import {module}") == set()


def test_heavy_libraries_are_seen_where_they_are_imported() -> None:
    assert {"torch", "timm"} <= imported_by_command("eval knn --run no-such-run")
    assert imported("import pipelines\npipelines.draw") >= {"torch"}


def test_doctor_asks_torch_only_where_there_may_be_a_gpu() -> None:
    found = imported_by_command("train doctor")
    assert found <= {"torch", "triton", "nvidia"}
    assert ("torch" in found) == doctor._driver_loads()


def test_doctor_knows_torch_without_importing_it() -> None:
    import torch

    build = doctor._torch_build()
    assert (build["__version__"], build["cuda"]) == (torch.__version__, torch.version.cuda)


def test_every_public_name_of_pipelines_is_found() -> None:
    assert all(getattr(pipelines, name).__name__ == name for name in pipelines.__all__)
    assert set(pipelines.__all__) <= set(dir(pipelines))
    with pytest.raises(AttributeError, match="no attribute 'paper_view'"):
        pipelines.paper_view  # noqa: B018

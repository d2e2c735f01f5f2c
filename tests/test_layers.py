"""The direction of imports: tools -> pipelines <- mvssl <- benchmarks, and each heavy library in its one file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"pipelines", "mvssl", "tools", "benchmarks"}
ALLOWED = {
    "pipelines": {"pipelines"},
    "mvssl": {"mvssl", "pipelines"},
    "tools": {"tools", "pipelines"},
    "benchmarks": {"benchmarks", "mvssl", "pipelines"},
}
ONLY_IN = {"ffcv": "pipelines/decode/ffcv.py", "nvidia.dali": "pipelines/decode/dali.py"}


def imported(source: str) -> set[str]:
    """Dotted names of all modules that Python code imports, at any depth, with `import_module("literal")` too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Relative imports stay inside their package by construction; the linter forbids nothing more.
            if node.module is not None and node.level == 0:
                names.add(node.module)
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec") and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def test_reader_sees_every_kind_of_import() -> None:
    source = (
        "import a.b as c\nfrom d import e\n"
        "def f():\n    import g\n    importlib.import_module('h.i')\n    __import__('j')\n    from . import k\n"
    )
    assert imported(source) == {"a.b", "d", "d.e", "g", "h.i", "j"}


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_package_imports_only_what_lies_below_it(package: str) -> None:
    assert package == "benchmarks" or files(package), f"no Python files in {package}"
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(package)
        for name in sorted(imported(path.read_text()))
        if name.partition(".")[0] in PACKAGES - ALLOWED[package] | {"tests"}
    ]
    assert not wrong


@pytest.mark.parametrize("module", sorted(ONLY_IN))
def test_library_is_imported_in_its_one_file_only(module: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in files(package)
        if any(below(name, module) for name in imported(path.read_text()))
    }
    # benchmarks/baselines holds the peers to beat, which use the libraries in their own way.
    assert {user for user in users if not user.startswith("benchmarks/contenders/baselines/")} <= {ONLY_IN[module]}


def test_dali_is_used_where_it_belongs() -> None:
    """So that the rule above does not hold merely because the reader is blind."""
    assert any(below(name, "nvidia.dali") for name in imported((ROOT / ONLY_IN["nvidia.dali"]).read_text()))


def test_every_package_is_declared_to_be_installed() -> None:
    """A top-level folder of Python code that setuptools does not know would be missing after an installation."""
    import tomllib

    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {"pipelines*", "mvssl*", "tools*"} <= set(include)
    for package in ("pipelines", "mvssl", "tools"):
        missing = [path.parent for path in files(package) if not (path.parent / "__init__.py").exists()]
        assert not missing, "folders without __init__.py"

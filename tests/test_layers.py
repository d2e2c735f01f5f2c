"""The direction of imports between packages, and the one file that may import each heavy library."""

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
ORDER = {
    "mvssl": [
        {"own_pipelines", "ranks"},
        {"config", "distributed", "pickles"},
        {"models"},
        {"optim", "methods", "recipes", "runs"},
        {"weights"},
        {"monitor"},
        {"evaluate"},
        {"training"},
        {"cli"},
    ],
    "pipelines": [
        {"names"},
        {"usage"},
        {"runtime", "progress"},
        {"files", "checks", "value_range"},
        {"c_library", "batch", "arrays"},
        {"decode"},
        {"storage"},
        {"views", "conversion"},
        {"order"},
        {"loading"},
        {"loader", "view_sheet"},
    ],
}
"""Packages (or modules) of a top-level package from the ground up: each imports only what stands before it."""
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
    # Baselines use the libraries in their own way.
    assert {user for user in users if not user.startswith("benchmarks/implementations/")} <= {ONLY_IN[module]}


def test_dali_is_used_where_it_belongs() -> None:
    """So that the rule above does not hold merely because the reader is blind."""
    assert any(below(name, "nvidia.dali") for name in imported((ROOT / ONLY_IN["nvidia.dali"]).read_text()))


def test_what_is_installed_is_mvssl_and_pipelines() -> None:
    """Other top-level names would collide with users' folders; one that setuptools does not know would be missing."""
    import tomllib

    from setuptools import find_packages

    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    found = set(find_packages(str(ROOT), include=include))
    assert {name.partition(".")[0] for name in found} == {"mvssl", "pipelines"}
    for package in ("mvssl", "pipelines"):
        assert {".".join(path.parent.relative_to(ROOT).parts) for path in files(package)} <= found, "no __init__.py"


def module_name(path: Path) -> str:
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


def imports_of_modules(packages: set[str]) -> dict[str, set[str]]:
    """Each module of these packages with the modules of these packages that it imports."""
    modules = {module_name(path): path for package in packages for path in files(package)}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = imported(path.read_text())
        # `from a.b import c` names a.b and a.b.c: of a module inside a package only the module counts.
        precise = {target for target in found if not any(below(other, target) and other != target for other in found)}
        graph[name] = {
            target if target in modules else target.rpartition(".")[0] for target in precise
        } & modules.keys()
        graph[name].discard(name)
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of a directed graph, or nothing."""
    from graphlib import CycleError, TopologicalSorter

    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_cycles_are_found() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    assert not cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_no_file_and_no_package_imports_itself_in_a_circle() -> None:
    graph = imports_of_modules(PACKAGES)
    assert not cycle(graph)
    packages: dict[str, set[str]] = {}
    for name, targets in graph.items():
        own = ".".join(name.split(".")[:2])
        # The public surface (`mvssl/__init__.py`) stands above all packages of its own.
        packages.setdefault(own, set()).update(other for t in targets if (other := ".".join(t.split(".")[:2])) != own)
    assert len(packages) > 20, "the reader is blind"
    assert not cycle(packages)


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports a file outside a package by its bare name and refuses the second one."""
    from collections import Counter

    count = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(count) > 100
    assert not [name for name, times in count.items() if times > 1]


@pytest.mark.parametrize("top", sorted(ORDER))
def test_packages_stand_on_one_another(top: str) -> None:
    floors = {name: floor for floor, names in enumerate(ORDER[top]) for name in names}
    inside = {
        path.stem
        for path in (ROOT / top).iterdir()
        if (path.is_dir() or path.suffix == ".py") and path.name[0] not in "._"
    }
    assert inside <= floors.keys(), "give the new package a floor"
    wrong = [
        f"{name} imports {target}"
        for name, targets in imports_of_modules({top}).items()
        for target in targets
        if "." in name and "." in target
        if (here := name.split(".")[1]) != (there := target.split(".")[1]) and floors[there] >= floors[here]
    ]
    assert not wrong

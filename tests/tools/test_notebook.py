"""The notebook runs as it stands, is small, and names nothing of the machine it was made on."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "tools/first_hour.ipynb"


def outputs(notebook: nbformat.NotebookNode) -> list[set[str]]:
    """The kinds of output of every code cell."""
    return [
        {kind for output in cell.outputs for kind in output.get("data", {output.output_type: ""})}
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_it_is_small_and_its_outputs_are_there() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert NOTEBOOK.stat().st_size < 300_000
    nbformat.validate(notebook)
    for number, text in ((0, "image/jpeg"), (1, "image/jpeg"), (2, "image/jpeg"), (4, "image/jpeg"), (5, "image/jpeg")):
        assert text in outputs(notebook)[1 + number]
    text = NOTEBOOK.read_text()
    assert not re.search(r"/(root|home|work|tmp|Users)/", text)
    assert "Traceback" not in text
    assert "Warning:" not in text


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Executes the cells with `folder` as the current one, as Jupyter does with the notebook's own."""
    settings = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=settings).execute()


@pytest.mark.slow
def test_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # tools/test.sh sets one that shows no figures
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before, files = outputs(notebook), set(NOTEBOOK.parent.iterdir())
    run(notebook, NOTEBOOK.parent)
    after = outputs(notebook)
    assert [kinds & {"image/jpeg"} for kinds in after] == [kinds & {"image/jpeg"} for kinds in before]
    assert not any("error" in kinds for kinds in after)
    assert {path.name for path in set(NOTEBOOK.parent.iterdir()) - files} <= {
        "__pycache__"
    }  # data and runs go elsewhere


def test_its_imports_work_from_the_root_of_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = notebook.cells[:2]
    run(notebook, NOTEBOOK.parents[1])

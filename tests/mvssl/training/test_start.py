"""What a run logs, checks and caches before its first step."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mvssl.config.options import Execution, RunOptions
from mvssl.config.recipe import Backbone, Recipe
from mvssl.training.compile import CACHE_FOLDERS, keep_compiled_code
from mvssl.training.memory import explain_out_of_memory
from pipelines.runtime import InputError
from tests.samples.networks import mvssl_test_own_norm
from tests.samples.tiny_runs import train


def test_micro_batches_and_sequential_views_are_announced(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(tiny_recipe, epochs=1, accumulate=2, backbone=Backbone(name=mvssl_test_own_norm.__name__))
    train(recipe, images, tmp_path / "run")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "gradient accumulation: 2 micro-batches of 4 images; same numbers as 2 processes" in log
    assert log.count("sequential views") == 1
    assert "backbone.1 (OwnNorm)" in log


def test_an_ordinary_run_announces_neither(finished: Path) -> None:
    log = (finished / "train.log").read_text()
    assert "micro-batches" not in log
    assert "sequential views" not in log


def test_a_cuda_graph_is_refused_on_the_cpu(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cuda_graph is 'on' but must be auto or off on a cpu device.*set it to auto"):
        train(tiny_recipe, images, tmp_path / "run", cuda_graph="on")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"RunOptions.cuda_graph is 'yes' but must be one of auto, on, off"):
        RunOptions(cuda_graph="yes")  # type: ignore[arg-type]


def test_an_out_of_memory_error_names_the_options_that_help(tiny_recipe: Recipe) -> None:
    def told(recipe: Recipe, *, ranks: int = 1, begun: bool = False, **execution: Any) -> str:
        explained = explain_out_of_memory(recipe, Execution(**execution), ranks=ranks, begun=lambda: begun)
        with pytest.raises(InputError, match="memory is full") as caught, explained:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return str(caught.value)

    message = told(tiny_recipe)
    assert "Tried to allocate 2.00 GiB" in message
    for option in (
        "--checkpointing",
        "--step-mode per-view",
        "--accumulate 2",
        "--batch-size",
        "--cuda-graph off",
        "--dry-run",
    ):
        assert option in message
    assert "--resume" not in message
    assert "continue with --resume and --checkpointing" in told(tiny_recipe, begun=True)
    assert "continue with --resume and --step-mode per-view" in told(tiny_recipe, begun=True, checkpointing=True)
    assert "--step-mode" not in told(tiny_recipe, step_mode="per-view")
    assert "--cuda-graph" not in told(tiny_recipe, cuda_graph="off")
    assert "--accumulate 4," in told(replace(tiny_recipe, accumulate=2))
    assert "--accumulate 3," in told(replace(tiny_recipe, batch_size=18), ranks=2)  # 9 images a rank
    assert "--accumulate" not in told(replace(tiny_recipe, batch_size=14), ranks=2)  # 7: micro-batches of one image
    assert "--accumulate" not in told(tiny_recipe, ranks=4)
    assert "): lower --batch-size" in told(
        tiny_recipe, ranks=4, step_mode="per-view", cuda_graph="off", checkpointing=True
    )


compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture
def no_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No environment variable names a cache. Returns the user's cache folder."""
    for variable in CACHE_FOLDERS:
        monkeypatch.setenv(variable, "")  # so that it is restored at the end
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mvssl"


def test_compiled_code_is_cached_in_the_users_cache_folder(no_caches: Path) -> None:
    os.environ["TRITON_CACHE_DIR"] = "elsewhere"
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(no_caches / "inductor")
    assert (no_caches / "inductor").is_dir()
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"


def test_where_the_cache_cannot_be_written_compiled_code_is_cached_among_temporary_files(
    no_caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    no_caches.write_text("a file where the folder should be")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / f"mvssl-{os.getuid()}" / "inductor")
    assert [record.getMessage().count("cannot be written (File exists)") for record in caplog.records] == [1]


def test_a_folder_that_cannot_be_written_leaves_torchs_default(
    no_caches: Path, caplog: pytest.LogCaptureFixture
) -> None:
    no_caches.mkdir()
    (no_caches / "inductor").write_text("a file where the folder should be")
    keep_compiled_code()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert os.environ["TRITON_CACHE_DIR"] == str(no_caches / "triton")
    assert "not cached for the next start" in caplog.text
    assert "set TORCHINDUCTOR_CACHE_DIR" in caplog.text


def test_the_default_that_torch_sets_is_no_choice_of_the_users(no_caches: Path) -> None:
    """torch sets its variable when it is imported."""
    code = "from mvssl.training.compile import keep_compiled_code as k\nimport os\nk()\nprint(os.environ['%s'])"
    environment = {name: value for name, value in os.environ.items() if name not in CACHE_FOLDERS}
    command = [sys.executable, "-c", code % "TORCHINDUCTOR_CACHE_DIR"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(no_caches / "inductor")


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 1000, 0.5, 0.9])
def test_damaged_compiled_code_is_removed(kept: float, no_caches: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A library that is cut short would kill the process when it is loaded."""
    found = importlib.util.find_spec("numpy._core._multiarray_umath")
    assert found is not None
    assert found.origin is not None
    library = Path(found.origin).read_bytes()
    cut = library[: int(kept * len(library)) if 0 < kept < 1 else int(kept)]
    good, bad = no_caches / "inductor" / "aa" / "good.so", no_caches / "inductor" / "aa" / "bad.so"
    entry, other = no_caches / "triton" / "ENTRY", no_caches / "triton" / "OTHER"
    for folder in (good.parent, entry, other):
        folder.mkdir(parents=True)
    for path, content in (
        (good, library),
        (bad, cut),
        (entry / "kernel.cubin", cut),
        (other / "kernel.cubin", library),
    ):
        path.write_bytes(content)
    for folder in (entry, other):
        (folder / "kernel.json").write_text("{}")
    (no_caches / "inductor" / "aa" / "empty.py").write_text("")
    (no_caches / "inductor" / "aa" / "lock").write_text("")
    keep_compiled_code()
    assert sorted(path.name for path in good.parent.iterdir()) == ["good.so", "lock"]
    assert [path.name for path in (no_caches / "triton").iterdir()] == ["OTHER"]
    assert len(list(other.iterdir())) == 2
    assert [record.getMessage()[:40] for record in caplog.records] == [
        "2 cached files of compiled code are dama",
        "1 cached files of compiled code are dama",
    ]


@compiler
@pytest.mark.slow
def test_damaged_compiled_code_is_compiled_again(no_caches: Path) -> None:
    code = (
        "from mvssl.training.compile import keep_compiled_code\nkeep_compiled_code()\nimport torch\n"
        "print(torch.compile(lambda x: x.sin() * 2)(torch.zeros(8)).sum().item())"
    )
    environment = {name: value for name, value in os.environ.items() if name not in CACHE_FOLDERS}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == "0.0\n"
        libraries = [path for path in no_caches.rglob("*.so") if path.is_file()]
        assert libraries
        for path in libraries:
            path.write_bytes(path.read_bytes()[:1000])
    assert "compiled again" in done.stderr


@pytest.mark.slow
def test_a_run_caches_its_compiled_code(
    images: Path, tiny_recipe: Recipe, no_caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = torch.compile  # a fast backend
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, **options | {"backend": "eager"}))
    train(replace(tiny_recipe, epochs=1), images, tmp_path / "run", compile="on")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(no_caches / "inductor")
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.index("compiling the step") < log.index("compiled in ")

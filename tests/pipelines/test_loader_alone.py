"""The loader in a plain loop: wrong arguments are sentences; pickling, forks and the end of the process are safe."""

from __future__ import annotations

import copy
import multiprocessing
import subprocess
import sys
from collections import UserList
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image

from pipelines import InputError, Loader, byol_views
from pipelines.storage.given import source_of
from pipelines.storage.items import plain_label

IMAGES = list(np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), dtype=np.uint8))
VIEWS = byol_views(size=16)


def loader(**settings: Any) -> Loader:
    return Loader.of(IMAGES, VIEWS, **{"batch_size": 4, **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": "4"}, "batch_size is '4' but must be a whole number"),
        ({"batch_size": 4.0}, "batch_size is 4.0 but must be a whole number"),
        ({"seed": "x"}, "seed is 'x' but must be a whole number"),
        ({"device": "gpu"}, "device is 'gpu' but must be cpu, cuda or cuda:N"),
        ({"ranks": 2}, "ranks is 2 but must be a Ranks"),
        ({"decoder": "pillow"}, r"Loader.of cannot be called in this way .*'decoder'\): did you mean decode"),
    ],
)
def test_wrong_arguments(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        loader(**settings)


def test_wrong_epochs_and_states() -> None:
    with loader() as one:
        for arguments, words in (
            ({"epoch": "0"}, "epoch is '0' but must be a whole number"),
            ({"epoch": 0, "until": 0}, "until is 0 but must be above the epoch 0"),
            ({"epoch": 0, "first_step": 0.5}, "first_step is 0.5 but must be a whole number"),
        ):
            with pytest.raises(InputError, match=words):
                one.epoch(**arguments)
        for state in (None, {}, {"epoch": 0}, {"epoch": "a", "step": 0}, {"epoch": 0, "step": 3}):
            with pytest.raises(InputError):
                one.load_state_dict(state)  # type: ignore[arg-type]
        assert one.state_dict() == {"epoch": 0, "step": 0}
        assert len(list(one.epoch(np.int64(0), until=np.int64(1)))) == 3  # type: ignore[arg-type]


def test_a_loader_is_neither_pickled_nor_copied() -> None:
    with (
        loader() as one,
        pytest.raises(TypeError, match="A Loader holds threads and cannot be pickled or copied: make"),
    ):
        copy.deepcopy(one)


def in_a_fork(one: Loader, answers: SimpleQueue[str]) -> None:
    try:
        next(iter(one))
    except RuntimeError as error:
        answers.put(str(error))
    one.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_is_told_to_make_its_own() -> None:
    context = multiprocessing.get_context("fork")
    answers: SimpleQueue[str] = context.SimpleQueue()
    with loader() as one:
        batches = iter(one)
        next(batches)
        child = context.Process(target=in_a_fork, args=(one, answers))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert "The loader belongs to the process that was forked" in answers.get()
        assert len(list(batches)) == 2


def test_a_script_that_does_not_close_its_loader_ends_quietly(tmp_path: Path) -> None:
    for n, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"{n}.jpg")
    code = f"""
from pipelines import Loader, byol_views
loader = Loader.of({str(tmp_path)!r}, byol_views(size=16), batch_size=4)
batches = iter(loader)
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("label", "plain"),
    [
        (np.array([3]), 3),  # MedMNIST
        (torch.tensor([2]), 2),
        (1.0, 1),  # a column of pandas with gaps
        (np.float64(2), 2),
        (float("nan"), None),
        (0.5, None),
        (np.array([0, 1]), None),
        (torch.eye(3)[0], None),
        (True, None),
        (np.str_("cat"), "cat"),
    ],
)
def test_labels_of_one_value(label: object, plain: int | str | None) -> None:
    assert plain_label(label) == plain


def test_tables_and_lists_of_other_libraries(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for path, image in zip(paths, IMAGES, strict=False):
        Image.fromarray(image).save(path)
    table = pandas.DataFrame({"path": list(map(str, paths)), "label": [1, None, 0]})
    assert source_of(table).labels.tolist() == [1, -1, 0]
    assert len(source_of(table.iloc[1:].path)) == 2
    assert len(source_of(UserList(IMAGES))) == 12
    nested = source_of([((image,), "x") for image in IMAGES])
    assert (len(nested), nested.classes) == (12, ("x",))

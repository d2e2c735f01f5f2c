"""Run folders of others, or with flipped bits: one sentence with file and entry, no code, nothing written outside."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvssl.config.recipe import Recipe
from mvssl.evaluate.compare import summarise
from mvssl.evaluate.session import ComputeOptions, EvalOptions, open_session
from mvssl.monitor.report import render
from mvssl.runs import checkpoint
from mvssl.runs.checked_json import read_checked, write_checked
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_jsonl
from mvssl.runs.results import ResultFile, read_result
from mvssl.weights.load import BackboneSource, load_backbone
from pipelines.runtime import InputError
from tests.samples.tiny_runs import train


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with one checkpoint of each kind of file."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def change(path: Path, edit: Callable[[dict[str, Any]], Any], *, seal: bool = True) -> None:
    """Edit a JSON file; with `seal` its checksum is made right, as somebody else would."""
    content = read_checked(path)
    edit(content)
    if seal:
        write_checked(path, content)
    else:
        path.write_text(json.dumps({**content, "checksum": json.loads(path.read_text())["checksum"]}))


def change_state(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the tensors of a checkpoint and make all checksums right."""
    state = torch.load(folder / "state.pt", weights_only=True)
    edit(state)
    torch.save(state, folder / "state.pt")
    seal(folder)


def seal(folder: Path) -> None:
    digest = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    change(folder / "checkpoint.json", lambda meta: meta.update(sha256=digest))


def sentence(action: Callable[[], object]) -> str:
    """The one sentence with which something is refused."""
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 3000
    return message


def open_of_run(run: Path) -> None:
    """Evaluate a run on the images that its config names."""
    options, compute = EvalOptions(out=run / "out"), ComputeOptions(device="cpu", decoder="pillow")
    with open_session(BackboneSource(run=run), options, compute):
        pass


# Flipped bits.


@pytest.mark.parametrize("field", ["step", "metrics_bytes", "evaluated", "data", "ranks", "precision"])
def test_a_changed_entry_of_a_checkpoint_is_noticed(run: Path, field: str) -> None:
    last = run / "checkpoints/last"
    other = {"evaluated": False, "data": "7", "precision": "fp16"}.get(field, 7)
    change(last / "checkpoint.json", lambda meta: meta.update({field: other}), seal=False)
    assert "checkpoint.json" not in (message := sentence(lambda: checkpoint.load(last))) or "checksum" in message
    assert "damaged" in message


def test_a_changed_step_of_an_old_checkpoint_is_noticed_by_its_folder(run: Path) -> None:
    """It has no checksum."""
    path = run / "checkpoints/last/checkpoint.json"
    content = read_checked(path)
    path.write_text(json.dumps(content))
    assert checkpoint.load(path.parent).meta["step"] == content["step"]
    path.write_text(json.dumps({**content, "step": content["step"] - 1}))
    assert "step is 11 in the folder step-00000012" in sentence(lambda: checkpoint.load(path.parent))


def test_every_flipped_digit_or_letter_of_checkpoint_json_is_noticed(run: Path) -> None:
    path = run / "checkpoints/last/checkpoint.json"
    content = path.read_bytes()
    whole = json.loads(content)
    for position in np.random.default_rng(0).choice(len(content), 40, replace=False).tolist():
        flipped = bytearray(content)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        try:
            same = json.loads(bytes(flipped)) == whole  # a blank
        except ValueError:
            same = False
        if same:
            checkpoint.load(path.parent)
        else:
            sentence(lambda: checkpoint.load(path.parent))


def test_a_changed_config_is_noticed_and_the_copy_taken(
    run: Path, images: Path, tiny_recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    change(run / "config.json", lambda config: config["recipe"].update(seed=1), seal=False)
    assert RunFolder(run).recipe() == tiny_recipe
    assert "config.json is damaged (its content has another checksum" in caplog.text
    train(replace(tiny_recipe, epochs=4), images, run, resume=True, extend=True)
    assert read_checked(run / "config.json")["recipe"]["seed"] == 0
    shutil.rmtree(run / "checkpoints")
    change(run / "config.json", lambda config: config["recipe"].update(seed=1), seal=False)
    assert 'delete its "checksum"' in sentence(RunFolder(run).recipe)


def test_a_changed_result_is_noticed(tmp_path: Path) -> None:
    file = ResultFile(folder=tmp_path, evaluation="knn", network="online", identity={"k": 3})
    file.write({"top1": 0.5, "top1_interval_95": [0.4, 0.6], "images": 10})
    assert file.earlier() == {"top1": 0.5, "top1_interval_95": [0.4, 0.6], "images": 10}
    text = file.path.read_text()
    for old, new in (("0.5", "0.7"), ("0.6", "0.8"), ('"k": 3', '"k": 5'), ("10", "11")):
        file.path.write_text(text.replace(old, new, 1))
        assert "checksum" in sentence(file.earlier)
    del (old_file := json.loads(text))["checksum"]
    file.path.write_text(json.dumps(old_file))  # of an earlier version
    assert file.earlier() is not None


# Files of somebody else: every checksum is right.

WRONG: list[tuple[str, Any]] = [
    ("step", -1),
    ("step", 10**400 % 10**30),
    ("step", "12"),
    ("step", True),
    ("step", 12.0),
    ("sha256", None),
    ("sha256", ["a"]),
    ("recipe", []),
    ("recipe", None),
    ("data", 5),
    ("metrics_bytes", -5),
    ("metrics_bytes", 2**60),
    ("metrics_bytes", 1e300),
    ("evaluated", "no"),
    ("ranks", 0.5),
    ("precision", {}),
    ("format", None),
    ("format", "2"),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_checkpoint_of_other_types(run: Path, field: str, value: Any) -> None:
    last = run / "checkpoints/last"
    change(last / "checkpoint.json", lambda meta: meta.update({field: value}))
    message = sentence(lambda: checkpoint.load(last))
    assert field in message or "number" in message


@pytest.mark.parametrize("field", ["step", "sha256", "recipe", "data", "metrics_bytes", "evaluated", "format"])
def test_a_checkpoint_without_an_entry(run: Path, images: Path, tiny_recipe: Recipe, field: str) -> None:
    change(run / "checkpoints/last/checkpoint.json", lambda meta: meta.pop(field))
    message = sentence(lambda: train(replace(tiny_recipe, epochs=4), images, run, resume=True, extend=True))
    assert field in message


def inner(state: dict[str, Any], *path: Any) -> Any:
    for part in path:
        state = state[part]
    return state


STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no step": lambda s: s.pop("step"),
    "step a list": lambda s: s.update(step=[1]),
    "no online network": lambda s: s["step"].pop("online"),
    "a network of numbers": lambda s: s["step"].update(online={"a": 1}),
    "another shape": lambda s: s["step"]["online"].update({"projector.0.weight": torch.zeros(3, 3)}),
    "a tensor too few": lambda s: s["step"]["online"].pop("projector.0.weight"),
    "a tensor of an unknown name": lambda s: s["step"]["online"].update(extra=torch.zeros(1)),
    "no target": lambda s: s["step"].update(target=None),
    "momentum of another shape": lambda s: next(iter(s["step"]["optimizer"]["state"].values())).update(
        momentum_buffer=torch.zeros(7, 7)
    ),
    "momentum a text": lambda s: next(iter(s["step"]["optimizer"]["state"].values())).update(momentum_buffer="a"),
    "fewer groups": lambda s: s["step"]["optimizer"]["param_groups"].pop(),
    "other parameters": lambda s: s["step"]["optimizer"]["param_groups"][0].update(params=[10**6]),
    "a rate that is a text": lambda s: s["step"]["optimizer"]["param_groups"][0].update(lr="high"),
    "a rate that is NaN": lambda s: s["step"]["optimizer"]["param_groups"][0].update(momentum=float("nan")),
    "no optimiser": lambda s: s["step"].pop("optimizer"),
    "no scaler": lambda s: s["step"].pop("scaler"),
    "scaler a text": lambda s: s["step"].update(scaler={"scale": "a"}),
    "no window": lambda s: s.pop("window"),
    "window a list": lambda s: s.update(window=[1]),
    "rows of other tasks": lambda s: s.update(window={"rows": [torch.zeros(99)], "index": [torch.zeros(8).long()]}),
    "rows without images": lambda s: s.update(window={"rows": [torch.zeros(5)], "index": []}),
    "a huge view": lambda s: s["step"]["online"].update({"projector.0.weight": torch.zeros(1).expand(10**6, 10**6)}),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_is_none_of_this_run(run: Path, images: Path, tiny_recipe: Recipe, kind: str) -> None:
    change_state((run / "checkpoints/last").resolve(), STATES[kind])
    message = sentence(lambda: train(replace(tiny_recipe, epochs=4), images, run, resume=True, extend=True))
    assert "checkpoints/last is damaged" in message


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("wrap", [False, True])
def test_no_code_of_a_checkpoint_is_run(run: Path, tmp_path: Path, wrap: bool) -> None:
    last = (run / "checkpoints/last").resolve()
    hostile = Runs(tmp_path / "ran")
    if wrap:
        torch.save({"step": {"online": hostile}, "window": None}, last / "state.pt")
    else:
        (last / "state.pt").write_bytes(pickle.dumps(hostile))
    seal(last)
    assert "damaged" in sentence(lambda: load_backbone(BackboneSource(run=run)))
    assert not (tmp_path / "ran").exists()


def test_a_storage_that_claims_more_than_the_file_has(run: Path) -> None:
    """torch reads beyond the bytes of the file there."""
    last = (run / "checkpoints/last").resolve()
    file = io.BytesIO()
    torch.save({"step": {"online": {"a": torch.zeros(1000)}}}, file)
    content = file.getvalue()
    few, many = b"M\xe8\x03", b"J\xff\xff\xff\x7f"  # 1000 as BININT2, 2**31 - 1 as BININT
    assert few in content
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(last / "state.pt", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, data.replace(few, many) if entry.filename.endswith("data.pkl") else data)
    seal(last)
    assert "more than its part of the file" in sentence(lambda: checkpoint.load(last))


@pytest.mark.parametrize(
    "target", ["last", "../checkpoints", "/", "../../other", ".", "..", "step-99999999", "metrics"]
)
def test_last_must_be_a_link_to_a_checkpoint_beside_it(run: Path, target: str) -> None:
    link = run / "checkpoints/last"
    shutil.copytree(run / "checkpoints/step-00000012", run.parent / "other")
    link.unlink()
    link.symlink_to(target)
    message = sentence(lambda: checkpoint.load(link))
    assert "ln -sfn step-00000012" in message or "damaged" in message
    sentence(lambda: load_backbone(BackboneSource(run=run)))


def test_a_link_out_of_the_folder_is_not_written_through(
    run: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    for name in ("metrics.jsonl", "throughput.jsonl", "train.log"):
        victim = tmp_path / "precious"
        victim.write_text("precious\n" * 10_000)
        kept = (run / name).rename(run / "kept")
        (run / name).symlink_to(victim)
        message = sentence(lambda: train(replace(tiny_recipe, epochs=4), images, run, resume=True, extend=True))
        assert name in message
        assert victim.read_text() == "precious\n" * 10_000
        kept.rename(run / name)


def test_overwriting_a_run_leaves_what_its_links_lead_to(
    run: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("a")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(outside)
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(outside / "precious")
    train(replace(tiny_recipe, epochs=1), images, run, overwrite=True)
    assert (outside / "precious").read_text() == "a"
    assert os.listdir(outside) == ["precious"]


CONFIGS: dict[str, Any] = {
    "recipe a list": lambda c: c.update(recipe=[]),
    "no recipe": lambda c: c.pop("recipe"),
    "options a text": lambda c: c.update(options="x"),
    "data a number": lambda c: c["options"].update(data=5),
    "val a list": lambda c: c["options"].update(val=[]),
    "tags a text": lambda c: c["options"].update(tags="abc"),
    "changes a number": lambda c: c["options"].update(changes=3),
    "a change without a step": lambda c: c["options"].update(changes=[{"field": "a"}]),
    "a size of 10^9": lambda c: c["recipe"]["views"][0].update(size=10**9),
    "k of 10^9": lambda c: c["recipe"]["evaluation"].update(k=[10**9]),
    "a width of 10^9": lambda c: c["recipe"]["projector"].update(hidden=[10**9]),
    "an unknown field": lambda c: c["recipe"].update(extra=1),
    "another network": lambda c: c["recipe"]["backbone"].update(name="hf-hub:somebody/model"),
    "a network from a folder": lambda c: c["recipe"]["backbone"].update(name="local-dir:/etc"),
    "a tag with a scheme": lambda c: c["recipe"]["backbone"].update(name="resnet18.a1://b"),
    "an unknown tag": lambda c: c["recipe"]["backbone"].update(name="resnet18.nothing"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_of_somebody_else(run: Path, kind: str) -> None:
    change(run / "config.json", CONFIGS[kind])
    for path in (run / "checkpoints").glob("step-*/checkpoint.json"):
        change(path, lambda meta: meta.pop("options"))  # no copy
    sentence(lambda: load_backbone(BackboneSource(run=run)))
    with suppress(InputError):
        render(RunFolder(run))


LINES = [
    "[]",
    "7",
    '{"kind": 5, "step": 1}',
    '{"kind": "train", "step": "a", "loss": 1}',
    '{"kind": "train", "step": 1, "loss": 1e999}',
    '{"kind": "train", "step": 1, "loss": NaN}',
    '{"kind": "train", "step": 1, "loss": [1]}',
    '{"kind": "train", "step": 1, "loss": 1, "lr": "fast"}',
    '{"kind": "knn", "step": 1}',
    '{"kind": "knn", "step": 1, "top1": true}',
    "[" * 10_000,
    '{"kind": "train", "step": 1, "loss": 1%s}' % ("0" * 400),
    "\udcff",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("name", ["metrics.jsonl", "throughput.jsonl"])
def test_metrics_of_somebody_else(run: Path, line: str, name: str) -> None:
    with (run / name).open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    assert f"{name} is damaged (line " in sentence(lambda: render(RunFolder(run)))
    if name == "metrics.jsonl":
        assert name in sentence(lambda: summarise(run))


def test_a_line_without_an_end(run: Path) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.truncate(1 << 33)  # zeros, sparse
    assert "more than 1,048,576 bytes" in sentence(lambda: list(read_jsonl(run / "metrics.jsonl")))


RESULTS: list[Any] = [
    [],
    {"top1": "high", "top1_interval_95": [0, 1]},
    {"top1": 0.5},
    {"top1": 0.5, "top1_interval_95": [0, 1, 2]},
    {"top1": 5, "top1_interval_95": [0, 1]},
    {"best": [1]},
    {"best": {"top1": 0.5, "top1_interval_95": ["a", "b"]}},
    {"top1": 0.5, "top1_interval_95": [0, 1], "settings": 5},
    {"top1": 0.5, "top1_interval_95": [0, 1], "images": "many"},
    {"top1": 0.5, "top1_interval_95": [0, 1], "top5": "x"},
]


@pytest.mark.parametrize("results", RESULTS, ids=str)
def test_results_of_somebody_else(run: Path, results: Any) -> None:
    path = run / "eval/knn-online.json"
    path.parent.mkdir(exist_ok=True)
    write_checked(path, {"evaluation": "knn", "network": "online", "identity": {}, "results": results})
    for action in (lambda: read_result(path), lambda: render(RunFolder(run)), lambda: summarise(run)):
        assert "knn-online.json is no result of mvssl-eval" in sentence(action)


@pytest.mark.parametrize("name", ["summary.json", "environment.json"])
@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", "[" * 9000, '{"packages": 5, "gpus": [], "command": []}', "{" + '"a":{' * 200]
)
def test_other_files_of_somebody_else(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    assert f"{name} is damaged" in sentence(lambda: render(RunFolder(run)))


@pytest.mark.parametrize("field", ["images_per_second", "bottleneck", "bad_images", "step"])
def test_a_summary_of_other_types(run: Path, field: str) -> None:
    content = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**content, field: [[1]]}))
    assert field in sentence(lambda: render(RunFolder(run)))


@pytest.mark.parametrize("name", ["metrics.jsonl", "throughput.jsonl", "train.log"])
def test_a_pipe_in_the_place_of_a_file_that_is_appended_to(
    run: Path, images: Path, tiny_recipe: Recipe, name: str
) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    message = sentence(lambda: train(replace(tiny_recipe, epochs=4), images, run, resume=True, extend=True))
    assert f"{name} is no regular file" in message


NODES: dict[str, Callable[[Path], None]] = {
    "folder": Path.mkdir,
    "pipe": lambda path: os.mkfifo(path),
    "link to itself": lambda path: path.symlink_to(path.name),
    "broken link": lambda path: path.symlink_to("nothing"),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "empty file": Path.touch,
}


@pytest.mark.parametrize("kind", NODES)
def test_something_else_in_the_place_of_a_file(run: Path, kind: str) -> None:
    """Whatever it is, no reader waits, fills the memory or ends in a traceback."""
    names = [
        str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "tensorboard" not in path.parts
    ]
    assert len(names) > 8
    for name in names:
        path, kept = run / name, run.parent / "kept"
        path.rename(kept)
        NODES[kind](path)
        actions: list[Callable[[], object]] = [
            lambda: render(RunFolder(run)),
            lambda: summarise(run),
            lambda: load_backbone(BackboneSource(run=run)),
            lambda: RunFolder(run).check_free(overwrite=False),
        ]
        for action in actions:
            with suppress(InputError, OSError):
                action()
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        kept.rename(path)


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 5000, "a\nb", "/dev/zero", "~", "-", " "])
def test_paths_that_no_file_system_has(run: Path, path: str) -> None:
    for field in ("data", "val"):
        change(run / "config.json", lambda config: config["options"].update({field: path}))  # noqa: B023
        with suppress(OSError):
            message = sentence(lambda: open_of_run(run))
            assert message

"""The three commands: usage, overrides, exit codes, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm

import mvssl
from mvssl.cli import convert as convert_cli
from mvssl.cli import eval as eval_cli
from mvssl.cli import export as export_cli
from mvssl.cli import features as features_cli
from mvssl.cli import train as train_cli
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_jsonl
from mvssl.runs.results import read_result
from pipelines.runtime import InputError, run_cli

TINY = [
    "--backbone.name",
    "test_resnet",
    "--batch-size",
    "8",
    "--epochs",
    "2",
    "--device",
    "cpu",
    "--log-every",
    "3",
    "--evaluation.resize",
    "32",
    "--evaluation.crop",
    "32",
    "--evaluation.k",
    "5",
    "1",
    "--evaluation.every-epochs",
    "1",
    "--projector.hidden",
    "32",
    "--projector.out",
    "16",
    "--predictor.hidden",
    "32",
    "--predictor.out",
    "16",
]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of mvssl-train."""
    with pytest.raises(SystemExit) as exit_info:
        run_cli(lambda: train_cli.body(arguments))
    return int(exit_info.value.code or 0), capsys.readouterr().err


def test_list_and_usage_name_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_cli.body(["--list"]) == 0
    assert "byol_resnet50_200ep" in capsys.readouterr().out
    assert train_cli.body([]) == 2
    assert "usage: mvssl-train [RECIPE]" in capsys.readouterr().out


def test_print_config_shows_the_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "demo",
        "--print-config",
        "--optimizer.base-lr",
        "0.125",
        "--views.2.flip",
        "0",
        "--predictors",
        "shared",
    ]
    assert train_cli.body(arguments) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["optimizer"]["base_lr"] == 0.125
    assert config["views"][2]["flip"] == 0
    assert config["predictors"] == "shared"


def test_a_run_says_what_it_is_first_and_shows_its_first_step(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_cli.body(["demo", "--data", str(images), "--out", str(tmp_path / "run"), *TINY]) == 0
    shown = capsys.readouterr()
    first, *rest = shown.out.splitlines()
    for words in (
        "Training demo",
        f"in {images}",
        "(global 32, local 16, cutout 32 pixels)",
        "batch ",
        "steps (",
        "cpu",
    ):
        assert words in first
    assert any("step 1/" in line and "the first step took" in line and "loss global" in line for line in rest)
    assert "warm-up: " not in shown.err
    assert rest[0].startswith("warm-up: ")


def test_unknown_field_offers_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, err = fails(capsys, "demo", "--batch-sise", "8", "--base_lr=0.1", "--views.0.sizes", "32", "--xyzzy")
    assert code == 2
    assert err == (
        "error: mvssl-train demo has no option --batch-sise (did you mean --batch-size?), --base_lr (did you mean "
        "--optimizer.base-lr?), --views.0.sizes (did you mean --views.0.size?), --xyzzy: see mvssl-train demo --help.\n"
    )
    assert "--lr (did you mean --optimizer.base-lr?)" in fails(capsys, "demo", "--lr", "1")[1]
    assert (
        fails(capsys, "demo", "stray")[1]
        == "error: mvssl-train demo has no use for stray: see mvssl-train demo --help.\n"
    )


@pytest.mark.parametrize("width", ["40", "200"])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("demo", "--epochs", "1.5"), "--epochs is '1.5' but must be a whole number: see mvssl-train demo --help."),
        (
            ("demo", "--views.0.area=0.4"),
            "--views.0.area is '0.4' but must be two numbers or None: see mvssl-train demo --help.",
        ),
        (
            ("demo", "--evaluation.k", "5", "a"),
            "--evaluation.k is '5 a' but must be whole numbers: see mvssl-train demo --help.",
        ),
        (
            ("demo", "--precision", "fp61"),
            "--precision is 'fp61' but must be one of auto, fp32, bf16, fp16: did you mean fp16?",
        ),
        (("demo", "--data"), "--data has no value but must have one: see mvssl-train demo --help."),
        (
            ("demo", "--views.0.jitter", "1"),
            "--views.0.jitter is '1' but must be four values: see mvssl-train demo --help.",
        ),
        (
            ("demo", "--task-weights", "local", "x"),
            "--task-weights is 'local x' but must be a text and a number, once or more: see mvssl-train demo --help.",
        ),
        (("report",), "runs is missing: give a run folder, several, or a folder with runs in it."),
        (
            ("runs", "--sort", "x"),
            "--sort is 'x' but must be one of newest, oldest, name, recipe, state, epochs, loss, knn, speed: choose "
            "one of these.",
        ),
    ],
)
def test_wrong_values_are_one_sentence(
    arguments: tuple[str, ...],
    sentence: str,
    width: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    assert fails(capsys, *arguments) == (2, f"error: {sentence}\n")


def test_a_number_under_another_name_is_called_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert_cli.main(["a", "b", "--shard-size", "big"])
    assert capsys.readouterr().err == "error: --shard-size is 'big' but must be a number: see mvssl-convert --help.\n"


def test_missing_words_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, missing in (((), "IMAGES and OUT are"), (("photos",), "OUT is")):
        with pytest.raises(SystemExit) as stop:
            features_cli.body(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"error: {missing} missing: see mvssl-features --help.\n"


def test_a_recipe_behind_options_is_named_and_no_recipe_is_photos(
    images: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, err = fails(capsys, "--data", "photos", "laptop", "--out", "run")
    assert code == 1
    assert err.startswith(
        "error: recipe is missing: the recipe comes first, then '--data' and other options; write 'laptop' in front"
    )
    code, err = fails(capsys, "--resume", "mine.toml", "--out", "run")
    assert (code, "write 'mine.toml' in front" in err) == (1, True)
    code, err = fails(capsys, "--epochs=3", "--out", str(tmp_path / "run"))
    assert (code, err.startswith("error: data is missing")) == (1, True)
    (tmp_path / "demo").symlink_to(images)  # a folder with a recipe's name is no recipe
    assert train_cli.body(["--print-config", "--data", str(tmp_path / "demo"), "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["name"] == "photos"
    assert shown.err.startswith("no recipe is named: photos is taken")


def test_run_options_are_public() -> None:
    assert mvssl.RunOptions().log_every == 10
    assert "RunOptions" in mvssl.__all__


def test_unknown_recipe_and_bad_value_are_sentences(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, err = fails(capsys, "dmeo")
    assert (code, err) == (1, "error: recipe is 'dmeo' but there is no recipe of that name: did you mean 'demo'?\n")
    code, err = fails(capsys, "demo", "--batch-size", "1")
    assert code != 0
    assert "batch_size (--batch-size) is 1 but must be at least 2" in " ".join(err.replace("│", " ").split())
    code, err = fails(capsys, "demo", "--out", str(tmp_path / "run"))
    assert (code, err.startswith("error: data is missing")) == (1, True)
    code, err = fails(capsys, "demo", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "run"))
    assert code == 1
    assert str(tmp_path / "none") in err
    (tmp_path / "empty").mkdir()
    code, err = fails(capsys, "demo", "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "run"))
    assert code == 1
    assert "empty" in err
    assert not (tmp_path / "run").exists()


def test_an_out_that_cannot_be_written_ends_with_code_1(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, err = fails(capsys, "demo", "--data", str(images), "--out", str(tmp_path / "file" / "run"), *TINY)
    assert code == 1
    assert "cannot be written (Not a directory): choose another folder" in err


def test_help_shows_fields_with_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train_cli.body(["demo", "--help-all"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("--optimizer.base-lr", "--views.0.blur-sigma", "trust coefficient of lars", "--resume", "run folder"):
        assert words in text


def test_dry_run_reports_and_leaves_nothing(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train_cli.body(["demo", "--data", str(images), "--out", str(out), "--dry-run", *TINY]) == 0
    text = capsys.readouterr().out
    assert "source images/s" in text
    assert "GiB at peak" in text
    assert not out.exists()
    assert train_cli.body(["demo", "--data", str(images), "--dry-run", *TINY]) == 0


def test_train_evaluate_export(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train_cli.body(["demo", "--data", str(images), "--out", str(out), *TINY]) == 0
    assert eval_cli.body(["knn", "--run", str(out)]) == 0
    assert eval_cli.body(["knn", "--run", str(out), "--untrained"]) == 0
    results = read_result(out / "eval/knn-online.json")["results"]
    online = [row for row in read_jsonl(out / "metrics.jsonl") if row["kind"] == "knn"][-1]
    assert {s["k"]: s["top1"] for s in results["settings"]} == {5: online["top1_k5"], 1: online["top1_k1"]}
    assert (out / "eval/knn-untrained.json").exists()
    exported = tmp_path / "backbone.safetensors"
    for network in ("online", "target"):
        arguments = ["--run", str(out), "--out", str(exported), "--network", network, "--overwrite"]
        assert export_cli.body(arguments) == 0
        timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(exported))


def test_simsiam_has_no_target_network_to_export(images: Path, tmp_path: Path) -> None:
    out, exported = tmp_path / "run", tmp_path / "backbone.safetensors"
    assert train_cli.body(["demo", "--data", str(images), "--out", str(out), *TINY, "--method", "simsiam"]) == 0
    assert export_cli.body(["--run", str(out), "--out", str(exported)]) == 0
    with pytest.raises(InputError, match=r"no separate target network \(simsiam uses the online network's embeddings"):
        export_cli.body(["--run", str(out), "--out", str(exported), "--network", "target", "--overwrite"])


def test_knn_without_labels_is_a_sentence(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flat = images / "train" / "class_0"
    arguments = ["demo", "--data", str(images), "--out", str(out), *TINY, "--epochs", "1"]
    assert train_cli.body(arguments) == 0
    with pytest.raises(SystemExit) as exit_info:
        run_cli(lambda: eval_cli.body(["knn", "--run", str(out), "--data", str(flat)]))
    assert exit_info.value.code == 1
    assert "kNN needs labels" in capsys.readouterr().err


def command(images: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "mvssl.cli.train", "demo", "--data", str(images), "--out", str(out), *TINY, *more]


def wait_for_steps(process: subprocess.Popen[bytes], metrics: Path, lines: int) -> None:
    """Wait until a run has logged `lines` lines."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.02)
    raise AssertionError(f"the run ended ({process.poll()}) or did not get there in time")


@pytest.mark.slow
def test_kill_and_sigterm_in_mid_epoch_then_resume_give_the_same_metrics(images: Path, tmp_path: Path) -> None:
    """A run killed, resumed, stopped with SIGTERM and SIGHUP (exit code 75) and resumed equals one that never was."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    long = ("--epochs", "14", "--evaluation.every-epochs", "7", "--save-every-steps", "5", "--save-every-epochs", "0")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(images, whole, *long), env=environment, check=True, capture_output=True)
    for number, lines, code in (
        (signal.SIGKILL, 5, -signal.SIGKILL),
        (signal.SIGTERM, 12, 75),
        (signal.SIGHUP, 16, 75),
    ):
        more = ("--resume",) if broken.exists() else ()
        process = subprocess.Popen(command(images, broken, *long, *more), env=environment, stdout=subprocess.DEVNULL)
        try:
            wait_for_steps(process, broken / "metrics.jsonl", lines)
            process.send_signal(number)
            assert process.wait(120) == code
        finally:
            process.kill()
    assert (broken / "metrics.jsonl").read_bytes() != (whole / "metrics.jsonl").read_bytes()
    subprocess.run(command(images, broken, *long, "--resume"), env=environment, check=True, capture_output=True)
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("redirection", ["pipe", "full disk"])
def test_a_run_goes_on_without_its_console(redirection: str, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with open("/dev/full" if redirection == "full disk" else os.devnull, "w") as full:
        process = subprocess.Popen(
            command(images, out),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE if redirection == "pipe" else full,
            stderr=subprocess.PIPE,
            text=True,
        )
        if process.stdout is not None:
            process.stdout.close()
            process.stdout = None
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert RunFolder(out).backbone.exists()
    log = RunFolder(out).log.read_text()
    assert "INFO done: " in log
    for text in (said, log):
        assert text.count("the console is gone") == 1

"""mvssl-eval and mvssl-features from the command line: correct results, computed once, resumed after a stop."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torchvision.transforms import v2

from mvssl.cli import eval as eval_cli
from mvssl.cli import features as features_cli
from mvssl.evaluate import supervised
from mvssl.evaluate.accuracy import wilson_interval
from mvssl.evaluate.compare import summarise
from mvssl.evaluate.features import extract_features
from mvssl.evaluate.finetune import labelled_share, listed_images
from mvssl.evaluate.session import Session, check_labelled
from mvssl.evaluate.supervised import Classifier, Supervision
from mvssl.runs import checkpoint
from mvssl.runs.results import conditions_of, describe, read_result
from mvssl.weights.load import BackboneSource, load_backbone
from pipelines.loader import Loader
from pipelines.runtime import InputError
from pipelines.storage import open_source
from pipelines.storage.source import SubsetSource
from tests.samples.checkpoint_samples import put, random_backbone, release, write
from tests.samples.ranks import results as results_of
from tests.samples.ranks import run_ranks

FEW = ("--fast.epochs", "20", "--fast.batch-size", "8", "--fast.held-out", "0.25", "--fast.lr", "0.01", "0.1")
SHORT = ("--epochs", "3", "--batch-size", "8", "--lr", "0.01")
SESSION = Session(device=torch.device("cpu"))


def evaluate(*arguments: object) -> int:
    return eval_cli.body([str(argument) for argument in arguments])


def features(*arguments: object) -> int:
    return features_cli.body([str(argument) for argument in arguments])


def test_the_fast_probe_is_a_logistic_regression(finished: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    arguments = ("linear", "--run", finished, "--out", out, *FEW, "--fast.weight-decay", "0.05")
    assert evaluate(*arguments, "--fast.epochs", "400", "--fast.batch-size", "36") == 0
    results = read_result(out / "linear-fast-online.json")["results"]
    loaded = load_backbone(BackboneSource(run=finished))
    train, val = (
        extract_features(SESSION, loaded.backbone, open_source(images / split), loaded.evaluation)
        for split in ("train", "val")
    )
    scaler = StandardScaler().fit(train.values.numpy())
    theirs = LogisticRegression(C=1 / (0.05 * 36), max_iter=2000).fit(
        scaler.transform(train.values.numpy()), train.labels.numpy()
    )
    expected = theirs.score(scaler.transform(val.values.numpy()), val.labels.numpy())
    assert results["top1"] == pytest.approx(
        expected, abs=1 / 12
    )  # an image at the decision boundary may fall to either side
    assert (results["images"], results["train_images"], len(results["grid"])) == (12, 36, 2)


@pytest.mark.parametrize("which", ["linear", "linear release", "finetune", "knn"])
def test_every_result_is_computed_once(
    which: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "eval"
    arguments = {
        "linear": ["linear", *FEW, "--fast.drawn", "1"],
        "linear release": ["linear", "--protocol", "release", "--release.epochs", "3", "--release.batch-size", "8"],
        "finetune": ["finetune", *SHORT],
        "knn": ["knn", "--k", "3", "1", "--temperature", "0.07", "0.5"],
    }[which]
    names = {"linear": "linear-fast-online", "linear release": "linear-release-online", "knn": "knn-online"}
    path = out / f"{names.get(which, 'finetune-100pct-online')}.json"
    assert evaluate(*arguments, "--run", finished, "--out", out) == 0
    first = read_result(path)
    results = first["results"].get("best", first["results"])
    assert 0 <= results["top1_interval_95"][0] <= results["top1"] <= results["top1_interval_95"][1] <= 1
    assert set(results["per_class"]) == {"class_0", "class_1", "class_2"}
    shown = capsys.readouterr().out
    assert f"{100 * results['top1']:.2f}" in shown
    assert str(path) in shown.replace("\n", "")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    for name in ("linear.fast_linear", "linear.release_linear", "finetune.finetune", "knn.knn_grid"):
        monkeypatch.setattr(f"mvssl.evaluate.{name}", never)
    assert evaluate(*arguments, "--run", finished, "--out", out) == 0  # shows the result without computing it
    assert read_result(path) == first
    more = ["--resize", "40"]
    with pytest.raises(InputError, match=r"holds the result of another evaluation \(resize differ"):
        evaluate(*arguments, "--run", finished, "--out", out, *more)
    assert read_result(path) == first


@pytest.mark.parametrize(
    ("arguments", "name", "words"),
    [
        (["knn", "--k", "1"], "knn", "resize 32 (bicubic), crop 32, online network"),
        (["knn", "--k", "1", "--protocol", "release"], "knn-release", "resize 32 (bilinear), crop 32, online network"),
        (["knn", "--k", "1", "--interpolation", "bilinear"], "knn", "resize 32 (bilinear), crop 32, online network"),
        (["knn", "--k", "1", "--network", "target"], "knn", "resize 32 (bicubic), crop 32, target network"),
        (["knn", "--k", "1", "--untrained"], "knn", "resize 32 (bicubic), crop 32, untrained network"),
        (["linear", *FEW], "linear-fast", "resize 32 (bicubic), crop 32, online network, linear layer from zero"),
        (
            ["linear", "--protocol", "release", "--release.epochs", "1", "--release.batch-size", "8", "--resize", "40"],
            "linear-release",
            "resize 40 (bilinear), crop 32, online network, linear layer from normal(0, 0.01)",
        ),
        (
            [
                *("linear", "--protocol", "release", "--release.epochs", "1", "--interpolation", "bicubic"),
                *("--release.batch-size", "8", "--release.head-std", "0"),
            ],
            "linear-release",
            "resize 32 (bicubic), crop 32, online network, linear layer from zero",
        ),
        (["finetune", *SHORT, "--epochs", "1"], "finetune-100pct", "crop 32, online network, linear layer from zero"),
    ],
)
def test_results_say_what_they_were_measured_with(
    arguments: list[str], name: str, words: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*arguments, "--run", finished, "--out", tmp_path) == 0
    assert words in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    network = "target" if "target" in arguments else "untrained" if "--untrained" in arguments else "online"
    assert path.name == f"{name}-{network}.json"
    conditions = read_result(path)["conditions"]
    assert describe(conditions).endswith(words)
    assert conditions["interpolation"] == ("bilinear" if "bilinear" in words else "bicubic")
    (summary,) = (summary for summary in summarise(tmp_path) if summary.results)
    assert summary.conditions == (f"{name}: {describe(conditions)}",)
    changed = {"evaluation": name, "network": network, "identity": {"resize": 9, "crop": 8}, "results": {}}
    assert describe(conditions_of(changed)) == f"resize 9 (bicubic), crop 8, {network} network"  # an older file


def test_bilinear_features_are_those_of_torchvisions_crops(finished: Path, images: Path) -> None:
    loaded = load_backbone(BackboneSource(run=finished, resize=40, crop=32, interpolation="bilinear"))
    source = open_source(images / "val")
    found = extract_features(SESSION, loaded.backbone, source, loaded.evaluation)
    transform = v2.Compose(
        [
            v2.Resize(40, v2.InterpolationMode.BILINEAR, antialias=True),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    files = [images / "val" / source.key(index) for index in range(len(source))]
    pixels = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for file in files]
    with torch.no_grad():
        expected = loaded.backbone(torch.stack([transform(image) for image in pixels]))
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=1e-3)
    bicubic = extract_features(SESSION, loaded.backbone, source, load_backbone(BackboneSource(run=finished)).evaluation)
    assert not torch.allclose(bicubic.values, expected, rtol=1e-2, atol=1e-2)


def test_the_linear_layer_starts_as_asked() -> None:
    backbone = random_backbone("resnet18", seed=1)
    one, same, other = (Classifier(backbone, 512, 1000, head_std=0.01, seed=seed).linear for seed in (0, 0, 1))
    weights = one.weight.detach()
    assert float(weights.std()) == pytest.approx(0.01, rel=0.01)
    assert abs(float(weights.mean())) < 1e-4
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)
    assert not one.bias.any()
    assert not Classifier(backbone, 512, 10).linear.weight.any()


def test_separable_images_are_learned(images: Path, finished: Path, tmp_path: Path) -> None:
    """The classes differ in brightness."""
    few = ("--epochs", "12", "--batch-size", "12", "--lr", "0.05")
    assert evaluate("finetune", "--run", finished, "--out", tmp_path, *few) == 0
    assert read_result(tmp_path / "finetune-100pct-online.json")["results"]["top1"] >= 0.9
    probe = ("--protocol", "release", "--release.epochs", "20", "--release.batch-size", "12", "--release.lr", "0.05")
    assert evaluate("linear", "--run", finished, "--out", tmp_path, *probe) == 0
    assert read_result(tmp_path / "linear-release-online.json")["results"]["top1"] >= 0.75


def test_stopped_finetuning_resumes_to_the_same_network(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path) -> dict[str, torch.Tensor]:
        arguments = ("finetune", "--run", finished, "--out", out, *SHORT, "--mixup", "0.2", "--labels", "0.5")
        assert evaluate(*arguments, "--backbone-out", out / "b.safetensors") == 0
        state: dict[str, torch.Tensor] = checkpoint.load(out / "finetune-50pct-online-state/last").state["model"]
        return state

    expected = run(tmp_path / "whole")
    original = checkpoint.save

    def killed(*arguments: Any, **options: Any) -> Path:
        path = original(*arguments, **options)
        if options["step"] == 2:
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    assert not (tmp_path / "stopped/finetune-50pct-online.json").exists()
    epochs: list[int] = []
    epoch_of = Loader.epoch

    def recorded(loader: Loader, epoch: int, **options: Any) -> Any:
        epochs.append(epoch)
        return epoch_of(loader, epoch, **options)

    monkeypatch.setattr(Loader, "epoch", recorded)
    found = run(tmp_path / "stopped")
    assert epochs == [2]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    whole, stopped = (
        read_result(tmp_path / place / "finetune-50pct-online.json")["results"] for place in ("whole", "stopped")
    )
    assert whole == stopped
    assert whole["train_images"] == 18
    exported = load_backbone(BackboneSource(weights=tmp_path / "whole/b.safetensors"))
    assert torch.equal(exported.backbone.state_dict()["conv1.0.weight"], expected["backbone.conv1.0.weight"])


def on_ranks(arguments: list[str]) -> None:
    """Run an evaluation in a rank."""
    assert eval_cli.body(arguments) == 0


@pytest.mark.slow
def test_two_ranks_measure_the_same_as_one_process(finished: Path, tmp_path: Path) -> None:
    commands = {
        "knn-online": ["knn", "--k", "3", "1"],
        "linear-fast-online": ["linear", *FEW],
        "linear-release-online": [
            *("linear", "--protocol", "release", "--release.epochs", "2", "--release.batch-size", "12")
        ],
    }
    for name, arguments in commands.items():
        for ranks in (1, 2):  # processes of their own for each: a port serves one group of ranks
            whole = [*arguments, "--run", str(finished), "--out", str(tmp_path / f"{ranks}")]
            results_of(run_ranks(on_ranks, ranks, [*whole, "--device", "cpu", "--decoder", "pillow"]))
        one, two = (read_result(tmp_path / ranks / f"{name}.json")["results"] for ranks in ("1", "2"))
        assert one == two
    for place in ("features.npy", "state.npy"):
        one, two = (np.load(next((tmp_path / n / "features").glob("train-*")) / place) for n in ("1", "2"))
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_finetune_one_network(finished: Path, tmp_path: Path) -> None:
    whole = ["finetune", "--run", str(finished), "--out", str(tmp_path), "--device", "cpu", "--epochs", "12"]
    whole += ["--batch-size", "12", "--lr", "0.05", "--backbone-out", str(tmp_path / "b.safetensors")]
    results_of(run_ranks(on_ranks, 2, whole))
    assert read_result(tmp_path / "finetune-100pct-online.json")["results"]["top1"] >= 0.75
    state = checkpoint.load(tmp_path / "finetune-100pct-online-state/last").state["model"]
    exported = load_backbone(BackboneSource(weights=tmp_path / "b.safetensors")).backbone.state_dict()
    assert torch.equal(exported["conv1.0.weight"], state["backbone.conv1.0.weight"])


def test_neighbours_need_no_labels(finished: Path, images: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted((images / "train").rglob("*.jpg"))[::3]:
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    assert evaluate("knn", "--run", finished, "--data", flat, "--out", tmp_path / "eval", "--sheet", "4") == 0
    with Image.open(tmp_path / "eval/neighbours-online.png") as sheet:
        assert sheet.height > 4 * 96
        assert sheet.width > 9 * 96
    assert not (tmp_path / "eval/knn-online.json").exists()
    with pytest.raises(InputError, match=r"out is '.*flat/eval' but must be outside the images"):
        evaluate("knn", "--run", finished, "--data", flat, "--out", flat / "eval", "--sheet", "4")
    assert not (flat / "eval/neighbours-online.png").exists()


def interval_of(top1: float) -> str:
    """The interval for 12 images, as tables show it."""
    low, high = wilson_interval(round(12 * top1), 12)
    return f"{100 * low:.1f} to {100 * high:.1f}"


def test_compare_shows_runs_and_results(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    run = tmp_path / "first"
    shutil.copytree(finished, run, symlinks=True)
    assert evaluate("knn", "--run", run, "--k", "3") == 0
    assert evaluate("knn", "--run", run, "--k", "3", "--untrained", "--out", tmp_path / "second") == 0
    capsys.readouterr()
    assert evaluate("compare", run, tmp_path / "second", "--out", tmp_path / "plots/c.png") == 0
    shown = capsys.readouterr().out
    top1 = read_result(run / "eval/knn-online.json")["results"]["best"]["top1"]
    for words in ("first", "second", "kNN while training"):
        assert words in shown
    (row,) = [line for line in shown.splitlines() if line.startswith("knn ")]
    untrained = read_result(tmp_path / "second/knn-untrained.json")["results"]["best"]["top1"]
    assert [cell.strip() for cell in row.split("  ") if cell.strip()][1:] == [
        cell for top1 in (top1, untrained) for cell in [f"{100 * top1:.2f} ({interval_of(top1)})"]
    ]
    assert evaluate("knn", "--run", run, "--k", "3", "--untrained") == 0
    assert [summary.name for summary in summarise(run)] == ["first, online", "first, untrained"]
    assert [bool(summary.curves) for summary in summarise(run)] == [True, False]
    with Image.open(tmp_path / "plots/c.png") as picture:
        assert picture.width > 1000
    with pytest.raises(InputError, match="holds neither a run nor results"):
        evaluate("compare", tmp_path / "plots")
    (run / "eval/knn-online.json").write_text("{}")
    with pytest.raises(InputError, match=r"knn-online\.json is no result of mvssl-eval"):
        evaluate("compare", run)


@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_features_of_a_folder(ending: str, finished: Path, images: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(images / "train", data)
    (data / "class_1/003.jpg").write_bytes(b"no image")
    out = tmp_path / f"f.{ending}"
    assert features(data, out, "--run", finished) == 0
    loaded = load_backbone(BackboneSource(run=finished))
    source = open_source(data)
    expected = extract_features(SESSION, loaded.backbone, source, loaded.evaluation)
    keys = [source.key(i) for i in expected.index.tolist()]
    if ending == "npy":
        values = np.load(out)
        rows = list(csv.DictReader((tmp_path / "f.csv").open()))
        found = [(row["key"], int(row["label"]), row["class"]) for row in rows]
        assert [int(row["row"]) for row in rows] == list(range(35))
    else:
        table = pq.read_table(out)
        values = np.array(table["feature"].to_pylist(), dtype=np.float32)
        found = list(zip(*(table[name].to_pylist() for name in ("key", "label", "class")), strict=True))
    assert np.array_equal(values, expected.values.numpy())
    assert found == [(k, n, f"class_{n}") for k, n in zip(keys, expected.labels.tolist(), strict=True)]
    assert not (tmp_path / f"f.{ending}.partial").exists()
    before = out.read_bytes()
    with pytest.raises(InputError, match="which exists: add --overwrite"):
        features(data, out, "--run", finished)
    assert out.read_bytes() == before
    assert features(images / "val", out, "--run", finished, "--overwrite") == 0
    assert out.read_bytes() != before


def test_stopped_features_resume(finished: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mvssl.evaluate.feature_store import FeatureStore

    original, written = FeatureStore.write, []

    def stopping(self: FeatureStore, rows: Any, *arguments: Any) -> None:
        original(self, rows, *arguments)
        written.append(len(rows))
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(FeatureStore, "write", stopping)
    arguments = (images / "train", tmp_path / "f.npy", "--run", finished, "--extract-batch", "10")
    with pytest.raises(KeyboardInterrupt):
        features(*arguments)
    assert not (tmp_path / "f.npy").exists()
    assert features(*arguments) == 0
    assert written == [10, 10, 10, 6]
    assert np.load(tmp_path / "f.npy").shape[0] == 36


def test_a_checkpoint_of_the_reference_implementation_is_evaluated(images: Path, tmp_path: Path) -> None:
    backbone = random_backbone("resnet18", seed=1)
    content = release(backbone.state_dict(), backbone.state_dict(), put("projector.", {}), module=True)
    path = write(tmp_path / "release.pth", content)
    arguments = ("knn", "--weights", path, "--data", images, "--resize", "64", "--crop", "64", "--k", "3")
    assert evaluate(*arguments, "--out", tmp_path / "eval") == 0
    assert read_result(tmp_path / "eval/knn-release.json")["identity"]["backbone"] == "resnet18"
    with pytest.raises(InputError, match="out is missing"):
        evaluate(*arguments)
    with pytest.raises(InputError, match="data is missing"):
        evaluate("knn", "--weights", path, "--out", tmp_path / "eval")


def test_unsuitable_data_is_an_input_error(finished: Path, images: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "eval")
    flat = images / "train/class_0"
    with pytest.raises(InputError, match=r"^linear needs labels but 12 of the 12 images"):
        evaluate("linear", "--run", finished, "--data", flat, *out)
    with pytest.raises(InputError, match="has no validation split: give labelled images to measure on with --val"):
        evaluate("finetune", "--run", finished, "--data", images / "train", *out)
    other = tmp_path / "other"
    shutil.copytree(images / "val", other)
    (other / "class_0").rename(other / "class_9")
    with pytest.raises(InputError, match="'class_9'"):
        evaluate("linear", "--run", finished, "--val", other, *out)
    with pytest.raises(InputError, match=r"^k is 36 but must be at most 35"):
        evaluate("knn", "--run", finished, "--data", images / "train", "--k", "36", *out)
    with pytest.raises(InputError, match="evaluation is 'lineer' but must be one of knn, linear"):
        evaluate("lineer")


def test_fewer_images_than_classes(images: Path) -> None:
    source = open_source(images / "train")
    check_labelled("linear", SubsetSource(source, [0, 12, 24]), None)
    with pytest.raises(InputError, match=r"has 2 images for 3 classes: give at least one image of each"):
        check_labelled("linear", source, SubsetSource(source, [0, 12]))


def test_a_full_disk_keeps_the_earlier_file(
    finished: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "f.npy"
    out.write_bytes(b"mine")

    def full(_: object, to: Path) -> None:
        to.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(to))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            features(images / "train", out, "--run", finished, "--overwrite")
    assert out.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npy", "f.npy.partial"]
    assert features(images / "train", out, "--run", finished, "--overwrite") == 0
    assert np.load(out).shape[0] == 36


def test_a_folder_in_use_is_left_alone(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    with (tmp_path / "eval/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="Another evaluation is writing to"):
            evaluate("knn", "--run", finished, "--out", tmp_path / "eval")
    assert [path.name for path in (tmp_path / "eval").iterdir()] == [".lock"]


def test_a_nan_loss_ends_the_training(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^The loss is nan in epoch \d: lower the learning rate \(--lr 1e\+29\)"):
        evaluate("finetune", "--run", finished, "--out", tmp_path, *SHORT, "--lr", "1e30")


def test_layer_decay_lowers_the_learning_rate_of_early_layers() -> None:
    backbone = random_backbone("resnet18", seed=1)
    model = Classifier(backbone, 512, 3)
    groups = supervised._groups(model, Supervision(layer_decay=0.5, weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert set(scale) == set(names.values())
    rising = [scale[name] for name in ("backbone.conv1.weight", "backbone.layer4.0.conv1.weight", "linear.weight")]
    assert rising == sorted(set(rising))
    assert rising[-1] == 1
    assert {name for name, value in decay.items() if value == 0} == {
        name for name, p in model.named_parameters() if p.ndim <= 1
    }


def test_the_learning_rate_warms_up_and_decays_along_a_cosine() -> None:
    supervision = Supervision(epochs=10, warmup_epochs=2)
    rates = [supervised._rate(supervision, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10:] == pytest.approx([0.5 * (1 + np.cos(np.pi * n / 40)) for n in range(40)])


def test_labels_of_a_fraction_or_a_list(images: Path, tmp_path: Path) -> None:
    source = open_source(images / "train")
    some = labelled_share(source, 0.25, seed=0)
    assert np.bincount(source.labels[some]).tolist() == [3, 3, 3]
    assert np.array_equal(some, labelled_share(source, 0.25, seed=0))
    assert np.bincount(source.labels[labelled_share(source, 0.01, seed=0)]).tolist() == [1, 1, 1]
    names = tmp_path / "names.txt"
    names.write_text("class_2/003.jpg\n\nclass_0/011\n")
    assert listed_images(source, names).tolist() == [27, 11]
    subset = SubsetSource(source, [27, 11])
    assert (subset.key(0), subset.labels.tolist(), subset.classes) == ("class_2/003.jpg", [2, 0], source.classes)
    assert subset.read(1).tobytes() == source.read(11).tobytes()
    assert [None if d is None else d.tobytes() for d in subset.read_batch([0])] == [source.read(27).tobytes()]
    for text, words in (
        ("003.jpg", r"'003\.jpg', which matches 3 images"),
        ("nothing.jpg", "does not exist"),
        (".", "does not exist"),
        ("/", "does not exist"),
        ("", "names no images"),
    ):
        names.write_text(text)
        with pytest.raises(InputError, match=words):
            listed_images(source, names)
    with pytest.raises(InputError, match="must be above 0 and at most 1"):
        labelled_share(source, 1.5, seed=0)
    with pytest.raises(InputError, match="must name one or more of its 36 images"):
        SubsetSource(source, [36])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "^lr is 0"),
        ({"layer_decay": 1.5}, "^layer_decay is 1.5"),
        ({"warmup_epochs": 100}, "^warmup_epochs is 100 but must be below the 100 epochs"),
        ({"label_smoothing": 1.0}, "^label_smoothing is 1"),
        ({"mixup": -1.0}, "^mixup is -1"),
        ({"epochs": 0}, "^epochs is 0"),
    ],
)
def test_supervision_is_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Supervision(**options)


def test_results_are_plain_json(finished: Path, tmp_path: Path) -> None:
    assert evaluate("knn", "--run", finished, "--out", tmp_path, "--k", "1") == 0
    content = json.loads((tmp_path / "knn-online.json").read_text())
    assert content["environment"]["packages"]["torch"]
    assert content["identity"]["weights"] == load_backbone(BackboneSource(run=finished)).digest

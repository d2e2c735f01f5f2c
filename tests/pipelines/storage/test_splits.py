"""Which first-level folders are splits, which are classes, and which are refused as unclear."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.runtime import InputError
from pipelines.storage import split_paths


def tree(root: Path, *folders: str) -> Path:
    """A file that counts as an image in each folder."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "i.jpg").write_bytes(b"x")
    return root


def nested(*splits: str) -> list[str]:
    return [f"{split}/{name}" for split in splits for name in ("cat", "dog")]


@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train", "validation"),
        ("train", "valid"),
        ("train", "Val"),
        ("train", "dev"),
        ("train", "eval"),
        ("TRAIN", "VAL"),
        ("training", "validation_set"),
        ("train2017", "val2017"),
        ("train_images", "val-images"),
        ("trainingImages", "valImages"),
        ("train", "test"),
        ("Training Set", "test-set"),
        ("imagenet-train", "imagenet-val"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
    ],
)
def test_usual_names_of_splits(tmp_path: Path, train: str, val: str, layout: str) -> None:
    tree(tmp_path, *([train, val] if layout == "flat" else nested(train, val)))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances.json").write_text("{}")
    assert split_paths(tmp_path) == (tmp_path / train, None if "test" in val else tmp_path / val)


def test_one_train_folder_and_test_or_more_beside_train_and_val(tmp_path: Path) -> None:
    assert split_paths(tree(tmp_path / "one", "train2017")) == (tmp_path / "one" / "train2017", None)
    root = tree(tmp_path / "four", *nested("train", "val", "test", "extra"))
    assert split_paths(root) == (root / "train", root / "val")


@pytest.mark.parametrize("name", ["validation", "Val", "val"])
def test_beton_files_of_usual_names(tmp_path: Path, name: str) -> None:
    for file in ("train", name, "trainval_small"):
        (tmp_path / f"{file}.beton").touch()
    assert split_paths(tmp_path) == (tmp_path / "train.beton", tmp_path / f"{name}.beton")


@pytest.mark.parametrize(
    "folders",
    [
        ["train2014", "train2017", "val2017"],
        ["train", "val2014", "val2017"],
        ["trainA", "trainB", "testA", "testB"],
        ["train", "test", "unlabeled"],
        ["train_0", "train_1"],
        ["val", "test"],
        ["train", "imagenet-val"],
        ["train", "hold_out"],
        ["train", "unseen"],
        ["labeled", "unlabeled"],
        ["data/train", "data/Validation"],
        ["data/images/train2017", "data/images/val2017"],
        ["set/my_train/cat", "set/my_test/cat"],
        ["train", "validation", "car"],
        nested("train", "imagenet-val"),
        nested("val"),
        nested("fold1", "fold2", "fold3"),
        nested("2023", "2024"),
        nested("Berlin", "Paris"),
        ["siteA/cat", "siteA/dog", "siteA/owl", "siteB/cat", "siteB/dog"],
        ["part1/0", "part1/1", "part2/0", "part2/1"],
    ],
    ids=lambda folders: "+".join(dict.fromkeys(folder.partition("/")[0] for folder in folders)),
)
def test_unclear_splits_are_refused_with_what_is_there(tmp_path: Path, folders: list[str]) -> None:
    with pytest.raises(InputError, match=r"data is .*must be one split, or have one train and one val: give") as error:
        split_paths(tree(tmp_path / "base", *folders))
    for name in {folder.partition("/")[0] for folder in folders}:
        assert name in str(error.value)
    assert "list of the images" in str(error.value)


@pytest.mark.parametrize(
    "folders",
    [
        ["train", "car", "bus"],
        ["test", *(f"class{n}" for n in range(99))],
        ["train", "test", *(f"class{n}" for n in range(98))],
        ["valley", "devices", "trainer", "contest"],
        ["valid", "invalid"],
        ["freight_train", "test_tube"],
        ["rail/freight_train", "rail/test_tube", "rail/train"],
        ["labeled"],
        ["steam train", "toy train"],
        ["animals/cat", "animals/dog", "vehicles/car", "vehicles/bus", "vehicles/train"],
        ["animals/cat", "animals/small", "vehicles/car", "vehicles/small"],
        ["n01/images", "n02/images"],
        ["00/0a", "00/0b", "01/0a", "01/0b"],
        ["0", "1", "2"],
        ["val"],
    ],
    ids=lambda folders: "+".join(list(dict.fromkeys(folder.partition("/")[0] for folder in folders))[:3]),
)
def test_classes_are_no_splits(tmp_path: Path, folders: list[str]) -> None:
    assert split_paths(tree(tmp_path, *folders)) == (tmp_path, None)


def test_runs_beside_the_splits_are_no_classes(tmp_path: Path) -> None:
    tree(tmp_path, *nested("train"), "run1", "runs/run2")
    for run in ("run1", "runs/run2"):
        for name in ("config.json", "metrics.jsonl"):
            (tmp_path / run / name).touch()
    assert split_paths(tmp_path) == (tmp_path / "train", None)

"""kNN of a data set, end to end, with a backbone that measures mean brightness, in which the classes differ."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mvssl.config.recipe import Evaluation
from mvssl.evaluate.features import extract_features
from mvssl.evaluate.online_knn import check_knn_data, evaluate_online, scorable
from mvssl.evaluate.session import Session
from pipelines.runtime import InputError
from pipelines.storage import open_source
from tests.samples.networks import Brightness

EVALUATION = Evaluation(resize=32, crop=32, k=(3,))
SESSION = Session(device=torch.device("cpu"), batch_size=7)


def test_classes_of_different_brightness_are_all_recognised(images: Path) -> None:
    train, val = open_source(images / "train"), open_source(images / "val")
    assert evaluate_online(SESSION, Brightness(), train, val, EVALUATION).knn == {3: 1.0}
    assert evaluate_online(SESSION, Brightness(), train, None, EVALUATION).knn == {3: 1.0}


def test_a_val_split_that_lacks_a_class_is_compared_by_class_name(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "val", tmp_path / "val")
    shutil.rmtree(tmp_path / "val" / "class_0")
    train, val = open_source(images / "train"), open_source(tmp_path / "val")
    assert evaluate_online(SESSION, Brightness(), train, val, EVALUATION).knn == {3: 1.0}


def test_features_are_in_dataset_order_and_the_training_mode_is_restored(images: Path) -> None:
    train = open_source(images / "train")
    backbone = Brightness().train()
    whole = extract_features(SESSION, backbone, train, EVALUATION)
    assert whole.index.tolist() == list(range(36))
    assert whole.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert backbone.training
    some = extract_features(SESSION, backbone, train, EVALUATION, max_images=4)
    assert some.index.tolist() == [0, 12, 23, 35]
    assert torch.equal(some.values, whole.values[some.index])


def test_unsuitable_data_is_an_input_error(images: Path) -> None:
    train, val = open_source(images / "train"), open_source(images / "val")
    with pytest.raises(InputError, match="at most 36"):
        check_knn_data(train, val, Evaluation(k=(37,)))
    with pytest.raises(InputError, match="at most 35"):
        check_knn_data(train, None, Evaluation(k=(36,)))
    with pytest.raises(InputError, match="needs labels but the validation data"):
        check_knn_data(train, open_source(images / "val" / "class_0"), EVALUATION)


def test_images_without_labels_are_counted_if_only_some_have_none(images: Path, tmp_path: Path) -> None:
    train, bare = open_source(images / "train"), open_source(images / "val" / "class_0")
    assert scorable(bare, None) == (False, None, "no kNN: the images have no labels")
    shutil.copytree(images / "train", tmp_path / "some")
    first = next((tmp_path / "some" / "class_0").iterdir())
    first.rename(tmp_path / "some" / first.name)
    some = open_source(tmp_path / "some")
    assert scorable(some, None)[2] == "no kNN: 1 of 36 images have no labels"
    assert scorable(train, some)[2] == "no kNN: 1 of 36 validation images have no labels"


def test_validation_images_of_one_class_have_no_accuracy(images: Path, tmp_path: Path) -> None:
    train = open_source(images / "train")
    shutil.copytree(images / "val" / "class_1", tmp_path / "class_1")
    words = "are of the one class 'class_1'"
    assert scorable(train, open_source(tmp_path))[::2] == (False, f"no kNN: of the validation images all {words}")
    shutil.copytree(images / "val" / "class_1", tmp_path / "other")
    possible, _, note = scorable(train, open_source(tmp_path))
    assert (possible, note) == (False, f"no kNN: of the validation images those of classes that train has {words}")


def test_images_of_classes_that_train_lacks_are_not_scored(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "val", tmp_path / "val")
    (tmp_path / "val" / "class_0").rename(tmp_path / "val" / "class_9")
    train, val = open_source(images / "train"), open_source(tmp_path / "val")
    possible, scored, note = scorable(train, val)
    assert possible
    assert scored is not None
    assert [scored.key(index).split("/")[0] for index in range(len(scored))] == ["class_1"] * 4 + ["class_2"] * 4
    assert note == ("kNN leaves out 4 of 12 validation images, of 1 class that no training image has (class_9)")
    assert evaluate_online(SESSION, Brightness(), train, scored, EVALUATION).knn == {3: 1.0}
    assert scorable(train, open_source(images / "val"))[2] == ""
    (tmp_path / "val" / "class_9").rename(tmp_path / "val" / "Class_0 ")
    note = scorable(train, open_source(tmp_path / "val"))[2]
    assert note.endswith("that no training image has (Class_0 ; train has 'class_0', not 'Class_0 ')")
    shutil.copy(next((tmp_path / "val").rglob("*.jpg")), tmp_path / "val" / "without.jpg")
    possible, _, note = scorable(train, open_source(tmp_path / "val"))
    assert (possible, note) == (False, "no kNN: 1 of 13 validation images have no labels")

"""CIFAR, STL-10 and IDX files, built from a few images as their publishers build them, give their pixels and labels."""

from __future__ import annotations

import gzip
import pickle
import re
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.storage import open_source
from pipelines.storage.forms.safe_pickle import RefusedPickleError, load_plain
from tests.samples.convert_runs import Run, digests
from tests.samples.form_samples import contents, pixels, pixels_of

RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
TEST = RNG.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
FINE = [n % 3 for n in range(12)]
NAMES = ["airplane", "bird", "cat"]


def planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def said(images: np.ndarray, labels: list[int], names: list[str]) -> set[tuple[bytes, str]]:
    return {(image.tobytes(), names[label]) for image, label in zip(images, labels, strict=True)}


def python_ten(folder: Path, *, protocol: int = 2, text: bool = False) -> Path:
    folder.mkdir(parents=True)

    def dump(name: str, content: dict[str, Any]) -> None:
        keyed: dict[Any, Any] = content if text else {key.encode(): value for key, value in content.items()}
        (folder / name).write_bytes(pickle.dumps(keyed, protocol))

    for n in range(2):
        part = slice(6 * n, 6 * n + 6)
        names = [f"x_{k}.png".encode() for k in range(6 * n, 6 * n + 6)]
        dump(f"data_batch_{n + 1}", {"data": planes(TRAIN[part]), "labels": FINE[part], "filenames": names})
    dump("test_batch", {"batch_label": "testing", "labels": [0, 1, 2, 0], "data": planes(TEST)})
    dump("batches.meta", {"label_names": NAMES, "num_vis": 3072})
    (folder / "readme.html").write_text("<html>")
    return folder


def pack(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    return path


def check_ten(run: Run, source: Path, dst: Path) -> None:
    outcome = run(source, dst)
    assert outcome.code == 0, outcome.err
    assert "is CIFAR-10 (" in outcome.out
    assert "test split is converted as val: train 12 images, val 4 images, 3 classes." in outcome.out
    assert pixels(dst / "train") == said(TRAIN, FINE, NAMES)
    assert pixels(dst / "val") == said(TEST, [0, 1, 2, 0], NAMES)
    assert open_source(dst / "train").classes == tuple(NAMES)


@pytest.mark.parametrize(("protocol", "text"), [(2, True), (2, False), (4, True), (5, False)])
def test_cifar_10_python(run: Run, tmp_path: Path, protocol: int, text: bool) -> None:
    folder = python_ten(tmp_path / "root" / "cifar-10-batches-py", protocol=protocol, text=text)
    check_ten(run, folder, tmp_path / "a")
    pack(folder, folder.parent / "cifar-10-python.tar.gz")
    check_ten(run, folder.parent, tmp_path / "b")  # torchvision's root, with the archive
    check_ten(run, pack(folder, tmp_path / "download.tar.gz"), tmp_path / "c")
    assert digests(tmp_path / "a")["train/index.npy"] == digests(tmp_path / "c")["train/index.npy"]


def test_two_data_sets_in_a_folder(run: Run, tmp_path: Path) -> None:
    python_ten(tmp_path / "root/cifar-10-batches-py")
    folder = python_ten(tmp_path / "root/cifar-100-python")
    labels = {"fine_labels": [0] * 4, "coarse_labels": [0] * 4, "data": planes(TEST)}
    for path in folder.iterdir():
        path.unlink()
    (folder / "train").write_bytes(pickle.dumps(labels))
    assert "must hold one data set" in run(tmp_path / "root", tmp_path / "d").err


def test_jpegs_of_a_quality(run: Run, tmp_path: Path) -> None:
    folder = python_ten(tmp_path / "cifar-10-batches-py")
    assert run(folder, tmp_path / "d", "--quality", 90, "--split", "train").code == 0
    assert all(data.startswith(b"\xff\xd8") for data, _ in contents(tmp_path / "d"))
    assert run(folder, tmp_path / "b", "--format", "beton", "--split", "train", "--label", "none").code == 0
    assert {pixels_of(data).tobytes() for data, _ in contents(tmp_path / "b")} == {i.tobytes() for i in TRAIN}


def test_cifar_10_binary(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()

    def records(images: np.ndarray, labels: list[int]) -> bytes:
        return np.concatenate([np.array(labels, np.uint8)[:, None], planes(images)], axis=1).tobytes()

    (folder / "data_batch_1.bin").write_bytes(records(TRAIN[:6], FINE[:6]))
    (folder / "data_batch_2.bin").write_bytes(records(TRAIN[6:], FINE[6:]))
    (folder / "test_batch.bin").write_bytes(records(TEST, [0, 1, 2, 0]))
    (folder / "batches.meta.txt").write_text("\n".join([*NAMES, ""]))
    check_ten(run, folder, tmp_path / "a")
    check_ten(run, pack(folder, tmp_path / "cifar-10-binary.tar.gz"), tmp_path / "b")
    (folder / "test_batch.bin").write_bytes(records(TEST, [0, 1, 2, 3]))
    assert "has the label 3 (image 3) but labels must be 0 to 2" in run(folder, tmp_path / "c").err
    (folder / "test_batch.bin").write_bytes(records(TEST, [0, 1, 2, 0])[:-5])
    assert "no whole number of images of 3,073 bytes" in run(folder, tmp_path / "c").err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("binary", [False, True])
def test_cifar_100(run: Run, tmp_path: Path, binary: bool) -> None:
    coarse, big = [n % 2 for n in range(12)], ["animals", "vehicles"]
    folder = tmp_path / ("cifar-100-binary" if binary else "cifar-100-python")
    folder.mkdir()
    for name, images in (("train", TRAIN), ("test", TEST)):
        count = len(images)
        if binary:
            labels = np.stack([coarse[:count], FINE[:count]], axis=1).astype(np.uint8)
            (folder / f"{name}.bin").write_bytes(np.concatenate([labels, planes(images)], axis=1).tobytes())
        else:
            content = {b"data": planes(images), b"fine_labels": FINE[:count], b"coarse_labels": coarse[:count]}
            (folder / name).write_bytes(pickle.dumps(content, 2))
    if binary:
        (folder / "fine_label_names.txt").write_text("\n".join(NAMES))
        (folder / "coarse_label_names.txt").write_text("\n".join(big))
    else:
        (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": NAMES, b"coarse_label_names": big}, 2))
    for source in (folder, pack(folder, tmp_path / "a.tar.gz")):
        dst = tmp_path / "out" / source.name
        outcome = run(source, dst / "fine")
        assert f"CIFAR-100 ({'binary' if binary else 'Python'} version, fine labels)" in outcome.out
        assert pixels(dst / "fine" / "train") == said(TRAIN, FINE, NAMES)
        assert run(source, dst / "coarse", "--label", "coarse").code == 0
        assert pixels(dst / "coarse" / "val") == said(TEST, coarse[:4], big)
    assert "--label is 'x' but must be fine, coarse or none" in run(folder, tmp_path / "x", "--label", "x").err


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_pickles_run_no_code(run: Run, tmp_path: Path) -> None:
    folder = python_ten(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil(), b"labels": [1]}))
    outcome = run(folder, tmp_path / "d")
    assert "which could run code; download it again" in outcome.err
    assert "this ran" not in outcome.out
    with pytest.raises(RefusedPickleError, match=r"builtins\.eval"):
        load_plain(b"cbuiltins\neval\n(S'1'\ntR.")
    with pytest.raises(RefusedPickleError, match="no pickle that can be read"):
        load_plain(b"\x80\x02}")
    array = np.arange(6).reshape(2, 3)
    for protocol in range(6):
        assert np.array_equal(load_plain(pickle.dumps(array, protocol)), array)
        assert load_plain(pickle.dumps([1, "a", b"b", None, (2.5,), {3}], protocol)) == [
            1,
            "a",
            b"b",
            None,
            (2.5,),
            {3},
        ]


def test_wrong_checksum_and_damage(run: Run, tmp_path: Path) -> None:
    folder = python_ten(tmp_path / "cifar-10-batches-py")
    many = np.zeros((10_000, 3072), np.uint8)
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": many, b"labels": [0] * 10_000}, 2))
    outcome = run(folder, tmp_path / "d")
    assert re.search("has the MD5 .* but the published file of so many images has d4bba439", outcome.err)
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": many[:5], b"labels": [0] * 4}, 2))
    assert "5 images and 4 labels" in run(folder, tmp_path / "d").err
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": many[:5, :100], b"labels": [0] * 5}, 2))
    assert "uint8 [5, 100] but must be uint8 [N, 3072]" in run(folder, tmp_path / "d").err
    (folder / "data_batch_1").unlink()
    (folder / "data_batch_2").write_bytes(pickle.dumps({b"data": many[:5], b"labels": [0] * 5}, 2))
    assert "has 1 of CIFAR-10's 2 batches but not data_batch_1: copy that file too" in run(folder, tmp_path / "d").err
    packed = pack(python_ten(tmp_path / "x" / "cifar-10-batches-py"), tmp_path / "cifar-10-python.tar.gz")
    packed.write_bytes(packed.read_bytes()[:-3000])
    assert "is truncated or damaged" in run(packed, tmp_path / "d").err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_stl_10(run: Run, tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = RNG.integers(0, 256, (7, 96, 96, 3), dtype=np.uint8)
    columns = images.transpose(0, 3, 2, 1)  # planes, and columns in them
    (folder / "train_X.bin").write_bytes(columns[:3].tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 3, 2]))
    (folder / "test_X.bin").write_bytes(columns[3:5].tobytes())
    (folder / "test_y.bin").write_bytes(bytes([2, 2]))
    (folder / "unlabeled_X.bin").write_bytes(columns[5:].tobytes())
    (folder / "class_names.txt").write_text("\n".join(NAMES))
    (folder / "fold_indices.txt").write_text("0 1\n")
    source = pack(folder, tmp_path / "stl10_binary.tar.gz") if packed else tmp_path
    outcome = run(source, tmp_path.parent / f"{tmp_path.name}-d")
    assert outcome.code == 0, outcome.err
    assert "train 3 images, val 2 images, unlabeled 2 images" in outcome.out
    base = tmp_path.parent / f"{tmp_path.name}-d"
    assert pixels(base / "train") == said(images[:3], [0, 2, 1], NAMES)
    assert pixels(base / "val") == said(images[3:5], [1, 1], NAMES)
    assert pixels(base / "unlabeled") == {(image.tobytes(), "") for image in images[5:]}
    (folder / "train_y.bin").unlink()
    assert "not its labels train_y.bin" in run(folder, tmp_path / "e").err


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


DIGITS = RNG.integers(0, 256, (8, 28, 28), dtype=np.uint8)


def mnist(folder: Path, prefix: str = "", test: str = "t10k") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", slice(0, 5)), (test, slice(5, 8))):
        labels = (np.arange(8, dtype=np.uint8) % 3)[part]
        (folder / f"{prefix}{split}-images-idx3-ubyte").write_bytes(idx(DIGITS[part]))
        (folder / f"{prefix}{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def compress(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(run: Run, tmp_path: Path, packed: bool) -> None:
    folder = mnist(tmp_path / "MNIST" / "raw")
    if packed:
        compress(folder)
    expected = said(DIGITS[:5], [0, 1, 2, 0, 1], ["0", "1", "2"])
    for number, source in enumerate((folder, tmp_path / "MNIST")):
        outcome = run(source, tmp_path / f"d{number}")
        assert outcome.code == 0, outcome.err
        assert "train 5 images, val 3 images, 3 classes" in outcome.out
        assert pixels(tmp_path / f"d{number}" / "train") == expected
    images = next(folder.glob("train-images*"))
    assert "but not its labels train-labels-idx1-ubyte" in run(images, tmp_path / "e").err
    assert run(images, tmp_path / "e", "--label", "none").code == 0
    assert len(open_source(tmp_path / "e")) == 5
    images.write_bytes(images.read_bytes()[:-40])
    assert "is truncated or damaged" in run(folder, tmp_path / "f").err
    assert not (tmp_path / "f").exists()


def test_emnist(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "gzip"
    for variant in ("letters", "digits"):
        mnist(folder, f"emnist-{variant}-", "test")
        (folder / f"emnist-{variant}-mapping.txt").write_text("0 65\n1 66\n2 67\n")
    assert "several data sets (digits, letters): choose one" in run(folder, tmp_path / "d").err
    assert run(folder, tmp_path / "d", "--image", "letters").code == 0
    assert pixels(tmp_path / "d" / "train") == said(DIGITS[:5], [0, 1, 2, 0, 1], ["A", "B", "C"])
    with zipfile.ZipFile(tmp_path / "gzip.zip", "w") as archive:
        for path in folder.iterdir():
            packed = path.suffix != ".txt"
            data = path.read_bytes()
            archive.writestr(f"gzip/{path.name}{'.gz' if packed else ''}", gzip.compress(data) if packed else data)
    assert run(tmp_path / "gzip.zip", tmp_path / "e", "--image", "digits").code == 0
    assert pixels(tmp_path / "e" / "val") == said(DIGITS[5:], [2, 0, 1], ["A", "B", "C"])

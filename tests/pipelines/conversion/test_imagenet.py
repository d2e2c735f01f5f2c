"""ImageNet's archives, in miniature."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.conversion.command import Convert, convert
from pipelines.conversion.imagenet import read_classes
from pipelines.runtime import InputError
from pipelines.storage import open_source

WNIDS = ["n01440764", "n01443537", "n02105855"]
# Class of each image of the val archive, whose file names count from 1.
VAL = ["n02105855", "n01440764", "n02105855", "n01443537"]


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


TRAIN_IMAGES = {f"{wnid}/{wnid}_{n}": jpeg(10 * c + n) for c, wnid in enumerate(WNIDS) for n in (10, 2, 7)}
VAL_IMAGES = {f"ILSVRC2012_val_{n:08d}": jpeg(100 + n) for n in (1, 2, 3, 4)}


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet"
    root.mkdir()
    inner = {
        f"{wnid}.tar": tar({f"{k.split('/')[1]}.JPEG": v for k, v in TRAIN_IMAGES.items() if k.startswith(wnid)})
        for wnid in reversed(WNIDS)
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
    shuffled = {f"{name}.JPEG": VAL_IMAGES[name] for name in sorted(VAL_IMAGES, reverse=True)}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(shuffled))
    return root


def contents(path: Path) -> dict[str, tuple[bytes, str]]:
    source = open_source(path)
    return {source.key(i): (source.read(i).tobytes(), source.classes[source.labels[i]]) for i in range(len(source))}


EXPECTED_VAL = {f"{wnid}/{name}": (VAL_IMAGES[name], wnid) for wnid, name in zip(VAL, sorted(VAL_IMAGES), strict=True)}


def test_train_archive(archives: Path, tmp_path: Path) -> None:
    convert(Convert(src=archives / "ILSVRC2012_img_train.tar", dst=tmp_path / "d", shard_size=0.002))
    assert contents(tmp_path / "d") == {key: (data, key.split("/")[0]) for key, data in TRAIN_IMAGES.items()}
    source = open_source(tmp_path / "d")
    assert source.classes == tuple(WNIDS)
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_archive_converts_like_the_unpacked_folder(archives: Path, tmp_path: Path) -> None:
    for key, data in TRAIN_IMAGES.items():
        path = tmp_path / "unpacked" / f"{key}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    convert(Convert(src=tmp_path / "unpacked", dst=tmp_path / "a"))
    convert(Convert(src=archives / "ILSVRC2012_img_train.tar", dst=tmp_path / "b"))
    assert open_source(tmp_path / "a").fingerprint == open_source(tmp_path / "b").fingerprint
    for name in ("shard-000000.tar", "index.npy", "keys.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


LABEL_FILES = {
    "wnids": "\n".join(VAL) + "\n",
    "pairs": "".join(f"{n}.JPEG {w}\n" for w, n in sorted(zip(VAL, sorted(VAL_IMAGES), strict=True))),
    "paths": "".join(f"val/{n}.JPEG\t{w}\n" for w, n in sorted(zip(VAL, sorted(VAL_IMAGES), strict=True))),
    "kaggle": "ImageId,PredictionString\n"
    + "".join(f"{n},{w} 85 1 499 272 {w} 3 4 5 6\n" for w, n in zip(VAL, sorted(VAL_IMAGES), strict=True)),
}


@pytest.mark.parametrize("kind", LABEL_FILES)
def test_val_archive(archives: Path, tmp_path: Path, kind: str) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text(LABEL_FILES[kind])
    convert(Convert(src=archives / "ILSVRC2012_img_val.tar", dst=tmp_path / "d", val_labels=labels))
    assert contents(tmp_path / "d") == EXPECTED_VAL


# ImageNet's own ground truth is not in sorted order; lines may have a description.
OWN_ORDER = ["n02105855", "n01440764", "n01443537"]


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("named", [False, True])
def test_integers_count_in_the_order_of_the_classes_file(
    archives: Path, tmp_path: Path, start: int, named: bool
) -> None:
    numbers = [OWN_ORDER.index(wnid) + start for wnid in VAL]
    names = sorted(VAL_IMAGES)
    rows = [f"{name} {number}" if named else f"{number}" for name, number in zip(names, numbers, strict=True)]
    (tmp_path / "labels.txt").write_text("\n".join(rows))
    (tmp_path / "classes.txt").write_text("".join(f"{wnid} a thing, another\n" for wnid in OWN_ORDER))
    convert(
        Convert(
            src=archives / "ILSVRC2012_img_val.tar",
            dst=tmp_path / "d",
            val_labels=tmp_path / "labels.txt",
            classes=tmp_path / "classes.txt",
        )
    )
    assert contents(tmp_path / "d") == EXPECTED_VAL
    assert open_source(tmp_path / "d").classes == tuple(sorted(OWN_ORDER))


def test_both_archives_agree_on_labels(archives: Path, tmp_path: Path) -> None:
    """Val has no image of the second class."""
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(["n02105855", "n01440764", "n02105855", "n02105855"]))
    convert(Convert(src=archives, dst=tmp_path / "d", val_labels=labels))
    train, val = open_source(tmp_path / "d" / "train"), open_source(tmp_path / "d" / "val")
    assert (len(train), len(val)) == (9, 4)
    assert train.classes == val.classes == tuple(WNIDS)
    assert sorted(val.labels.tolist()) == [0, 2, 2, 2]


def test_classes_file_numbers_a_val_archive_alone(archives: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("n02105855\n" * 4)
    (tmp_path / "classes.txt").write_text("\n".join(WNIDS))
    convert(
        Convert(
            src=archives / "ILSVRC2012_img_val.tar",
            dst=tmp_path / "d",
            val_labels=tmp_path / "labels.txt",
            classes=tmp_path / "classes.txt",
        )
    )
    assert open_source(tmp_path / "d").labels.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (None, None, r"does not say which class .* give --val-labels FILE"),
        ("n02105855\n" * 3, None, "has 3 lines but the archive has 4 images"),
        ("n02105855\nx n02105855\n" * 2, None, "lines with one word and lines with two"),
        ("".join(f"x{n}.JPEG n02105855\n" for n in range(4)), None, "no line for the image ILSVRC2012_val_00000001"),
        ("3\n1\n3\n2\n", None, r"holds integers, .* one wnid per line, with --classes FILE"),
        ("4\n1\n3\n2\n", "\n".join(WNIDS), "holds the number 4 but --classes .* has 3 lines|--classes has 3 lines"),
        ("0\n1\n3\n2\n", "\n".join(WNIDS), "holds the number 3 but --classes has 3 lines"),
        ("1\n1\n2\n2\n", "\n".join(WNIDS), "may count from 0 or from 1: write wnids"),
        ("n09999999\n" * 4, "\n".join(WNIDS), "has the class 'n09999999'"),
        ("n02105855\n" * 4, "n01440764\nn01440764\n", "twice"),
        ("\n", None, "is empty"),
    ],
)
def test_wrong_label_files(
    archives: Path, tmp_path: Path, labels: str | None, classes: str | None, message: str
) -> None:
    files: dict[str, Any] = {}
    for name, content in (("val_labels", labels), ("classes", classes)):
        if content is not None:
            (tmp_path / name).write_text(content)
        files[name] = None if content is None else tmp_path / name
    with pytest.raises(InputError, match=message):
        convert(Convert(src=archives / "ILSVRC2012_img_val.tar", dst=tmp_path / "d", **files))
    assert not (tmp_path / "d").exists()


@pytest.mark.timeout(20)  # 0.1 s in linear time, minutes in quadratic time
def test_long_classes_file(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("".join(f"class{n}\n" for n in range(100_000)))
    assert len(read_classes(tmp_path / "classes.txt")) == 100_000


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
@pytest.mark.parametrize("keep", [0, 100, 3000, "between members"])
def test_truncated_archive(archives: Path, tmp_path: Path, name: str, keep: int | str) -> None:
    path = archives / name
    if isinstance(keep, str):
        with tarfile.open(path) as archive:
            keep = archive.getmembers()[-1].offset
    os.truncate(path, keep)
    (tmp_path / "labels.txt").write_text(LABEL_FILES["wnids"])
    labels = tmp_path / "labels.txt" if "val" in name else None
    with pytest.raises(InputError, match=f"{name} (is truncated or damaged|holds no files): .*download it again"):
        convert(Convert(src=path, dst=tmp_path / "d", val_labels=labels))


def headers(path: Path, *, within: str = "") -> list[int]:
    """Offset of each member's header in the archive, or in the archive `within` it."""
    with tarfile.open(path) as archive:
        if not within:
            return [info.offset for info in archive.getmembers()]
        info = archive.getmember(within)
        with tarfile.open(fileobj=archive.extractfile(info)) as inner:
            return [info.offset_data + member.offset for member in inner.getmembers()]


@pytest.mark.parametrize("member", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "within"), [("train", ""), ("train", WNIDS[0]), ("train", WNIDS[2]), ("val", "")], ids=str
)
def test_damaged_header_does_not_drop_the_rest(
    archives: Path, tmp_path: Path, name: str, within: str, member: int
) -> None:
    path = archives / f"ILSVRC2012_img_{name}.tar"
    at = headers(path, within=within and f"{within}.tar")[member]
    content = bytearray(path.read_bytes())
    content[at + 3] ^= 1
    path.write_bytes(content)
    (tmp_path / "labels.txt").write_text(LABEL_FILES["wnids"])
    labels = tmp_path / "labels.txt" if name == "val" else None
    with pytest.raises(InputError, match=rf"{path.name} is truncated or damaged: .*byte {at}.*download it again"):
        convert(Convert(src=path, dst=tmp_path / "d", val_labels=labels))


def test_header_of_zeros_followed_by_data_is_not_the_end(archives: Path, tmp_path: Path) -> None:
    """A preallocated download with a missing piece."""
    path = archives / "ILSVRC2012_img_train.tar"
    at = headers(path)[1]
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(512))
    with pytest.raises(InputError, match=f"at byte {at} there is neither a file nor the end marker"):
        convert(Convert(src=path, dst=tmp_path / "d"))


def test_archive_filled_up_with_zeros(archives: Path, tmp_path: Path) -> None:
    """A preallocated download that stopped between two members."""
    path = archives / "ILSVRC2012_img_train.tar"
    at = headers(path)[2]
    os.truncate(path, at)
    os.truncate(path, at + (2 << 20))
    with pytest.raises(InputError, match=f"from byte {at} on there are only zeros; download it again"):
        convert(Convert(src=path, dst=tmp_path / "d"))


def test_bad_image_inside_an_archive(archives: Path, tmp_path: Path) -> None:
    images = {f"{name}.JPEG": data for name, data in VAL_IMAGES.items()}
    images["ILSVRC2012_val_00000002.JPEG"] = b"rotten"
    (archives / "ILSVRC2012_img_val.tar").write_bytes(tar(images))
    (tmp_path / "labels.txt").write_text(LABEL_FILES["wnids"])
    convert(Convert(src=archives / "ILSVRC2012_img_val.tar", dst=tmp_path / "d", val_labels=tmp_path / "labels.txt"))
    expected = {key: value for key, value in EXPECTED_VAL.items() if not key.endswith("2") or "n02105855" in key}
    assert contents(tmp_path / "d") == expected
    assert '"n01440764/ILSVRC2012_val_00000002"' in (tmp_path / "d" / "quarantine.jsonl").read_text()

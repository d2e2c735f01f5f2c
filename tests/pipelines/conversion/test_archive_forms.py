"""Zips, tars and WebDataset's tars, written by zipfile, tarfile and webdataset, give what the folder of images does."""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipelines.storage import open_source
from pipelines.storage.forms.look import expand_braces
from tests.samples.convert_runs import Run, assert_refused, digests
from tests.samples.form_samples import CLASSES, Item, as_folder, contents, encoded, items

EXPECTED = {(item.data, item.label) for item in items()}


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def make_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            add(archive, name, data)
    return path


def make_zip(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def nested(images: list[Item], prefix: str = "") -> list[tuple[str, bytes]]:
    return [(f"{prefix}{item.label}/{item.name}", item.data) for item in images]


@pytest.mark.parametrize("form", ["zip", "deflated.zip", "bzip2.zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("prefix", ["", "photos/", "./", "a/b/"])
def test_folders_as_classes(run: Run, tmp_path: Path, form: str, prefix: str) -> None:
    members = nested(items(), prefix)
    members += [("__MACOSX/cat/._1.jpg", b"x"), (prefix + "README.txt", b"text"), (prefix + ".hidden.jpg", b"x")]
    path = tmp_path / f"a.{form}"
    if form.endswith("zip"):
        methods = {"deflated.zip": zipfile.ZIP_DEFLATED, "bzip2.zip": zipfile.ZIP_BZIP2}
        make_zip(path, members, methods.get(form, zipfile.ZIP_STORED))
    else:
        make_tar(path, members, "w" + form.removeprefix("tar").replace(".", ":"))
    outcome = run(path, tmp_path / "d", "--shard-size", 0.002)
    assert outcome.code == 0, outcome.err
    assert f"is 1 {'zip archive' if 'zip' in form else 'tar'}: 9 images, 3 classes." in outcome.out
    assert contents(tmp_path / "d") == EXPECTED
    assert open_source(tmp_path / "d").classes == CLASSES
    folder = as_folder(tmp_path / "f", items())
    run(folder, tmp_path / "e", "--shard-size", 0.002)
    if "." not in form:  # packed tars keep their order
        differing = {
            name for name, digest in digests(tmp_path / "d").items() if digests(tmp_path / "e")[name] != digest
        }
        assert differing == {"manifest.json"}  # names the source


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_splits_in_an_archive(run: Run, tmp_path: Path, form: str) -> None:
    members = nested(items(), "set/train/") + nested(items(3, first=9), "set/val/")
    members += [("set/test/images/1.jpg", encoded(50))]
    path = (make_zip if form == "zip" else make_tar)(tmp_path / "a", members)  # no ending
    assert run(path, tmp_path / "d").code == 0
    assert contents(tmp_path / "d" / "train") == EXPECTED
    assert contents(tmp_path / "d" / "val") == {(i.data, i.label) for i in items(3, first=9)}
    assert contents(tmp_path / "d" / "test") == {(encoded(50), "")}


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_an_archive_for_each_class(run: Run, tmp_path: Path, form: str) -> None:
    (tmp_path / "in").mkdir()
    for label in CLASSES:
        members = [(item.name, item.data) for item in items() if item.label == label]
        (make_zip if form == "zip" else make_tar)(tmp_path / "in" / f"{label}.{form}", members)
    assert run(tmp_path / "in", tmp_path / "d").code == 0
    assert contents(tmp_path / "d") == EXPECTED
    for number in range(2):  # parts of one data set
        (make_zip if form == "zip" else make_tar)(tmp_path / f"part-{number}.{form}", [("1.jpg", encoded(number))])
    assert run(tmp_path / f"part-{{0..1}}.{form}", tmp_path / "e").code == 0
    assert contents(tmp_path / "e") == {(encoded(number), "") for number in range(2)}


def test_tiny_imagenet_and_a_test_split_without_labels(run: Run, tmp_path: Path) -> None:
    base = "tiny-imagenet-200"
    members = [(f"{base}/train/{item.label}/images/{item.name}", item.data) for item in items()]
    members += [(f"{base}/val/images/{item.name}", item.data) for item in items(3, first=9)]
    members += [(f"{base}/test/images/1.jpg", encoded(70))]
    table = "".join(f"{item.name}\t{item.label}\t0\t0\t62\t62\n" for item in items(3, first=9)).encode()
    path = make_zip(tmp_path / "tiny-imagenet-200.zip", [*members, (f"{base}/val/val_annotations.txt", table)])
    assert run(path, tmp_path / "d").code == 0
    assert contents(tmp_path / "d" / "val") == {(item.data, item.label) for item in items(3, first=9)}
    assert contents(tmp_path / "d" / "train") == EXPECTED
    path = make_zip(tmp_path / "a.zip", [member for member in members if "/val/" not in member[0]])
    assert "val" not in run(path, tmp_path / "e").out.splitlines()[0]
    assert contents(tmp_path / "e" / "test") == {(encoded(70), "")}


@pytest.mark.parametrize("labels", ["cls", "names", "json", "named json", "none", "captions"])
def test_webdataset(run: Run, tmp_path: Path, labels: str) -> None:
    import webdataset

    images = items(12)
    (tmp_path / "w").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "w" / "train-%06d.tar"), maxcount=5, verbose=0) as sink:
        for n, item in enumerate(images):
            number = CLASSES.index(item.label)
            sample: dict[str, object] = {"__key__": f"{n % 5:05d}", item.name[-3:]: item.data}
            if labels == "cls":
                sample |= {"cls": number, "json": {"label": 99, "caption": "x"}}
            elif labels == "names":
                sample["txt"] = item.label
            elif labels == "json":
                sample["json"] = {"label": number}
            elif labels == "named json":
                sample["json"] = {"label": number, "class_name": item.label}
            elif labels == "captions":
                sample["txt"] = f"a photo of {n}"
            else:
                sample["txt"] = f"a photograph of number {n}, with words that make it far too long for a class " * 2
            sink.write(sample)
    expected = {(i.data, i.label if "name" in labels else str(CLASSES.index(i.label))) for i in images}
    if labels in ("none", "captions"):
        expected = {(item.data, "") for item in images}
    for number, source in enumerate((tmp_path / "w", tmp_path / "w" / "train-{000000..000002}.tar", tmp_path / "w/*")):
        outcome = run(source, tmp_path / f"d{number}", "--shard-size", 0.003)
        assert outcome.code == 0, outcome.err
        assert "is WebDataset (3 tars): 12 images" in outcome.out
        assert contents(tmp_path / f"d{number}") == expected
    same = digests(tmp_path / "d0")
    assert same["index.npy"] == digests(tmp_path / "d1")["index.npy"]
    outcome = run(tmp_path / "w" / "train-{000000..000004}.tar", tmp_path / "e")
    assert "names 5 files of which 2 do not exist" in outcome.err
    if labels == "json":
        assert run(tmp_path / "w", tmp_path / "n", "--label", "none").code == 0
        assert open_source(tmp_path / "n").classes == ()
        assert "--label is 'x'" in run(tmp_path / "w", tmp_path / "m", "--label", "x").err


def test_samples_of_several_images(run: Run, tmp_path: Path) -> None:
    members = [m for n in range(4) for m in ((f"{n}.left.png", encoded(n, "PNG")), (f"{n}.right.jpg", encoded(n + 9)))]
    path = make_tar(tmp_path / "a.tar", [*members, ("0.cls", b"0"), ("2.cls", b"1")])
    assert "several images for one sample" in run(path, tmp_path / "d").err
    assert run(path, tmp_path / "d", "--image", "right.jpg").code == 0
    assert contents(tmp_path / "d") == {
        (encoded(9), "0"),
        (encoded(10), ""),
        (encoded(11), "1"),
        (encoded(12), ""),
    }


def test_braces() -> None:
    assert list(expand_braces("a{08..11}b{x,y}")) == [f"a{n:02d}b{c}" for n in range(8, 12) for c in "xy"]
    assert list(expand_braces("{train,val}/{0..2}.tar")) == [f"{s}/{n}.tar" for s in ("train", "val") for n in range(3)]
    assert list(expand_braces("a{b}c")) == ["a{b}c"]
    assert list(expand_braces("a{b")) == ["a{b"]


def bad(name: str, at: Path) -> tuple[Path, str]:
    one = nested(items())
    if name == "truncated tar":
        path = make_tar(at / "a.tar", one)
        path.write_bytes(path.read_bytes()[:3000])
        return path, "a.tar is truncated or damaged .*: download it again"
    if name in ("truncated tar.gz", "damaged tar.gz"):
        path = make_tar(at / "a.tar.gz", one, "w:gz")
        data = bytearray(path.read_bytes())
        if name == "damaged tar.gz":
            data[-6] ^= 1  # of the checksum
        path.write_bytes(data if name == "damaged tar.gz" else data[:-2000])
        return path, "a.tar.gz is truncated or damaged"
    if name == "empty tar":
        return make_tar(at / "a.tar", []), "a.tar holds no files|no uncompressed tar"
    if name == "tar without images":
        return make_tar(at / "a.tar", [("a.mp3", b"1"), ("b.npy", b"2")]), r"holds no images \(it holds .mp3, .npy\)"
    if name == "tar that leads out":
        return make_tar(at / "a.tar", [("../a.jpg", b"1")]), "leads out of it"
    if name == "tar with a name twice":
        return make_tar(at / "a.tar", [("cat/a.jpg", b"1"), ("dog/a.jpg", b"1"), ("cat/a.jpg", b"2")]), "twice"
    if name == "label that is no text":
        return make_tar(at / "a.tar", [("a.jpg", encoded(1)), ("a.cls", b"\xff\xfe")]), "a.cls is no label in UTF-8"
    if name == "json that is none":
        return make_tar(at / "a.tar", [("a.jpg", encoded(1)), ("a.json", b"{")]), "a.json is no label"
    if name == "label out of range":
        return make_tar(at / "a.tar", [("a.jpg", encoded(1)), ("a.cls", b"-7")]), "has the label -7"
    if name == "tar of folds":
        return make_tar(at / "a.tar", nested(items(), "x/fold_1/") + nested(items(), "x/fold_2/")), "look like parts"
    if name == "pointer":
        (at / "a.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        return at / "a.tar", "a.tar is a pointer of Git LFS .*: run git lfs pull"
    path = make_zip(at / "a.zip", one)
    data = bytearray(path.read_bytes())
    if name == "truncated zip":
        path.write_bytes(data[: len(data) // 2])
        return path, "a.zip is truncated or damaged"
    if name == "first part of a zip":
        path = at / "a.zip.001"
        path.write_bytes(data[: len(data) // 2])
        return path, r"is a part of a zip in several files: join them first \(cat a.zip.\* > all.zip\)"
    if name == "encrypted zip":
        central = data.index(b"PK\1\2")
        data[central + 8] |= 1
        path.write_bytes(data)
        return path, "a.zip is encrypted .*7z x a.zip"
    if name == "unknown method":
        central = data.index(b"PK\1\2")
        data[central + 10 : central + 12] = struct.pack("<H", 9)
        path.write_bytes(data)
        return path, "is compressed with Deflate64"
    if name == "zip with files that share bytes":
        first = data.index(b"PK\1\2")
        second = data.index(b"PK\1\2", first + 4)
        data[second + 42 : second + 46] = data[first + 42 : first + 46]
        path.write_bytes(data)
        return path, "is a zip bomb"
    if name == "zip with a name twice":
        with pytest.warns(UserWarning, match="Duplicate"):
            make_zip(path, [*one, one[0]])
        return path, "twice"
    if name == "zip that leads out":
        return make_zip(at / "b.zip", [("../../a.jpg", b"1")]), "leads out of it"
    if name == "zip with splits in each class":
        files = [(f"{item.label}/{split}/{item.name}", item.data) for item in items() for split in ("train", "val")]
        return make_zip(at / "b.zip", files), r"hold the same subfolders \(train, val, .*: write it again"
    if name == "zip without images":
        return make_zip(at / "b.zip", [("a.parquet", b"1")]), r"holds no images \(it holds 1 .parquet\)"
    assert name == "empty zip"
    return make_zip(at / "b.zip", []), "holds no images"


@pytest.mark.parametrize(
    "name",
    [
        "truncated tar",
        "truncated tar.gz",
        "damaged tar.gz",
        "empty tar",
        "tar without images",
        "tar that leads out",
        "tar with a name twice",
        "label that is no text",
        "json that is none",
        "label out of range",
        "tar of folds",
        "pointer",
        "truncated zip",
        "first part of a zip",
        "encrypted zip",
        "unknown method",
        "zip with files that share bytes",
        "zip with a name twice",
        "zip that leads out",
        "zip with splits in each class",
        "zip without images",
        "empty zip",
    ],
)
def test_what_cannot_be_read_is_said(run: Run, tmp_path: Path, name: str) -> None:
    path, message = bad(name, tmp_path)
    assert_refused(run, path, tmp_path / "d", message)


@pytest.mark.parametrize("lie", ["size", "checksum"])
def test_an_entry_that_lies_is_quarantined(run: Run, tmp_path: Path, lie: str) -> None:
    path = make_zip(tmp_path / "a.zip", nested(items()), zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    if lie == "size":
        data[at + 24 : at + 28] = struct.pack("<L", 40)  # of an image of hundreds of bytes
    else:
        data[at + 16] ^= 1
    path.write_bytes(data)
    assert run(path, tmp_path / "d").code == 0
    (line,) = (tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()
    assert re.search("more than the 40 bytes|checksum in the zip is wrong", json.loads(line)["reason"])
    assert len(contents(tmp_path / "d")) == len(items()) - 1

"""Lists of images as people bring them: encodings, tables, labels of numbers, odd names."""

from __future__ import annotations

import codecs
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from pipelines.runtime import InputError
from pipelines.storage import align_labels, open_source


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for name in ("a.jpg", "b c.jpg", "café.jpg", "d,e.jpg", "x\ty.jpg"):
        write(folder / name)
    return folder


def write(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)


def opened(data: Path, content: bytes, name: str = "list.txt") -> tuple[list[str], list[str | None]]:
    """Keys and class names of the images of a list."""
    (data / name).write_bytes(content)
    source = open_source(data / name)
    keys = [source.key(index) for index in range(len(source))]
    return keys, [source.classes[label] if label >= 0 else None for label in source.labels.tolist()]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (["0", "1", "2"], ("0", "1", "2"), [0, 1, 2]),
        (["2", "0", "10"], ("0", "2", "10"), [1, 0, 2]),
        (["2023", "2024", "2025"], ("2023", "2024", "2025"), [0, 1, 2]),
        (["1_0", "10", "5"], ("10", "1_0", "5"), [1, 0, 2]),
        (["001", "1", "2"], ("001", "1", "2"), [0, 1, 2]),
        (["1", "1.0", "+1"], ("+1", "1", "1.0"), [1, 2, 0]),
        (["٣", "3", "²"], ("3", "²", "٣"), [2, 0, 1]),
        (["-2", "7", "-1"], ("-2", "7"), [0, 1, -1]),
        (["99999999999999999999", "7", "7"], ("7", "99999999999999999999"), [1, 0, 0]),
    ],
)
def test_labels_are_names(tmp_path: Path, labels: list[str], classes: tuple[str, ...], numbers: list[int]) -> None:
    write(tmp_path / "i.png")
    (tmp_path / "l.txt").write_text("".join(f"i.png\t{label}\n" for label in labels), encoding="utf-8")
    source = open_source(tmp_path / "l.txt")
    assert source.classes == classes
    assert source.labels.tolist() == numbers


def test_lists_with_other_classes_agree_by_name(tmp_path: Path) -> None:
    write(tmp_path / "i.png")
    for name, labels in (("train", ["1", "18", "90"]), ("val", ["90", "18"])):
        (tmp_path / f"{name}.txt").write_text("".join(f"i.png {label}\n" for label in labels))
    train, val = open_source(tmp_path / "train.txt"), open_source(tmp_path / "val.txt")
    assert align_labels(val, train.classes).tolist() == [2, 1]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(data: Path, encoding: str, end: str) -> None:
    text = end.join(["a.jpg dog", "", "café.jpg dög", "b c.jpg\tdog", ""])
    marks = {"utf-16-be": codecs.BOM_UTF16_BE}
    content = marks.get(encoding, b"") + text.encode(encoding)
    assert opened(data, content) == (["a.jpg", "café.jpg", "b c.jpg"], ["dog", "dög", "dog"])


def test_names_that_are_not_utf8_are_taken_as_they_are(data: Path) -> None:
    raw = b"caf\xe9-raw.jpg"
    (data / os.fsdecode(raw)).write_bytes((data / "a.jpg").read_bytes())
    (data / "list.txt").write_bytes(b"a.jpg\n" + raw + b"\n")
    source = open_source(data / "list.txt")
    assert source.read(1).tobytes() == (data / "a.jpg").read_bytes()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("x\ty.jpg", "x\ty.jpg"),
        ('"b c.jpg"', "b c.jpg"),
        (r".\café.jpg", "./café.jpg"),
        (unicodedata.normalize("NFD", "café.jpg"), "café.jpg"),
    ],
)
def test_other_ways_to_write_a_name(data: Path, line: str, name: str) -> None:
    assert opened(data, f"{line}\na.jpg\n".encode()) == ([name, "a.jpg"], [None, None])


@pytest.mark.parametrize("file", ["list.csv", "list.txt", "list.tsv"])
@pytest.mark.parametrize(
    ("table", "labels"),
    [
        ('path,label\na.jpg,dog\n"d,e.jpg","cat, big"\n', ["dog", "cat, big"]),
        ("Label, File Name\ndog, a.jpg\ncat, b c.jpg\n", ["dog", "cat"]),
        (",class,filename\n0,dog,a.jpg\n1,cat,b c.jpg\n", ["dog", "cat"]),
        ("image;target\r\na.jpg;7\r\nb c.jpg;3\r\n", ["7", "3"]),
        ("file\tclass\na.jpg\tdog\nb c.jpg\tcat\n", ["dog", "cat"]),
        ("path\na.jpg\nb c.jpg\n", [None, None]),
        ("split,image_path,label\ntrain,a.jpg,dog\n\nval,b c.jpg,dog\n", ["dog", "dog"]),
    ],
)
def test_tables_with_a_header(data: Path, file: str, table: str, labels: list[str | None]) -> None:
    names = ["a.jpg", "d,e.jpg" if "d,e" in table else "b c.jpg"]
    assert opened(data, table.encode(), file) == (names, labels)
    assert opened(data, codecs.BOM_UTF8 + table.encode(), file) == (names, labels)
    assert opened(data, table.encode("utf-16"), file) == (names, labels)


def test_comments_and_images_named_again(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(data / "#1.jpg")
    lines = b"# mine\na.jpg dog\n#1.jpg dog\n./a.jpg cat\nb c.jpg cat\na.jpg dog\n\x1a"
    keys = ["a.jpg", "#1.jpg", "./a.jpg", "b c.jpg", "a.jpg"]
    assert opened(data, lines) == (keys, ["dog", "dog", "cat", "cat", "dog"])
    assert f"2 of 5 lines name an image again, 1 with another label, such as {data}" in caplog.text


def test_a_table_without_labels_says_so(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert opened(data, b"path,species\na.jpg,dog\n", "list.csv") == (["a.jpg"], [None])
    assert "no column is named label, class, target" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.jpg,dog\nb c.jpg,cat\n", r"list.csv, line 1 is 'a.jpg,dog' but must be a header: write path,label there"),
        (b"path,label\na.jpg,dog\nb c.jpg\n", r"line 3 has 1 columns but the header has 2"),
        (b"path,label\na.jpg,dog\nd,e.jpg,cat\n", r"line 3 has 3 columns but the header has 2: put cells"),
        (b"path,label\na.jpg,dog\nb c.jpg,\n", r"line 3 has no label while other lines have one"),
        (b"path,label\na.jpg,dog\ngone.jpg,cat\n", r"line 3: the file 'gone.jpg' does not exist \(1 of 2"),
        (b"a.jpg\nf\xfcr.jpg\n", r"line 2: the file 'f\\xfcr.jpg' \(read as UTF-8 and as Latin-1\) does not exist"),
        (codecs.BOM_UTF16_LE + "a.jpg\n".encode("utf-16-le") + b"b", r"begins as UTF-16.* but is damaged at byte 14"),
        (b"\x1f\x8b\x08" + bytes(range(256)), r"nor a text list of image files \(one path per line\): check"),
    ],
)
def test_what_is_no_list_is_named_with_its_line(data: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(data, content, "list.csv")


@pytest.mark.parametrize(("ending", "remedy"), [("7z", "unpack them"), ("npy", "write their images to files")])
def test_an_archive_is_no_list(data: Path, ending: str, remedy: str) -> None:
    with pytest.raises(InputError, match=f"per line\\): {remedy}"):
        opened(data, bytes(5000), f"images.{ending}")


@pytest.mark.parametrize("line", ["a\0b.png", "x" * 200_000 + ".png", "a\0b.png\tlabel"])
@pytest.mark.parametrize("header", ["", "path,label\n"])
def test_names_that_no_file_can_have(line: str, header: str, tmp_path: Path) -> None:
    """Behind the part of the list that is looked at to see whether it is text."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    first = "0.png,a\n" if header else "0.png\n"
    for content in (header + first * 20_000 + line, header + line):
        (tmp_path / "list.txt").write_text(content)
        with pytest.raises(InputError, match=r"list\.txt"):
            open_source(tmp_path / "list.txt")

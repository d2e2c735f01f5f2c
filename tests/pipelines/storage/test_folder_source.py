"""Folders and lists as sources: indexing, labels, the cached index, odd file systems."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.files import cache_folder
from pipelines.runtime import InputError
from pipelines.storage import align_labels, file_index, folder, open_source, split_paths, text_list
from pipelines.storage.folder import cache_file, load_index


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mvssl"


def image(path: Path, color: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (color, 10, 20)).save(path, {".jpe": "JPEG"}.get(path.suffix.lower()))
    return path


def settle(root: Path) -> None:
    """Make every folder look an hour old, so that its index is cached."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (time.time() - 3600,) * 2)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for number, name in enumerate(["dog/b.jpg", "dog/deep/er/a.PNG", "cat/z.JPEG", "cat/a.webp", "bird/x.tiff"]):
        image(root / name, number)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / ".hidden.jpg").write_bytes(b"x")
    (root / ".git").mkdir()
    image(root / ".git" / "y.jpg")
    (root / "empty").mkdir()
    return root


def test_nested_folder(tree: Path) -> None:
    found: list[int] = []
    source = open_source(tree, progress=found.append)
    keys = ["bird/x.tiff", "cat/a.webp", "cat/z.JPEG", "dog/b.jpg", "dog/deep/er/a.PNG"]
    assert [source.key(i) for i in range(len(source))] == keys
    assert source.classes == ("bird", "cat", "dog")
    assert source.labels.tolist() == [0, 1, 1, 2, 2]
    assert source.labels.dtype == np.int64
    assert found[-1] == 5
    for i, key in enumerate(keys):
        assert source.read(i).dtype == np.uint8
        assert source.read(i).tobytes() == (tree / key).read_bytes()
        assert source.nbytes[i] == (tree / key).stat().st_size


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "jpe", "Png", "webp", "bmp", "tif", "TIFF", "ppm"])
def test_extensions(tmp_path: Path, extension: str) -> None:
    image(tmp_path / "d" / f"a.{extension}")
    assert len(open_source(tmp_path / "d")) == 1


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.jpg"):
        image(tmp_path / "d" / name)
    source = open_source(tmp_path / "d")
    assert [source.key(0), source.key(1)] == ["a.jpg", "b.jpg"]
    assert source.classes == ()
    assert source.labels.tolist() == [-1, -1]


def test_one_folder_that_only_says_images_is_no_class(tree: Path, tmp_path: Path) -> None:
    expected = open_source(tree)
    (tmp_path / "food").mkdir()
    tree.rename(tmp_path / "food/images")
    found = open_source(tmp_path / "food")
    assert found.classes == expected.classes
    assert found.labels.tolist() == expected.labels.tolist()
    for name in ("a.jpg", "b.jpg"):  # as Tiny ImageNet's val
        image(tmp_path / "val/images" / name)
    assert open_source(tmp_path / "val").classes == ()
    (tmp_path / "val/val_annotations.txt").write_text("b.jpg\tn01\t0\t0\na.jpg\tn02\t1\t1\n")
    assert [open_source(tmp_path / "val").classes[label] for label in open_source(tmp_path / "val").labels] == [
        "n02",
        "n01",
    ]


def test_images_above_the_class_folders_have_no_label(tree: Path) -> None:
    image(tree / "aaa.jpg")
    assert open_source(tree).labels.tolist() == [-1, 0, 1, 1, 2, 2]


def test_links_are_followed_but_not_in_cycles(tree: Path, tmp_path: Path) -> None:
    image(tmp_path / "elsewhere" / "q.jpg")
    (tree / "link").symlink_to(tmp_path / "elsewhere")
    (tree / "dog" / "up").symlink_to(tree)
    (tree / "dog" / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    source = open_source(tree)
    keys = [source.key(i) for i in range(len(source))]
    assert "link/q.jpg" in keys
    assert not any(key.startswith("dog/up") for key in keys)
    gone = keys.index("dog/gone.jpg")  # stays in the index, so that reading it names it
    with pytest.raises(FileNotFoundError, match="gone"):
        source.read(gone)


def test_empty_files_and_odd_names_stay(tmp_path: Path) -> None:
    root = tmp_path / "d"
    root.mkdir()
    (root / "zero.jpg").touch()
    with open(os.fsencode(root) + b"/\xff\xfe.jpg", "wb") as file:  # not UTF-8
        file.write(b"abc")
    source = open_source(root)
    sizes = {source.key(i): len(source.read(i)) for i in range(2)}
    assert sizes == {"zero.jpg": 0, r"\xff\xfe.jpg": 3}


def test_fingerprint_follows_the_data_not_the_place(tree: Path, tmp_path: Path) -> None:
    before = open_source(tree).fingerprint
    moved = tree.rename(tmp_path / "moved")
    assert open_source(moved).fingerprint == before
    image(moved / "cat" / "new.jpg")
    with_new = open_source(moved).fingerprint
    assert with_new != before
    (moved / "cat" / "new.jpg").rename(moved / "dog" / "new.jpg")
    assert open_source(moved).fingerprint not in (before, with_new)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("indexed again despite a fresh cache")


def add(tree: Path) -> None:
    image(tree / "cat" / "new.jpg")


def rename(tree: Path) -> None:
    (tree / "dog" / "deep" / "er" / "a.PNG").rename(tree / "dog" / "deep" / "er" / "c.PNG")


def delete(tree: Path) -> None:
    (tree / "bird" / "x.tiff").unlink()


@pytest.mark.parametrize("change", [add, rename, delete])
def test_cache_is_used_and_stale_one_noticed(
    tree: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    settle(tree)
    first = open_source(tree)
    assert cache_file(tree).is_file()
    with monkeypatch.context() as patch:
        patch.setattr(folder, "scan_folder", refuse)
        cached = open_source(tree)
    assert cached.fingerprint == first.fingerprint
    assert cached.classes == first.classes
    assert [cached.key(i) for i in range(5)] == [first.key(i) for i in range(5)]
    assert cached.read(4).tobytes() == first.read(4).tobytes()
    change(tree)
    fresh = open_source(tree)
    assert fresh.fingerprint == folder.open_path(tree, use_cache=False).fingerprint != first.fingerprint


def test_data_that_has_just_changed_is_not_cached(tree: Path) -> None:
    open_source(tree)
    assert not cache_file(tree).exists()


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04cut"])
def test_damaged_cache_is_rebuilt(tree: Path, content: bytes) -> None:
    settle(tree)
    first = open_source(tree)
    cache_file(tree).write_bytes(content)
    assert open_source(tree).fingerprint == first.fingerprint
    assert cache_file(tree).stat().st_size > len(content)


def test_any_damage_of_a_cached_index_is_noticed(tree: Path) -> None:
    """Also damage that zipfile calls an unknown compression or an encrypted file."""
    settle(tree)
    source = open_source(tree)
    expected = [source.key(i) for i in range(len(source))]
    cache, content = cache_file(tree), cache_file(tree).read_bytes()
    for position in range(0, len(content), 5):
        for bit in (1, 16):
            damaged = content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]
            cache.write_bytes(damaged)
            index = load_index(tree)
            assert index is None or [*index.keys] == expected


def test_unwritable_cache_is_no_error(tree: Path, tmp_path: Path) -> None:
    settle(tree)
    (tmp_path / "cache").write_text("a file instead of a folder")
    assert len(open_source(tree)) == 5


def test_cached_list_notices_a_changed_list_and_a_deleted_image(tree: Path) -> None:
    listing = tree / "list.txt"
    listing.write_text("cat/z.JPEG\ndog/b.jpg\n")
    settle(tree)
    assert len(open_source(listing)) == 2
    assert cache_file(listing).is_file()
    listing.write_text("cat/z.JPEG\n")
    assert len(open_source(listing)) == 1
    settle(tree)
    assert len(open_source(listing)) == 1
    (tree / "cat" / "z.JPEG").unlink()
    with pytest.raises(InputError, match="does not exist"):
        open_source(listing)


def test_list_without_labels_keeps_its_order(tree: Path) -> None:
    listing = tree / "list.txt"
    listing.write_text(f"dog/b.jpg\n\n{tree}/cat/z.JPEG\n")
    source = open_source(listing)
    assert [source.key(0), source.key(1)] == ["dog/b.jpg", f"{tree}/cat/z.JPEG"]
    assert source.classes == ()
    assert source.read(1).tobytes() == (tree / "cat" / "z.JPEG").read_bytes()


@pytest.mark.parametrize(
    ("lines", "classes", "labels"),
    [
        ("dog/b.jpg 3\ncat/z.JPEG 0\n", ("0", "3"), [1, 0]),
        ("dog/b.jpg\t1\ncat/z.JPEG\t-1\n", ("1",), [0, -1]),
        ("dog/b.jpg\t-1\ncat/z.JPEG\t-1\n", (), [-1, -1]),
        ("dog/b.jpg hound\ncat/z.JPEG cat\n", ("cat", "hound"), [1, 0]),
        ("dog/b.jpg\ta hound\ncat/z.JPEG\tcat\n", ("a hound", "cat"), [0, 1]),
    ],
)
def test_list_with_labels(tree: Path, lines: str, classes: tuple[str, ...], labels: list[int]) -> None:
    listing = tree / "list.txt"
    listing.write_text(lines)
    source = open_source(listing)
    assert source.classes == classes
    assert source.labels.tolist() == labels
    assert source.key(0) == "dog/b.jpg"


def test_list_of_names_with_spaces(tmp_path: Path) -> None:
    image(tmp_path / "my photo 1.jpg")
    (tmp_path / "list.txt").write_text("my photo 1.jpg\n")
    assert open_source(tmp_path / "list.txt").key(0) == "my photo 1.jpg"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("dog/b.jpg\nnot/there.jpg\n", r"line 2: the file 'not/there.jpg' does not exist \(1 of 2"),
        ("dog/b.jpg 1\n\ncat/z.JPEG\n", "line 3 has no label"),
        ("dog/b.jpg\tdog.jpg\n", "line 1 names two images, 'dog/b.jpg' and 'dog.jpg'"),
        ("dog/b.jpg,dog\n", r"line 1: the file 'dog/b.jpg,dog' does not exist .* needs the header path,label"),
        ("\n", "holds no images"),
        ("dog\n", r"line 1: the file 'dog' is a folder \(1 of 1 are missing\): write the paths of its images"),
        ("dog/b.jpg big dog\ncat/a.jpg cat\n", "line 1 has no label .*: give .*, such as 'big dog', goes behind a tab"),
        ("dog/b.jpg 1 2\n", "does not exist .* a class of several words, such as '1 2', goes behind a tab"),
        ('{"image": "dog/b.jpg"}\n', "does not exist .*; JSON is no list"),
        ("dog/b.jpg\0cat/a.jpg\0", "write each path on a line of its own"),
    ],
)
def test_wrong_lists(tree: Path, lines: str, message: str) -> None:
    (tree / "list.txt").write_text(lines)
    with pytest.raises(InputError, match=message):
        open_source(tree / "list.txt")


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist: give a folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match="holds no images: give"):
        open_source(tmp_path / "d")
    (tmp_path / "d" / "a.svg").write_bytes(b"<svg")
    with pytest.raises(InputError, match=r"holds no images; there are 1 \.svg: export them as PNG .*; give"):
        open_source(tmp_path / "d")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="neither a folder of images, nor"):
        open_source(tmp_path / "binary")


def test_split_paths(tmp_path: Path) -> None:
    assert split_paths(tmp_path) == (tmp_path, None)
    (tmp_path / "val").mkdir()
    assert split_paths(tmp_path) == (tmp_path, None)
    (tmp_path / "train").mkdir()
    assert split_paths(str(tmp_path)) == (tmp_path / "train", tmp_path / "val")
    (tmp_path / "val").rmdir()
    assert split_paths(tmp_path) == (tmp_path / "train", None)
    image(tmp_path / "bus" / "a.jpg")  # "train" is a class here
    assert split_paths(tmp_path) == (tmp_path, None)


def test_labels_of_a_val_split_that_lacks_a_class(tree: Path, tmp_path: Path) -> None:
    train = open_source(tree)
    for name in ("dog/1.jpg", "bird/2.jpg", "3.jpg"):
        image(tmp_path / "val" / name)
    val = open_source(tmp_path / "val")
    assert val.labels.tolist() == [-1, 0, 1]
    assert align_labels(val, train.classes).tolist() == [-1, 0, 2]
    with pytest.raises(InputError, match="the class 'cat'"):
        align_labels(train, val.classes)


def test_index_is_the_same_in_another_process(tree: Path) -> None:
    code = f"from pipelines.storage import open_source; print(open_source({str(tree)!r}).fingerprint)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == open_source(tree).fingerprint


def test_other_files_are_counted_by_extension(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tree / "dog" / "more.TXT").write_text("")
    (tree / "dog" / "README").write_text("")
    open_source(tree)
    assert f"{tree}: ignoring files without an image extension: 2 .txt, 1 without extension" in caplog.text


@pytest.mark.parametrize(
    ("ending", "form"), [("gif", "GIF"), ("jp2", "JPEG2000"), ("j2k", "JPEG2000"), ("avif", "AVIF")]
)
def test_rarer_formats_are_read_as_pillow_reads_them(tmp_path: Path, ending: str, form: str) -> None:
    """Of a GIF the first frame."""
    from PIL import features

    from pipelines.decode import make_decoder

    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (33, 47, 3), dtype=np.uint8)) for _ in range(2)]
    more = {"save_all": True, "append_images": pictures[1:]} if form == "GIF" else {}
    pictures[0].save(tmp_path / f"a.{ending}", form, **more)
    with Image.open(tmp_path / f"a.{ending}") as opened:
        expected = np.asarray(opened.convert("RGB"))
    source = open_source(tmp_path)
    decoder = make_decoder("auto", device="cpu", batch_size=1, threads=1)
    decoded = decoder([source.read(0)])
    decoder.close()
    assert decoded.failures == {}
    assert np.array_equal(decoded.pixels.numpy().reshape(33, 47, 3), expected)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    for name in ("cat/a.jpg", "dog/b.jpg"):
        image(tmp_path / "pair" / name)
    return tmp_path / "pair"


def test_folders_of_the_file_system_hold_no_data(pair: Path) -> None:
    for place in (pair, pair / "cat"):
        for name in ("lost+found", "@eaDir"):
            (place / name).mkdir()
            Image.new("RGB", (8, 6)).save(place / name / "thumbnail.jpg")
    source = open_source(pair)
    assert [source.key(i) for i in range(len(source))] == ["cat/a.jpg", "dog/b.jpg"]
    assert source.classes == ("cat", "dog")


def test_folders_of_the_file_system_are_no_classes_beside_train(tmp_path: Path) -> None:
    for name in ("train", "lost+found"):
        image(tmp_path / name / "a.jpg")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert split_paths(tmp_path) == (tmp_path / "train", None)


def test_link_to_itself_is_named_by_reading_it(pair: Path) -> None:
    (pair / "cat" / "self").symlink_to(pair / "cat" / "self")
    (pair / "cat" / "self.jpg").symlink_to(pair / "cat" / "self.jpg")
    source = open_source(pair)
    assert [source.key(i) for i in range(len(source))] == ["cat/a.jpg", "cat/self.jpg", "dog/b.jpg"]
    with pytest.raises(OSError, match=r"self\.jpg"):
        source.read(1)


def test_without_a_home_the_cache_is_temporary(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert cache_folder() == tmp_path / "temporary" / f"mvssl-{os.getuid()}"
    for path in (pair, pair / "cat", pair / "dog"):
        os.utime(path, (1e9, 1e9))
    open_source(pair)
    assert cache_file(pair).is_file()
    assert cache_folder().stat().st_mode & 0o77 == 0  # for this user alone


def test_change_while_a_list_is_indexed_makes_the_index_stale(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pair / "list.txt").write_text("cat/a.jpg\ndog/b.jpg\n")
    os.utime(pair / "cat", (1e9, 1e9))
    size = text_list._file_size

    def size_and_change(path: str) -> int:
        found = size(path)
        os.utime(pair / "cat", (2e9, 2e9))  # as if a file was added or removed
        return found

    monkeypatch.setattr(text_list, "_file_size", size_and_change)
    index = text_list.read_list(pair / "list.txt")
    assert dict(zip(index.watched, index.watched_mtime.tolist(), strict=True))[str(pair / "cat")] == 10**18


@pytest.mark.parametrize("name", ["nowhere/a.jpg", "cat/a.jpg/b.jpg"])
def test_list_of_a_file_in_a_folder_that_is_not_there(pair: Path, name: str) -> None:
    (pair / "list.txt").write_text(f"cat/a.jpg\n{name}\n")
    with pytest.raises(InputError, match=f"line 2: the file '{name}' does not exist"):
        open_source(pair / "list.txt")


def spoil(folder: Path, *names: str, content: bytes = b"x") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("names", "found", "remedy"),
    [
        (["a.heic", "b.HEIC", "c.heif"], "2 .heic, 1 .heif", "pip install pillow-heif, or convert them to JPEG"),
        (["a.7z", "b.7z"], "2 .7z", "unpack them"),
        (["a.npy"], "1 .npy", "write their images to files"),
        (["a.dcm"], "1 .dcm", "export them as PNG"),
        (["a.CR2", "b.nef"], "1 .cr2, 1 .nef", r"develop them to JPEG or TIFF \(\.cr2, \.nef\)"),
        (["clip.mp4"], "1 .mp4", "extract their frames"),
        (["._a.jpg", ".b.png"], "2 hidden", "give a folder"),
        (["notes", "more"], "2 without extension", "give a folder"),
    ],
)
def test_what_is_there_instead_of_images_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], found: str, remedy: str
) -> None:
    monkeypatch.setattr(file_index, "IMAGE_EXTENSIONS", (".jpg", ".png"))  # as without pillow_heif
    with pytest.raises(InputError, match=rf"holds no images; there are {found}: .*{remedy}"):
        open_source(spoil(tmp_path / "d", *names))


def test_a_folder_of_links_to_nothing_and_empty_files_and_a_single_image(tmp_path: Path) -> None:
    (spoil(tmp_path / "d") / "folder").symlink_to("/nowhere")
    with pytest.raises(InputError, match="holds no images; there are 1 links to nothing"):
        open_source(tmp_path / "d")
    (spoil(tmp_path / "d", "a.jpg", content=b"") / "b.jpg").symlink_to("/nowhere/b.jpg")
    with pytest.raises(InputError, match=r"no image that can be read: all 2 files are empty, .*, such as a\.jpg: copy"):
        open_source(tmp_path / "d")
    image(tmp_path / "d" / "c.jpg")
    with pytest.raises(InputError, match="it is one image: give the folder that it is in"):
        open_source(tmp_path / "d" / "c.jpg")


def test_images_of_unknown_endings_are_noticed(tmp_path: Path) -> None:
    image(tmp_path / "a.png").rename(spoil(tmp_path / "d") / "a.picture")
    with pytest.raises(InputError, match=r"1 \.picture: rename them to .*a\.picture begins as an image"):
        open_source(tmp_path / "d")


@pytest.mark.parametrize("ending", ["jfif", "JFIF", "jif", "pjpeg", "pgm", "pnm"])
def test_other_endings_of_the_same_formats(tmp_path: Path, ending: str) -> None:
    file = tmp_path / "d" / f"a.{ending}"
    file.parent.mkdir()
    Image.new("L", (8, 6)).save(file, "PPM" if ending[0] == "p" and ending != "pjpeg" else "JPEG")
    assert open_source(tmp_path / "d").key(0) == file.name


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("name", ["3f2a9c", "photo.1", "a.jpg?size=large"])
def test_files_without_ending_are_taken_if_they_begin_as_images(tmp_path: Path, form: str, name: str) -> None:
    spoil(tmp_path / "d", "README", "LICENSE", "x", content=b"Pictures of BMs")
    spoil(tmp_path / "d", "empty", content=b"")
    Image.new("RGB", (8, 6)).save(tmp_path / "d" / name, form)
    source = open_source(tmp_path / "d")
    assert [source.key(index) for index in range(len(source))] == [name]


def test_what_systems_leave_is_ignored_and_counted_also_from_the_cache(
    pair: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (pair / "cat" / name).write_bytes(b"x")
    image(pair / "__MACOSX" / "cat" / "._a.jpg")
    image(pair / "__MACOSX" / "cat" / "b.jpg")
    image(pair / "runs" / "first" / "views.png")
    for name in ("config.json", "metrics.jsonl"):
        (pair / "runs" / "first" / name).touch()
        (pair / name).touch()  # the data themselves are never skipped
    (pair / "dog" / "empty.jpg").touch()
    settle(pair)
    for _ in range(2):
        caplog.clear()
        source = open_source(pair)
        assert [source.key(index) for index in range(len(source))] == ["cat/a.jpg", "dog/b.jpg", "dog/empty.jpg"]
        assert source.classes == ("cat", "dog")
        assert "1 .db, 1 .ini, 1 .json, 1 .jsonl, 1 folder __MACOSX, 1 folder of a run, 1 hidden" in caplog.text
        assert "1 of 3 files are empty or broken links, such as dog/empty.jpg" in caplog.text
    assert cache_file(pair).is_file()


def test_splits_of_files_without_ending(tmp_path: Path) -> None:
    for split in ("train", "Validation"):
        spoil(tmp_path / split)
        Image.new("RGB", (8, 6)).save(tmp_path / split / "0a1b", "PNG")
    assert split_paths(tmp_path) == (tmp_path / "train", tmp_path / "Validation")

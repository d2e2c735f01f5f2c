"""Shards as a source: the right bytes, every damage named, and more shards than open files."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.conversion.command import Convert, convert
from pipelines.runtime import InputError
from pipelines.storage import open_source
from pipelines.storage.shards import ShardSource

COUNT = 30
MANY = 40  # shards of one image each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = root / f"class{number % 3}" / f"im.{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (20 + number, 60 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, exif=_orientation(6) if number == 7 else b"")
    return root


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.fixture(scope="module")
def converted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "d"
    convert(Convert(src=folder, dst=path, shard_size=0.01))
    return path


@pytest.fixture
def shards(converted: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(converted, tmp_path / "shards"))


def test_same_images_as_the_folder(folder: Path, converted: Path) -> None:
    source, plain = open_source(converted), open_source(folder)
    assert isinstance(source, ShardSource)
    assert len(source.manifest.shards) >= 3
    assert len(source) == len(plain) == COUNT
    assert source.classes == plain.classes == ("class0", "class1", "class2")
    assert source.labels.tolist() == plain.labels.tolist()
    assert source.nbytes.tolist() == plain.nbytes.tolist()
    for i in np.random.default_rng(1).permutation(COUNT).tolist():
        assert source.key(i) == plain.key(i).removesuffix(".jpg").replace("im.", "im_")
        assert source.read(i).tobytes() == plain.read(i).tobytes()


def test_sizes_are_those_of_the_upright_image(folder: Path, converted: Path) -> None:
    source = open_source(converted)
    assert isinstance(source, ShardSource)
    by_key = {source.key(i): tuple(source.sizes[i]) for i in range(COUNT)}
    for number in range(COUNT):
        height, width = 20 + number, 60 - number
        expected = (width, height) if number == 7 else (height, width)
        assert by_key[f"class{number % 3}/im_{number:02d}"] == expected


def test_arrays_outlive_close(converted: Path, folder: Path) -> None:
    source = open_source(converted)
    data = source.read(3)
    assert not data.flags.writeable
    source.close()
    expected = open_source(folder).read(3).tobytes()
    assert data.tobytes() == expected
    assert source.read(3).tobytes() == expected  # opens again


def test_threads_and_forks_read_the_same(converted: Path) -> None:
    source = open_source(converted)
    expected = [source.read(i).tobytes() for i in range(COUNT)]
    source.close()
    wrong: list[int] = []

    def reader(start: int) -> None:
        wrong.extend(
            i % COUNT for i in range(start, start + 300) if source.read(i % COUNT).tobytes() != expected[i % COUNT]
        )

    threads = [threading.Thread(target=reader, args=(7 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    child = os.fork()
    if child == 0:
        os._exit(0 if all(source.read(i).tobytes() == expected[i] for i in range(COUNT)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_tar_reads_the_shards(converted: Path, folder: Path) -> None:
    files: dict[str, bytes] = {}
    labels: dict[str, bytes] = {}
    for path in sorted(converted.glob("*.tar")):
        assert path.stat().st_size % tarfile.RECORDSIZE == 0
        with tarfile.open(path) as archive:
            for info in archive:
                stem, _, extension = info.name.rpartition(".")
                member = archive.extractfile(info)
                assert member is not None
                (files if extension == "jpg" else labels)[stem] = member.read()
    plain = open_source(folder)
    assert files == {
        plain.key(i).removesuffix(".jpg").replace("im.", "im_"): plain.read(i).tobytes() for i in range(COUNT)
    }
    assert labels == {stem: stem[len("class")].encode() for stem in files}


@pytest.mark.filterwarnings("ignore")  # of webdataset's own
def test_webdataset_reads_the_shards(converted: Path) -> None:
    source = open_source(converted)
    urls = [str(path) for path in sorted(converted.glob("*.tar"))]
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [source.key(i) for i in range(COUNT)]
    assert [sample["cls"] for sample in samples] == source.labels.tolist()
    assert [sample["jpg"].shape[2] for sample in samples] == [3] * COUNT


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 512)


def remove(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    """Other contents, same size."""
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize("name", ["shard-000001.tar", "index.npy", "keys.npy"])
@pytest.mark.parametrize("damage", [cut, remove, swap])
def test_damage_is_named_at_open(shards: Path, name: str, damage: object) -> None:
    assert callable(damage)
    if damage is cut and name != "shard-000001.tar":
        os.truncate(shards / name, 100)
    else:
        damage(shards / name)
    with pytest.raises(InputError, match=rf"{name} .*: restore it .* or convert again"):
        open_source(shards)


def test_index_of_other_shards(shards: Path) -> None:
    """A valid index that does not belong to these shards."""
    rows = np.load(shards / "index.npy")
    rows["offset"][3] += 1
    np.save(shards / "index.npy", rows)
    with pytest.raises(InputError, match=r"index.npy does not have the checksum"):
        open_source(shards)


def test_shards_of_the_same_size_swapped(shards: Path) -> None:
    """Two real shards, padded to the same size."""
    first, second = shards / "shard-000000.tar", shards / "shard-000001.tar"
    manifest = json.loads((shards / "manifest.json").read_text())
    largest = max(first.stat().st_size, second.stat().st_size)
    for number, path in enumerate((first, second)):
        os.truncate(path, largest)
        manifest["shards"][number]["bytes"] = largest
    (shards / "manifest.json").write_text(json.dumps(manifest))
    open_source(shards)
    first.rename(shards / "x")
    second.rename(first)
    (shards / "x").rename(second)
    with pytest.raises(InputError, match=r"shard-000000.tar has other contents .*swapped"):
        open_source(shards)


def test_verify_finds_one_wrong_byte(shards: Path) -> None:
    source = open_source(shards)
    assert isinstance(source, ShardSource)
    done: list[int] = []
    source.verify(progress=done.append)
    assert done[-1] == sum(shard.bytes for shard in source.manifest.shards)
    with (shards / "shard-000002.tar").open("r+b") as file:
        file.seek(6000)
        byte = file.read(1)[0]
        file.seek(6000)
        file.write(bytes([byte ^ 1]))
    open_source(shards)  # opening reads only the head
    with pytest.raises(InputError, match=r"shard-000002.tar does not have the checksum"):
        source.verify()


def test_shard_cut_or_replaced_while_in_use(shards: Path) -> None:
    source = open_source(shards)
    expected = source.read(0).tobytes()
    last = COUNT - 1
    source.read(last)
    path = sorted(shards.glob("*.tar"))[-1]
    os.truncate(path, 512)
    with pytest.raises(InputError, match=rf"{path.name} was cut short"):
        source.read(last)
    path.unlink()
    source.close()
    with pytest.raises(InputError, match=rf"{path.name} is missing: restore it"):
        source.read(last)
    first = shards / "shard-000000.tar"
    source.read(0)
    (shards / "new").write_bytes(b"other")
    (shards / "new").replace(first)  # the old file is still open
    assert source.read(0).tobytes() == expected
    source.close()
    with pytest.raises(InputError, match=r"shard-000000.tar has 5 bytes"):
        source.read(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "format version 2 but this release reads version 1: convert"),
        ({"format": "other"}, "of the format 'other'"),
        ({"shards": [{"name": "x"}]}, "is damaged"),
        ({"count": "many"}, "is damaged"),
    ],
)
def test_invalid_manifests(shards: Path, change: dict[str, object], message: str) -> None:
    path = shards / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        open_source(shards)


def test_manifest_that_is_no_json(shards: Path) -> None:
    (shards / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest.json is damaged .* --overwrite"):
        open_source(shards)


def test_unfinished_conversion(shards: Path) -> None:
    (shards / "manifest.json").unlink()
    (shards / ".convert").mkdir()
    with pytest.raises(InputError, match=r"not finished .*run the same mvssl-convert command again"):
        open_source(shards)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    (root / "src").mkdir()
    for number in range(MANY):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(root / "src" / f"{number:02d}.png")
    convert(Convert(src=root / "src", dst=root / "d", shard_size=1e-6))
    return root / "d"


@pytest.fixture
def few_files() -> Iterator[int]:
    """Lowers the soft limit to 20 more files than now; yields it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 20, hard))
    yield lowest_free + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_the_soft_limit(many_shards: Path, few_files: int) -> None:
    source = open_source(many_shards)
    read = [source.read(i) for i in range(MANY)]  # opens every shard
    source.close()
    for number, data in enumerate(read):
        assert data.tobytes() == (many_shards.parent / "src" / f"{number:02d}.png").read_bytes()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > few_files


def test_sufficient_limit_is_not_changed(many_shards: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[0] < 1024:
        pytest.skip("the soft limit here is below the usual 1024")
    source = open_source(many_shards)
    for i in range(MANY):
        source.read(i)
    source.close()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_more_shards_than_the_hard_limit(many_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256 + MANY - 1))
    with pytest.raises(InputError, match=r"has 40 shards but .* only 39 of them open: raise .* larger --shard-size"):
        open_source(many_shards)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256 + MANY))
    assert len(open_source(many_shards)) == MANY

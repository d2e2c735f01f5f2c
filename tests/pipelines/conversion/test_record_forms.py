"""HDF5, LMDB and TFRecord, written by h5py, lmdb and by definition, give what the folder of images gives."""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path
from typing import Any

import h5py
import lmdb
import numpy as np
import pytest
from PIL import Image

from pipelines.storage import open_source
from pipelines.storage.forms.wire import DamagedRecordError, crc32c, masked_crc, unpack_msgpack
from tests.samples.convert_runs import Run, digests
from tests.samples.form_samples import CLASSES, Item, as_folder, contents, encoded, items, pixels

EXPECTED = {(item.data, item.label) for item in items()}
NUMBERED = {(item.data, str(CLASSES.index(item.label))) for item in items()}
RAW = np.random.default_rng(0).integers(0, 256, (9, 12, 14, 3), dtype=np.uint8)
RAW_LABELS = [n % 3 for n in range(9)]
RAW_EXPECTED = {(image.tobytes(), str(n % 3)) for n, image in enumerate(RAW)}


def test_hdf5_of_solo_learn(run: Run, tmp_path: Path) -> None:
    for split, images in (("train", items()), ("val", items(3, first=9))):
        (tmp_path / "h").mkdir(exist_ok=True)
        with h5py.File(tmp_path / "h" / f"{split}.h5", "w") as file:
            for item in images:
                data = np.frombuffer(item.data, np.uint8)
                file.require_group(item.label).create_dataset(
                    item.name, data=data, shape=data.shape, compression="gzip", compression_opts=9
                )
    outcome = run(tmp_path / "h", tmp_path / "d")
    assert outcome.code == 0, outcome.err
    assert "is 2 HDF5 files: train 9 images, val 3 images, 3 classes." in outcome.out
    assert contents(tmp_path / "d" / "train") == EXPECTED
    assert contents(tmp_path / "d" / "val") == {(i.data, i.label) for i in items(3, first=9)}
    run(as_folder(tmp_path / "f", items()), tmp_path / "e")
    assert digests(tmp_path / "d")["train/shard-000000.tar"] == digests(tmp_path / "e")["shard-000000.tar"]


@pytest.mark.parametrize("how", ["pixels", "planes", "gray", "encoded", "splits", "floats"])
def test_hdf5_arrays(run: Run, tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.hdf5"
    expected = RAW_EXPECTED
    with h5py.File(path, "w") as file:
        where = file.create_group("train") if how == "splits" else file
        if how == "encoded":
            kind = h5py.vlen_dtype(np.uint8)
            made = where.create_dataset("images", (9,), kind)
            for n, item in enumerate(items()):
                made[n] = np.frombuffer(item.data, np.uint8)
            expected = NUMBERED
        elif how == "gray":
            where["x"] = RAW[:, :, :, 0]
            expected = {(image[:, :, 0].tobytes(), str(n % 3)) for n, image in enumerate(RAW)}
        else:
            where["images"] = RAW.transpose(0, 3, 1, 2) if how == "planes" else RAW
        where["y" if how == "gray" else "labels"] = np.array(RAW_LABELS, float if how == "floats" else np.int64)
        where["boxes"] = np.zeros((9, 4))
        if how == "splits":
            file["test/images"], file["test/labels"] = RAW[:2], RAW_LABELS[:2]
    assert run(path, tmp_path / "d", "--shard-size", 0.001).code == 0
    folder = tmp_path / "d" / ("train" if how == "splits" else "")
    assert (contents if how == "encoded" else pixels)(folder) == expected
    if how == "pixels":
        assert "--image is 'boxes' but must be" in run(path, tmp_path / "e", "--image", "boxes").err
        assert run(path, tmp_path / "e", "--label", "none").code == 0
        assert open_source(tmp_path / "e").classes == ()


def test_hdf5_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"

    def says(message: str) -> None:
        outcome = run(path, tmp_path / "d")
        assert re.search(message, outcome.err), outcome.err
        assert outcome.err.count("\n") == 1
        assert not (tmp_path / "d").exists()

    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = RAW, [1, 2]
    says(r"9 images in 'images' and \[2\] labels in 'labels'")
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((9, 40))
    says("has no data sets of images among features float64")
    with h5py.File(path, "w") as file:
        file["a/b/c/d"] = 1
    says("the group a/b where images should be")
    with h5py.File(path, "w") as file:
        file["images"] = RAW
    path.write_bytes(path.read_bytes()[:3000])
    says("a.h5 is truncated or damaged")
    path.write_bytes(b"text")
    says("a.h5 is truncated or damaged, or no HDF5")


def write(path: Path, values: dict[bytes, bytes], **options: Any) -> Path:
    with lmdb.open(str(path), map_size=1 << 24, **options) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return path


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def msgpack(item: Item) -> bytes:
    return b"\x92\xc5" + struct.pack(">H", len(item.data)) + item.data + bytes([CLASSES.index(item.label)])


def lmdb_values(how: str) -> dict[bytes, bytes]:
    images = items()
    about = {b"__len__": pickle.dumps(9), b"__keys__": pickle.dumps([str(n).encode() for n in range(9)])}
    label = [CLASSES.index(item.label) for item in images]
    if how == "numbered":
        values = {b"image-%09d" % (n + 1): item.data for n, item in enumerate(images)}
        return (
            values | {b"label-%09d" % (n + 1): i.label.encode() for n, i in enumerate(images)} | {b"num-samples": b"9"}
        )
    if how == "names":
        return {f"{item.label}/{item.name}".encode(): item.data for item in images}
    if how == "pickle":
        return about | {str(n).encode(): pickle.dumps((i.data, label[n])) for n, i in enumerate(images)}
    if how == "dictionary":
        return {
            str(n).encode(): pickle.dumps({"image": i.data, "label": label[n], "id": n}) for n, i in enumerate(images)
        }
    if how == "arrays":
        return {str(n).encode(): pickle.dumps([image, n % 3], 4) for n, image in enumerate(RAW)}
    if how == "Pillow":
        return {str(n).encode(): pickle.dumps((Image.fromarray(image), n % 3)) for n, image in enumerate(RAW)}
    if how == "msgpack":
        return {str(n).encode(): msgpack(item) for n, item in enumerate(images)}
    data = {n: (RAW[n].transpose(2, 0, 1)[::-1].tobytes(), items()[n].data) for n in range(9)}
    if how == "datum":
        return {
            b"%08d" % n: field(1, 3) + field(2, 12) + field(3, 14) + field(4, raw) + field(5, n % 3)
            for n, (raw, _) in data.items()
        }
    assert how == "encoded datum"
    return {b"%08d" % n: field(4, one) + field(5, n % 3) + field(7, 1) for n, (_, one) in data.items()}


@pytest.mark.parametrize(
    "how", ["numbered", "names", "pickle", "dictionary", "arrays", "Pillow", "msgpack", "datum", "encoded datum"]
)
@pytest.mark.parametrize("subdir", [True, False])
def test_lmdb(run: Run, tmp_path: Path, how: str, subdir: bool) -> None:
    path = write(tmp_path / "a.lmdb", lmdb_values(how), subdir=subdir)
    outcome = run(path, tmp_path / "d", "--workers", 3)
    assert outcome.code == 0, outcome.err
    assert "is 1 LMDB database of" in outcome.out
    assert ": 9 images, 3 classes." in outcome.out
    if how in ("arrays", "Pillow", "datum"):
        assert pixels(tmp_path / "d") == RAW_EXPECTED
    else:
        assert contents(tmp_path / "d") == (EXPECTED if how in ("numbered", "names") else NUMBERED)


def test_lmdb_splits_and_no_labels(run: Run, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "in").mkdir(exist_ok=True)
        write(tmp_path / "in" / f"{split}.lmdb", {bytes([n]) * 20: encoded(n) for n in range(200, 205)})
    assert "train 5 images, val 5 images, no labels" in run(tmp_path / "in", tmp_path / "d").out


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this ran",)


def test_lmdb_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    def says(values: dict[bytes, bytes], message: str) -> Path:
        path = write(tmp_path / f"{len(list(tmp_path.iterdir()))}.lmdb", values, subdir=False)
        outcome = run(path, tmp_path / "d")
        assert re.search(message, outcome.err), outcome.err
        assert "this ran" not in outcome.out
        assert not (tmp_path / "d").exists()
        return path

    says({}, "holds no images")
    says({b"1": b"text", b"2": b"more"}, "values are neither encoded images nor")
    says({b"1": pickle.dumps((Evil(), 1))}, "which could run code")
    says({b"1": encoded(1), b"2": b"text"}, "1 values with images and 1 without")
    path = write(tmp_path / "t.lmdb", lmdb_values("pickle"), subdir=False)
    path.write_bytes(path.read_bytes()[:9000])
    assert "is truncated" in run(path, tmp_path / "d").err


def record(payload: bytes, *, wrong: bool = False) -> bytes:
    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + (b"1234" if wrong else masked(payload))


def masked(data: bytes) -> bytes:
    """Bit by bit, as in the definition."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def feature(name: str, value: int | bytes) -> bytes:
    one = field(1, field(1, value)) if isinstance(value, bytes) else field(3, field(1, varint(value)))  # packed
    return field(1, field(1, name.encode()) + field(2, one))


def example(**features: int | bytes) -> bytes:
    return field(1, b"".join(feature(name.replace("__", "/"), value) for name, value in features.items()))


def test_tfrecord_of_tfds(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "imagenet2012" / "5.1.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text("{}")
    (folder / "label.labels.txt").write_text("\n".join([*CLASSES, ""]))
    for split, images in (("train", items()), ("validation", items(3, first=9))):
        for number, part in enumerate((images[:2], images[2:])):
            payloads = [example(file_name=i.name.encode(), image=i.data, label=CLASSES.index(i.label)) for i in part]
            path = folder / f"imagenet2012-{split}.tfrecord-{number:05d}-of-00002"
            path.write_bytes(b"".join(map(record, payloads)))
    outcome = run(tmp_path / "imagenet2012", tmp_path / "d")
    assert outcome.code == 0, outcome.err
    assert "is 4 TFRecord files (image feature 'image', labels 'label'): train 9 images, val 3 images" in outcome.out
    assert contents(tmp_path / "d" / "train") == EXPECTED
    assert contents(tmp_path / "d" / "val") == {(i.data, i.label) for i in items(3, first=9)}
    one = folder / "imagenet2012-train.tfrecord-00000-of-00002"
    assert run(one, tmp_path / "e").code == 0
    assert contents(tmp_path / "e") == {(i.data, i.label) for i in items()[:2]}


@pytest.mark.parametrize("synset", [True, False])
def test_tfrecord_of_imagenets_scripts(run: Run, tmp_path: Path, synset: bool) -> None:
    path = tmp_path / "train-00000-of-01024"
    made = []
    for item in items():
        extra: dict[str, int | bytes] = {"image__class__synset": item.label.encode()} if synset else {}
        number = CLASSES.index(item.label) + 1
        made.append(record(example(image__encoded=item.data, image__class__label=number, image__height=3, **extra)))
    path.write_bytes(b"".join(made))
    assert run(path, tmp_path / "d").code == 0
    assert contents(tmp_path / "d") == (EXPECTED if synset else {(d, str(int(n))) for d, n in NUMBERED})


def test_tfrecord_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    payloads = [example(image=item.data, label=1) for item in items()]
    path = tmp_path / "a.tfrecord"

    def says(content: bytes, message: str) -> None:
        path.write_bytes(content)
        outcome = run(path, tmp_path / "d")
        assert re.search(message, outcome.err), outcome.err
        assert not (tmp_path / "d").exists()

    whole = b"".join(map(record, payloads))
    says(whole[:-10], "it ends in the record at byte")
    says(whole[:-1], "it ends in the record at byte")
    says(whole + b"123", "in the length of a record")
    says(b"text" * 10, "there is no length of a record")
    says(b"", "holds no records")
    says(record(example(text=b"words", label=1)), "no feature of encoded images; its features are label .int64., text")
    says(record(b"\xff\xff\xff"), "is no tf.train.Example")
    says(record(example(image=encoded(1), label=1 << 62)), "has the label 4611686018427387904")
    path.write_bytes(b"".join(record(p, wrong=n == 3) for n, p in enumerate(payloads)))
    assert run(path, tmp_path / "d").code == 0
    assert "the checksum of its record is wrong" in (tmp_path / "d" / "quarantine.jsonl").read_text()
    assert len(open_source(tmp_path / "d")) == len(payloads) - 1


def test_checksum_of_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # of the catalogue of CRCs
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720
    assert crc32c(bytes([255] * 32)) == 0x62A8AB43
    assert crc32c(b"") == 0
    for size in (1, 3, 4, 5, 63, 64, 65, 16_384, 16_385, 40_000):
        data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
        assert struct.pack("<I", masked_crc(data)) == masked(data)


def test_msgpack() -> None:
    whole = b"\x83\xa1a\x93\x01\xff\xc0\xa1b\xcb\x3f\xf8\x00\x00\x00\x00\x00\x00\xa1c\xc4\x02xy"
    assert unpack_msgpack(whole) == {"a": [1, -1, None], "b": 1.5, "c": b"xy"}
    for cut in range(1, len(whole)):
        with pytest.raises(DamagedRecordError):
            unpack_msgpack(whole[:cut])
    with pytest.raises(DamagedRecordError, match="deep"):
        unpack_msgpack(b"\x91" * 50)

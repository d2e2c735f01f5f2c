"""Good, unusual and bad images in a conversion; names of tar members; sizes of shards."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.conversion.command import Convert, convert, main
from pipelines.conversion.conversion import shard_bounds
from pipelines.conversion.tar_writer import member_keys
from pipelines.decode.pillow import decode_one
from pipelines.decode.sniff import has_end_marker
from pipelines.storage import open_source
from pipelines.storage.shards import ShardSource
from tests.samples.mutations import opened_by_pillow


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


GOOD = encode(Image.fromarray(noise(50, 40)))


def with_scan_cut_in_the_middle() -> bytes:
    return GOOD[: len(GOOD) // 2]


def with_thumbnail_and_cut() -> bytes:
    """The EXIF thumbnail's end marker must not count as that of the image."""
    exif = b"Exif\x00\x00" + encode(Image.new("RGB", (8, 8)))
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    return (GOOD[:2] + segment + GOOD[2:])[:-2]


BAD = {
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"This is not an image.\n" * 10, "not an image"),
    "half.jpg": (with_scan_cut_in_the_middle(), "truncated"),
    "no_end.jpg": (GOOD[:-2], "truncated"),
    "thumbnail.jpg": (with_thumbnail_and_cut(), "truncated"),
    "header.jpg": (GOOD[:100], ""),
    "half.png": (encode(Image.fromarray(noise(50, 40)), "PNG")[:3000], ""),
    "html.png": (b"<html>404</html>", "not an image"),
}


@pytest.fixture
def converted(tmp_path: Path) -> Callable[..., ShardSource]:
    """Convert files and open the result."""

    def call(files: dict[str, bytes], **options: Any) -> ShardSource:
        for name, content in files.items():
            path = tmp_path / "src" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        convert(Convert(src=tmp_path / "src", dst=tmp_path / "dst", **options))
        source = open_source(tmp_path / "dst")
        assert isinstance(source, ShardSource)
        return source

    return call


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bad_images_are_left_out_and_listed(converted: Callable[..., ShardSource], tmp_path: Path) -> None:
    files = {f"{name[0]}/{name}": content for name, (content, _) in BAD.items()}
    source = converted(files | {"g/good.jpg": GOOD, "z/good.jpg": GOOD}, shard_size=0.001)
    assert [source.key(i) for i in range(len(source))] == ["g/good", "z/good"]
    assert source.read(1).tobytes() == GOOD
    listed = {item["key"]: item["reason"] for item in lines(tmp_path / "dst" / "quarantine.jsonl")}
    assert set(listed) == set(files)
    for name, (_, reason) in BAD.items():
        assert reason in listed[f"{name[0]}/{name}"]
        assert listed[f"{name[0]}/{name}"]
    assert source.classes == ("e", "g", "h", "n", "t", "z")  # labels do not depend on bad images
    assert source.labels.tolist() == [1, 5]
    manifest = json.loads((tmp_path / "dst" / "manifest.json").read_text())
    assert (manifest["count"], manifest["quarantined"]) == (2, len(BAD))


def _pillow_accepts(data: bytes) -> bool:
    try:
        opened_by_pillow(data)
    except OSError:
        return False
    return True


def test_jpeg_that_lacks_only_its_end_marker(converted: Callable[..., ShardSource], tmp_path: Path) -> None:
    """Pillow decodes about one in ten of these without an error; others do not: it is bad with all."""
    cut = (encode(Image.fromarray(noise(50, 40, seed=seed)))[:-2] for seed in range(200))
    accepted = next(data for data in cut if _pillow_accepts(data))
    assert decode_one(np.frombuffer(accepted, np.uint8)) == "truncated JPEG: the end-of-image marker is missing"
    assert len(converted({"cut.jpg": accepted, "good.jpg": GOOD})) == 1
    (item,) = lines(tmp_path / "dst" / "quarantine.jsonl")
    assert item == {"key": "cut.jpg", "reason": "truncated JPEG: the end-of-image marker is missing"}


def test_end_marker() -> None:
    assert has_end_marker(GOOD)
    assert has_end_marker(GOOD + b"tail")
    assert has_end_marker(with_thumbnail_and_cut() + b"\xff\xd9")
    assert not has_end_marker(GOOD[:-1])
    assert not has_end_marker(GOOD[:-2])
    assert not has_end_marker(with_thumbnail_and_cut())


def test_broken_link_is_listed(converted: Callable[..., ShardSource], tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "gone.jpg").symlink_to(tmp_path / "nothing")
    assert len(converted({"good.jpg": GOOD})) == 1
    (item,) = lines(tmp_path / "dst" / "quarantine.jsonl")
    assert item["key"] == "gone.jpg"
    assert "does not exist" in item["reason"]


def test_only_bad_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.jpg").write_bytes(b"no image")  # empty files are refused before
    for _ in range(2):  # also on the second attempt
        with pytest.raises(SystemExit) as leaving:
            main([str(tmp_path / "src"), str(tmp_path / "dst")])
        assert leaving.value.code == 1
        assert "none of the 1 images" in capsys.readouterr().err
    assert not (tmp_path / "dst" / "manifest.json").exists()


ODD = {
    "cmyk.jpg": encode(Image.fromarray(noise(30, 20, 4), "CMYK")),
    "gray.jpg": encode(Image.fromarray(noise(30, 20)[:, :, 0])),
    "palette.png": encode(Image.fromarray(noise(30, 20)).quantize(16), "PNG"),
    "deep.png": encode(Image.fromarray(noise(30, 20)[:, :, 0].astype(np.uint16) * 257), "PNG"),
    "alpha.png": encode(Image.fromarray(noise(30, 20, 4)), "PNG"),
    "transparent.png": encode(Image.fromarray(noise(30, 20)).quantize(16), "PNG", transparency=bytes(range(16))),
    "bits.png": encode(Image.fromarray(noise(30, 20)[:, :, 0]).convert("1"), "PNG"),
    "picture.webp": encode(Image.fromarray(noise(30, 20)), "WEBP"),
    "picture.tif": encode(Image.fromarray(noise(30, 20)), "TIFF"),
    "picture.bmp": encode(Image.fromarray(noise(30, 20)), "BMP"),
    "picture2.ppm": encode(Image.fromarray(noise(30, 20)), "PPM"),
    "progressive.jpg": encode(Image.fromarray(noise(30, 20)), progressive=True),
    "turned.jpg": encode(Image.fromarray(noise(20, 30)), exif=oriented(6)),
    "mirrored.jpg": encode(Image.fromarray(noise(30, 20)), exif=oriented(2)),
    "tail.jpg": encode(Image.fromarray(noise(30, 20))) + b"camera maker's notes",
    "really_a_png.jpeg": encode(Image.fromarray(noise(30, 20)), "PNG"),
}


def test_unusual_encodings_pass_through(converted: Callable[..., ShardSource], tmp_path: Path) -> None:
    source = converted(ODD)
    assert lines(tmp_path / "dst" / "quarantine.jsonl") == []
    names = sorted(ODD)
    for i, name in enumerate(names):
        assert source.read(i).tobytes() == ODD[name]
        assert source.sizes[i].tolist() == [30, 20], name
    member_names = {}
    with tarfile.open(tmp_path / "dst" / "shard-000000.tar") as archive:
        for name in archive.getnames():
            stem, _, extension = name.rpartition(".")
            member_names[stem] = extension
    assert member_names["really_a_png"] == "png"  # by content
    assert member_names["picture"] == "bmp"
    assert member_names["picture_1"] == "tif"
    assert member_names["tail"] == "jpg"


def test_max_size(converted: Callable[..., ShardSource]) -> None:
    smooth = Image.fromarray(noise(6, 8)).resize((320, 240), Image.Resampling.BICUBIC)
    turned = encode(smooth, quality=95, exif=oriented(8))
    files = ODD | {"turned_large.jpg": turned, "wide.png": encode(Image.fromarray(noise(2, 400)), "PNG")}
    source = converted(files, max_size=100)
    by_key = {source.key(i): i for i in range(len(source))}
    assert source.read(by_key["cmyk"]).tobytes() == ODD["cmyk.jpg"]  # small enough: passes through
    assert np.max(source.sizes) == 100
    index = by_key["turned_large"]
    assert source.sizes[index].tolist() == [100, 75]
    with Image.open(io.BytesIO(source.read(index).tobytes())) as stored:
        assert stored.format == "JPEG"
        assert stored.size == (75, 100)
        assert 0x0112 not in stored.getexif()
        got = np.asarray(stored, dtype=float)
    with Image.open(io.BytesIO(turned)) as original:
        wanted = ImageOps.exif_transpose(original).resize((75, 100), Image.Resampling.LANCZOS)
    assert np.abs(got - np.asarray(wanted, dtype=float)).mean() < 3
    assert source.sizes[by_key["wide"]].tolist() == [1, 100]
    for i in range(len(source)):
        with Image.open(io.BytesIO(source.read(i).tobytes())) as image:
            assert max(image.size) <= 100


def test_max_size_of_odd_encodings(converted: Callable[..., ShardSource], tmp_path: Path) -> None:
    source = converted(ODD, max_size=15)
    assert lines(tmp_path / "dst" / "quarantine.jsonl") == []
    assert (source.sizes == [15, 10]).all()
    by_key = {source.key(i): i for i in range(len(source))}
    with Image.open(io.BytesIO(source.read(by_key["deep"]).tobytes())) as deep:
        assert 90 < np.asarray(deep).mean() < 165  # 16 bits scaled, not clipped to white


def test_images_with_decoder_warnings_are_listed_and_stored(
    converted: Callable[..., ShardSource], tmp_path: Path
) -> None:
    cut = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01"  # in the middle of its only entry
    segment = b"\xff\xe1" + struct.pack(">H", len(cut) + 2) + cut
    source = converted({"cut.jpg": GOOD[:2] + segment + GOOD[2:], "whole.jpg": ODD["gray.jpg"]})
    assert len(source) == 2
    (item,) = lines(tmp_path / "dst" / "warnings.jsonl")
    assert item["key"] == "cut.jpg"
    assert "Corrupt EXIF data" in item["warning"]


def test_member_keys_are_safe_and_unique() -> None:
    names = [
        "a/b.c.jpg",
        "a/b_c.PNG",
        "/abs/x.jpeg",
        "../up/x.jpg",
        "a/b_c_1.jpg",
        ".jpg",
        "no_extension",
        "v1.2/y.tiff",
    ]
    assert member_keys(names) == [
        "a/b_c",
        "a/b_c_1",
        "abs/x",
        "up/x",
        "a/b_c_1_1",
        "image",
        "no_extension",
        "v1.2/y",
    ]


@pytest.mark.parametrize(
    ("sizes", "limit", "bounds"),
    [([4, 4, 4], 8, [0, 2, 3]), ([9, 1, 1], 8, [0, 1, 3]), ([0, 0, 8, 0], 8, [0, 4]), ([3], 8, [0, 1])],
)
def test_shard_bounds(sizes: list[int], limit: int, bounds: list[int]) -> None:
    assert shard_bounds(np.array(sizes), limit).tolist() == bounds

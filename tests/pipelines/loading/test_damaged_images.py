"""Damaged JPEGs that decode are used, named once in the log, and nothing reaches standard error."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.conversion.command import Convert, convert
from pipelines.decode import DecodeOptions, make_decoder
from pipelines.decode.damage import can_find_damage
from pipelines.loading import fetch
from pipelines.loading.eval_loader import iterate_center
from pipelines.loading.fetch import Fetcher
from pipelines.storage import open_source
from pipelines.storage.source import Source, SubsetSource
from tests.samples.decode_samples import encode, half_jpeg, jpegs, needs_dali, needs_ffcv_library, picture
from tests.samples.loader_samples import loader_of

pytestmark = [
    pytest.mark.usefixtures("no_thread_left"),
    pytest.mark.skipif(not can_find_damage(), reason="no C compiler"),
]
DAMAGED = (5, 11)
DECODERS = [pytest.param("dali", marks=needs_dali), pytest.param("ffcv", marks=needs_ffcv_library), "pillow"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """16 JPEGs, two of them damaged, one with padding of which libjpeg complains, and a PNG."""
    files = jpegs(16)
    for n in DAMAGED:
        files[n] = half_jpeg(n)
    files[8] = np.frombuffer(files[8].tobytes()[:-2] + bytes(20) + b"\xff\xd9", np.uint8)
    files[9] = encode(picture(20, 30), "PNG")
    (tmp_path / "images").mkdir()
    for n, data in enumerate(files):
        (tmp_path / "images" / f"{n:02d}.jpg").write_bytes(data.tobytes())
    return tmp_path / "images"


def names(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Names of the images that the log calls damaged."""
    return sorted(record.getMessage().split()[1] for record in caplog.records if "is damaged" in record.getMessage())


@pytest.mark.parametrize("decoder", DECODERS)
def test_training_names_each_once_and_is_silent_on_stderr(
    folder: Path, decoder: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    source = open_source(folder)
    loader = loader_of(source, decoder=decoder)  # type: ignore[arg-type]  # any source
    with caplog.at_level(logging.WARNING, logger="mvssl.data"):
        seen = {index for epoch in range(3) for batch in loader.epoch(epoch) for index in batch.index.tolist()}
        loader.close()
        for _ in range(2):  # as the kNN of every epoch
            options = DecodeOptions(decoder=decoder, threads=1)  # type: ignore[arg-type]  # one of them
            list(iterate_center(source, resize=20, crop=16, batch_size=8, decode=options))
    assert seen == set(range(16))
    assert names(caplog) == ["05.jpg", "11.jpg"]
    assert "Image 05.jpg is damaged (its data end after " in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("decoder", DECODERS)
def test_damaged_images_have_the_pixels_of_pillow(folder: Path, decoder: str) -> None:
    made = make_decoder(decoder, device="cpu", batch_size=16, threads=1)
    source = open_source(folder)
    for _ in range(2):
        batch = Fetcher(source, made)(range(16)).batch
        for n in range(16):
            with Image.open(io.BytesIO(source.read(n).tobytes())) as image:
                assert torch.equal(batch.image(n), torch.from_numpy(np.array(image.convert("RGB"))))
    made.close()


@pytest.mark.parametrize("form", ["shards", "beton"])
def test_converted_images_are_not_examined_again(
    folder: Path, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(Convert(src=folder, dst=tmp_path / form, format=form, shard_size=0.005))  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (tmp_path / form / "warnings.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["05.jpg", "11.jpg"]
    assert all(line["warning"].startswith("damaged: its data end after ") for line in lines)
    assert (tmp_path / form / "quarantine.jsonl").read_text() == ""
    monkeypatch.setattr(fetch, "find_damage", None)
    source = open_source(tmp_path / form)
    made = make_decoder("pillow", device="cpu", batch_size=16, threads=1)
    with caplog.at_level(logging.WARNING, logger="mvssl.data"):
        for _ in range(2):
            Fetcher(source, made)(range(16))
    made.close()
    assert names(caplog) == ["05", "11"]


@pytest.mark.parametrize("form", ["shards", "beton"])
def test_strict_conversion_quarantines_them(
    folder: Path, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(Convert(src=folder, dst=tmp_path / form, format=form))  # type: ignore[arg-type]
    assert "2 with warnings (see " in (said := capsys.readouterr().out)
    assert "2 damaged, which --strict leaves out" in said
    convert(Convert(src=folder, dst=tmp_path / "strict", format=form, strict=True))  # type: ignore[arg-type]
    assert "2 quarantined" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "strict" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["05.jpg", "11.jpg"]
    assert len(open_source(tmp_path / "strict")) == 14
    assert (tmp_path / "strict" / "warnings.jsonl").read_text() == ""


def test_a_subset_knows_what_its_source_knows(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source: Source = open_source(folder)
    made = make_decoder("pillow", device="cpu", batch_size=16, threads=1)
    with caplog.at_level(logging.WARNING, logger="mvssl.data"):
        Fetcher(source, made)(range(8))
        Fetcher(SubsetSource(source, [11, 5, 2]), made)(range(3))
    made.close()
    assert names(caplog) == ["05.jpg", "11.jpg"]

"""Cached decoded images: bit-identical training, each image decoded once, clear errors if they do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipelines.loading.fetch
from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.runs.jsonl import read_jsonl
from mvssl.training.loop import Loop
from pipelines.decode import make_decoder
from pipelines.decode.base import Decoded
from pipelines.loading import pixel_cache as cache_choice
from pipelines.loading.fetch import Fetcher
from pipelines.loading.pixel_cache import (
    MOST,
    SHARE,
    CachedSource,
    Memory,
    PixelCache,
    free_memory,
    pixel_bytes,
    with_cache,
)
from pipelines.runtime import InputError
from pipelines.storage import open_source
from tests.samples.data_faults import copy_of
from tests.samples.tiny_runs import CrashError, metrics, train, write_images

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLENTY = Memory(host=10**12, device=10**12)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of images in each decode call."""
    counts: list[int] = []
    decode = pipelines.loading.fetch.Fetcher._decode

    def counting(self: Fetcher, indices: Sequence[int], read: Any) -> Any:
        counts.append(len(indices))
        return decode(self, indices, read)

    monkeypatch.setattr(pipelines.loading.fetch.Fetcher, "_decode", counting)
    return counts


@pytest.mark.parametrize("form", ["folder", "shards", "beton"])
def test_a_cached_run_is_the_same_and_decodes_each_image_once(
    forms: dict[str, Path], finished: Path, tiny_recipe: Recipe, tmp_path: Path, decoded: list[int], form: str
) -> None:
    train(tiny_recipe, forms[form], tmp_path / "run", cache="host")
    assert metrics(tmp_path / "run") == metrics(finished)
    assert sum(decoded) == 36 + 12  # train and val, over three epochs and three evaluations
    log = (tmp_path / "run" / "train.log").read_text()
    assert "of pixels in host memory" in log
    assert log.count("cache: 100 % of the images are cached") == 2


def test_a_run_that_is_resumed_with_another_cache_is_the_same(
    images: Path, finished: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, out = Loop.save, tmp_path / "run"

    def save_and_crash(loop: Loop) -> None:
        save(loop)
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", save_and_crash)
        with pytest.raises(CrashError):
            train(tiny_recipe, images, out)
    train(tiny_recipe, images, out, resume=True, cache="auto")
    assert metrics(out) == metrics(finished)


def test_bad_and_odd_images_are_treated_as_without_a_cache(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    data = copy_of(images, tmp_path)
    victims = sorted((data / "train").rglob("*.jpg"))
    victims[3].write_bytes(b"no image")
    victims[9].write_bytes(victims[9].read_bytes()[:200])
    upright = np.zeros((30, 50, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(upright).save(victims[20], exif=exif)
    Image.fromarray(upright[..., 0]).save(victims[21], format="WEBP")
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    train(tiny_recipe, data, plain)
    train(tiny_recipe, data, cached, cache="host")
    assert metrics(cached) == metrics(plain)
    named = [line for line in (cached / "train.log").read_text().splitlines() if "takes its place" in line]
    assert len(named) == 2


def fetchers(root: Path) -> tuple[Fetcher, Fetcher, CachedSource]:
    """A fetcher without a cache, one with a cache, and the cached source."""
    source = open_source(root)
    kept, said = with_cache(source, "host", device=CPU, memory=PLENTY)
    assert isinstance(kept, CachedSource)
    assert said
    plain, cached = (
        Fetcher(each, make_decoder("pillow", device=CPU, batch_size=64, threads=2)) for each in (source, kept)
    )
    return plain, cached, kept


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "data", classes=2, per_class=6, seed=5)
    return tmp_path / "data"


def assert_same_images(one: Any, other: Any) -> None:
    assert one.failures == other.failures
    assert torch.equal(one.batch.index, other.batch.index)
    assert torch.equal(one.batch.labels, other.batch.labels)
    assert torch.equal(one.batch.sizes, other.batch.sizes)
    for n in range(len(one.batch)):
        assert torch.equal(one.batch.image(n), other.batch.image(n))


def test_any_order_with_repetitions_and_failures(folder: Path) -> None:
    next(folder.rglob("*.jpg")).write_bytes(b"no image")
    plain, cached, kept = fetchers(folder)
    for indices in ([3, 1, 1, 8], [0, 1, 2, 3], [8, 8, 3], list(range(11, -1, -1)), [7]):
        assert_same_images(cached(indices, cached.read(indices)), plain(indices))
    assert sum(index in kept.cache for index in range(12)) == 11
    assert cached.read(range(12)).keys() == set(range(12)) - {i for i in range(12) if i in kept.cache}


def test_an_image_that_changed_is_decoded_at_every_use(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, cached, kept = fetchers(folder)
    path = sorted(folder.rglob("*.jpg"))[4]
    Image.new("RGB", (17, 23)).save(path)
    for _ in range(2):
        assert_same_images(cached([5, 4, 3]), plain([5, 4, 3]))
    assert [index in kept.cache for index in (5, 4, 3)] == [True, False, True]
    assert caplog.text.count("An image file changed during the run") == 1


def test_pixels_for_another_device_are_one_buffer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the batch is copied to the GPU and pinned, not the whole cache: pinning may take twice the memory."""
    real, pinned = torch.empty, []

    def empty(size: int, *, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            pinned.append(size)
        return real(size, **options)

    monkeypatch.setattr(torch, "empty", empty)
    source = open_source(folder)
    store = PixelCache(pixel_bytes(source), device=CPU, on=CUDA)
    decoder = make_decoder("pillow", device=CPU, batch_size=64, threads=2)
    plain, cached = Fetcher(source, decoder), Fetcher(CachedSource(source, store), decoder)
    for _ in range(2):
        ours = cached([7, 2, 9])
        assert_same_images(ours, plain([7, 2, 9]))
        assert ours.batch.pixels.numel() == int(ours.batch.sizes.prod(dim=1).sum()) * 3 < store.nbytes
        assert set(pinned) == {ours.batch.pixels.numel()}


def test_sizes_are_those_of_the_decoded_images(folder: Path) -> None:
    source = open_source(folder)
    decoded: Decoded = make_decoder("pillow", device=CPU, batch_size=64, threads=2)(
        [source.read(index) for index in range(len(source))]
    )
    seen: list[int] = []
    sizes = pixel_bytes(source, progress=seen.append)
    assert sizes.tolist() == (decoded.sizes.prod(dim=1) * 3).tolist()
    assert seen[-1] == len(source)


def test_auto_takes_the_gpu_then_the_machine_then_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(folder)
    needed = int(pixel_bytes(source).sum())
    made: list[str] = []

    class Store:
        def __init__(self, sizes: Any, *, device: torch.device, on: torch.device) -> None:
            made.append(f"{device.type} for {on.type}")

    monkeypatch.setattr(cache_choice, "PixelCache", Store)

    def choose(host: float, device: float, choice: Any = "auto", on: torch.device = CUDA) -> str:
        memory = Memory(host=int(host * needed), device=int(device * needed))
        return with_cache(source, choice, device=on, memory=memory)[1]

    assert "of pixels in GPU memory" in choose(0, 1.1 / SHARE["device"])
    assert "of pixels in host memory" in choose(1.1 / SHARE["host"], 0.9 / SHARE["device"])
    assert "of pixels in host memory" in choose(1.1 / SHARE["host"], 9, on=CPU)
    assert made == ["cuda for cuda", "cpu for cuda", "cpu for cpu"]
    said = choose(0.9 / SHARE["host"], 0.9 / SHARE["device"])
    assert said.startswith("cache: off, because the pixels of all images take")
    assert "free GPU memory" in said
    assert "free host memory" in said
    assert "of pixels in host memory" in choose(1.01 / MOST, 0, "host")
    with pytest.raises(InputError, match=r"cache is 'device' but .* take --cache host \(.* free\), or --cache off"):
        choose(9, 0.99 / MOST, "device")
    with pytest.raises(InputError, match=r"cache is 'host' but .*can be taken: take --cache off, or convert"):
        choose(0.99 / MOST, 0.5, "host")


def test_sizes_are_not_read_if_the_files_alone_are_too_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_choice, "pixel_bytes", None)  # not called
    source, said = with_cache(open_source(folder), "auto", device=CPU, memory=Memory(host=1000))
    assert "take more than" in said
    assert not isinstance(source, CachedSource)


def test_running_out_of_memory_turns_only_the_cache_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")

    monkeypatch.setattr(cache_choice, "PixelCache", full)
    source, said = with_cache(open_source(folder), "auto", device=CUDA, memory=PLENTY)
    assert not isinstance(source, CachedSource)
    assert said.startswith("cache: OFF, images are decoded at every use: GPU memory had no room for")
    assert "Tried to allocate 3 GiB.); host memory had no room" in said


def test_invalid_choices_are_refused(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cache is 'device' but must be off, host or auto on a cpu device"):
        train(replace(tiny_recipe, epochs=1), images, tmp_path / "run", cache="device")
    with pytest.raises(InputError, match=r"RunOptions.cache is 'disk' but must be one of off, host, device, auto"):
        RunOptions(cache="disk")  # type: ignore[arg-type]


def test_free_memory_is_shared_by_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_choice, "_available", lambda: 1000)
    monkeypatch.setattr(cache_choice, "_number", lambda path: {"memory.max": 900, "memory.current": 100}[path.name])
    assert free_memory(CPU, processes=2) == Memory(host=400)
    monkeypatch.setattr(cache_choice, "_number", lambda path: None)
    assert free_memory(CPU, processes=1) == Memory(host=1000)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("choice", ["device", "host"])
def test_on_a_gpu_a_cached_run_is_the_same(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, decoded: list[int], choice: Any
) -> None:
    options: dict[str, Any] = {"device": "cuda", "decoder": "pillow"}
    recipe = replace(tiny_recipe, compile="off", precision="fp32")
    train(recipe, images, tmp_path / "plain", **options)
    decoded.clear()
    train(recipe, images, tmp_path / "cached", cache=choice, **options)
    assert sum(decoded) == 36 + 12
    ours, theirs = (
        [row["loss"] for row in read_jsonl(tmp_path / run / "metrics.jsonl") if row["kind"] == "train"]
        for run in ("cached", "plain")
    )
    assert ours == pytest.approx(theirs, abs=2e-3)


@pytest.mark.gpu
def test_streams_that_write_and_read_wait_for_each_other(folder: Path) -> None:
    source = open_source(folder)
    store = PixelCache(pixel_bytes(source), device=CUDA, on=CUDA)
    decoder = make_decoder("pillow", device=CPU, batch_size=64, threads=2)
    fetch, expected = Fetcher(CachedSource(source, store), decoder), Fetcher(source, decoder)(range(12))
    for at in range(12):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)
            fetch([at])
    with torch.cuda.stream(torch.cuda.Stream()):
        kept = fetch(range(12)).batch
        copies = [kept.image(n).clone() for n in range(12)]
    torch.cuda.synchronize()
    for n, copy in enumerate(copies):
        assert torch.equal(copy.cpu(), expected.batch.image(n))

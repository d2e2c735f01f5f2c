"""Pixel cache: the same images as without it, its size and place, and what happens if it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipelines.decode import make_decoder
from pipelines.decode.base import Decoded
from pipelines.loading import pixel_cache
from pipelines.loading.fetch import Fetcher
from pipelines.loading.pixel_cache import (
    AUTO_FRACTION,
    MAX_FRACTION,
    CachedSource,
    FreeMemory,
    PixelCache,
    free_memory,
    pixel_bytes,
    with_cache,
)
from pipelines.runtime import InputError
from pipelines.storage import open_source
from tests.samples.tiny_runs import write_images

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLENTY = FreeMemory(host=10**12, device=10**12)


def fetchers(root: Path) -> tuple[Fetcher, Fetcher, CachedSource]:
    """A fetcher without a cache, one with a cache, and the cached source."""
    source = open_source(root)
    cached_source, sentence = with_cache(source, "host", device=CPU, memory=PLENTY)
    assert isinstance(cached_source, CachedSource)
    assert sentence
    plain, cached = (
        Fetcher(each, make_decoder("pillow", device=CPU, batch_size=64, threads=2)) for each in (source, cached_source)
    )
    return plain, cached, cached_source


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
    plain, cached, source = fetchers(folder)
    for indices in ([3, 1, 1, 8], [0, 1, 2, 3], [8, 8, 3], list(range(11, -1, -1)), [7]):
        assert_same_images(cached(indices, cached.read(indices)), plain(indices))
    assert sum(index in source.cache for index in range(12)) == 11
    assert cached.read(range(12)).keys() == set(range(12)) - {i for i in range(12) if i in source.cache}


def test_an_image_that_changed_is_decoded_at_every_use(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, cached, source = fetchers(folder)
    path = sorted(folder.rglob("*.jpg"))[4]
    Image.new("RGB", (17, 23)).save(path)
    for _ in range(2):
        assert_same_images(cached([5, 4, 3]), plain([5, 4, 3]))
    assert [index in source.cache for index in (5, 4, 3)] == [True, False, True]
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


def test_auto_takes_gpu_memory_then_host_memory_then_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(folder)
    needed = int(pixel_bytes(source).sum())
    made: list[str] = []

    class Store:
        def __init__(self, sizes: Any, *, device: torch.device, on: torch.device) -> None:
            made.append(f"{device.type} for {on.type}")

    monkeypatch.setattr(pixel_cache, "PixelCache", Store)

    def choose(host: float, device: float, choice: Any = "auto", on: torch.device = CUDA) -> str:
        memory = FreeMemory(host=int(host * needed), device=int(device * needed))
        return with_cache(source, choice, device=on, memory=memory)[1]

    assert "of pixels in GPU memory" in choose(0, 1.1 / AUTO_FRACTION["device"])
    assert "of pixels in host memory" in choose(1.1 / AUTO_FRACTION["host"], 0.9 / AUTO_FRACTION["device"])
    assert "of pixels in host memory" in choose(1.1 / AUTO_FRACTION["host"], 9, on=CPU)
    assert made == ["cuda for cuda", "cpu for cuda", "cpu for cpu"]
    sentence = choose(0.9 / AUTO_FRACTION["host"], 0.9 / AUTO_FRACTION["device"])
    assert sentence.startswith("cache: off, because the pixels of all images take")
    assert "free GPU memory" in sentence
    assert "free host memory" in sentence
    assert "of pixels in host memory" in choose(1.01 / MAX_FRACTION, 0, "host")
    with pytest.raises(InputError, match=r"cache is 'device' but .* take --cache host \(.* free\), or --cache off"):
        choose(9, 0.99 / MAX_FRACTION, "device")
    with pytest.raises(InputError, match=r"cache is 'host' but .*can be taken: take --cache off, or convert"):
        choose(0.99 / MAX_FRACTION, 0.5, "host")


def test_sizes_are_not_read_if_the_files_alone_are_too_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_cache, "pixel_bytes", None)  # not called
    source, sentence = with_cache(open_source(folder), "auto", device=CPU, memory=FreeMemory(host=1000))
    assert "take more than" in sentence
    assert not isinstance(source, CachedSource)


def test_running_out_of_memory_turns_only_the_cache_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")

    monkeypatch.setattr(pixel_cache, "PixelCache", full)
    source, sentence = with_cache(open_source(folder), "auto", device=CUDA, memory=PLENTY)
    assert not isinstance(source, CachedSource)
    assert sentence.startswith("cache: OFF, images are decoded at every use: GPU memory had no room for")
    assert "Tried to allocate 3 GiB.); host memory had no room" in sentence


def test_free_memory_is_divided_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_cache, "_available", lambda: 1000)
    monkeypatch.setattr(pixel_cache, "_number", lambda path: {"memory.max": 900, "memory.current": 100}[path.name])
    assert free_memory(CPU, processes=2) == FreeMemory(host=400)
    monkeypatch.setattr(pixel_cache, "_number", lambda path: None)
    assert free_memory(CPU, processes=1) == FreeMemory(host=1000)


@pytest.mark.gpu
def test_reading_streams_wait_for_writing_streams(folder: Path) -> None:
    source = open_source(folder)
    store = PixelCache(pixel_bytes(source), device=CUDA, on=CUDA)
    decoder = make_decoder("pillow", device=CPU, batch_size=64, threads=2)
    fetch, expected = Fetcher(CachedSource(source, store), decoder), Fetcher(source, decoder)(range(12))
    for at in range(12):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10_000_000)
            fetch([at])
    with torch.cuda.stream(torch.cuda.Stream()):
        cached = fetch(range(12)).batch
        copies = [cached.image(n).clone() for n in range(12)]
    torch.cuda.synchronize()
    for n, copy in enumerate(copies):
        assert torch.equal(copy.cpu(), expected.batch.image(n))

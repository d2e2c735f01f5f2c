"""The native backend gives the reference's bits, and says why where it cannot be built."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines import DecodedBatch, InputError, ViewEngine, ViewSpec, c_library, draw, paper_views
from pipelines.views import engine as backends
from pipelines.views.native.engine import native_obstacle

needs_compiler = pytest.mark.skipif(native_obstacle() is not None, reason=f"no native backend: {native_obstacle()}")
EVERYTHING: dict[str, Any] = {"jitter_p": 1.0, "jitter": (0.8, 0.8, 0.8, 0.5), "grayscale": 0.3, "solarize": 0.5}


def noise(*sizes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8) for size in sizes]


def views_of(
    images: list[Tensor],
    specs: tuple[ViewSpec, ...],
    backend: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    batch = DecodedBatch.from_images(images, index=range(len(images)))
    params = draw(specs, batch.sizes, seed=seed, epoch=0, index=batch.index)
    return ViewEngine(specs, backend=backend, dtype=dtype)(batch, params)


def same(ours: list[Tensor], expected: list[Tensor]) -> bool:
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in ours)
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@needs_compiler
@settings(max_examples=60)
@given(
    height=st.integers(1, 120),
    width=st.integers(1, 90),
    size=st.sampled_from([8, 16, 40]),
    kernel=st.sampled_from([1, 3, 9, 15]),
    area=st.sampled_from([None, (0.05, 0.3), (0.3, 1.0)]),
    seed=st.integers(0, 2**20),
)
def test_any_image_has_the_references_bits(
    height: int, width: int, size: int, kernel: int, area: tuple[float, float] | None, seed: int
) -> None:
    spec = ViewSpec(
        name="a",
        task="t",
        size=size,
        area=area,
        blur=0.8,
        blur_kernel=kernel,
        blur_sigma=(0.1, 4.0),
        cutout=(0.1, 0.5),
        **EVERYTHING,
    )
    images = noise((height, width), (width, height), seed=seed)
    assert same(views_of(images, (spec,), "native", seed=seed), views_of(images, (spec,), "reference", seed=seed))


def sees_every_shape() -> bool:
    """Whether images of unusual shapes, whole and scaled up and down, are resized to the bytes of torch."""
    shapes = [(1, 1), (1, 700), (700, 1), (3000, 2), (2, 3000), (33, 32), (31, 64), (64, 31), (257, 1023)]
    images = noise(*shapes)
    specs = tuple(
        ViewSpec(name=f"v{size}", task="t", size=size, area=None, flip=0.5, blur_kernel=3) for size in (8, 32, 104)
    )
    return same(views_of(images, specs, "native"), views_of(images, specs, "reference"))


@needs_compiler
def test_images_of_unusual_shapes() -> None:
    assert sees_every_shape()


@needs_compiler
def test_no_pixel_outside_of_the_crop_is_looked_at() -> None:
    """The image is cut out of a canvas whose other pixels must not matter, up to the canvas's very end."""
    (image,) = noise((37, 53))
    spec = ViewSpec(name="a", task="t", size=24, area=None)
    views = []
    for rest in (0, 255):
        canvas = torch.full((40, 60, 3), rest, dtype=torch.uint8)
        canvas[3:, 7:] = image  # the last row and column of both are the same
        batch = DecodedBatch(
            pixels=canvas.reshape(-1),
            offset=torch.tensor([(3 * 60 + 7) * 3]),
            sizes=torch.tensor([[37, 53]]),
            row_stride=torch.tensor([180]),
            index=torch.tensor([0]),
            labels=torch.tensor([-1]),
        )
        params = draw((spec,), batch.sizes, seed=0, epoch=0, index=batch.index)
        views.append(ViewEngine((spec,), backend="native")(batch, params)[0])
    assert torch.equal(views[0], views[1])
    assert same([views[0]], views_of([image], (spec,), "reference"))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_papers_views_in_any_dtype_and_with_any_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    specs, images = paper_views(size=64, local_size=32), noise(*[(50 + n, 70) for n in range(19)])
    expected, before = views_of(images, specs, "reference", dtype=dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert same(views_of(images, specs, "native", dtype=dtype), expected)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_auto_takes_native_on_the_cpu() -> None:
    assert ViewEngine(paper_views()).backend == "native"
    assert [view.shape[0] for view in views_of([], paper_views(), "native")] == [0] * 5
    with pytest.raises(InputError, match="it runs on the CPU only"):
        backends.choose_backend("native", torch.device("cuda"))


@pytest.fixture
def _built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose cache is empty."""
    monkeypatch.setattr(c_library, "cache_folder", lambda: tmp_path / "cache")
    c_library.load_library.cache_clear()
    backends._announce.cache_clear()
    yield
    c_library.load_library.cache_clear()
    backends._announce.cache_clear()


@pytest.mark.usefixtures("_built_anew")
@pytest.mark.parametrize(
    ("compiler", "words"), [("no-such-compiler", "no C compiler was found"), ("false", "false could not build it")]
)
def test_without_a_compiler_the_reference_takes_over(
    compiler: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert ViewEngine(paper_views()).backend == "reference"
    assert words in caplog.text
    with pytest.raises(InputError, match=f"backend is 'native' but cannot be used on device 'cpu': {words}"):
        ViewEngine(paper_views(), backend="native")


@needs_compiler
@pytest.mark.usefixtures("_built_anew")
def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_obstacle() is None
    (library,) = (tmp_path / "cache").iterdir()
    built = library.stat().st_mtime_ns
    c_library.load_library.cache_clear()
    assert native_obstacle() is None
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()] == [built]


@needs_compiler
@pytest.mark.usefixtures("_built_anew")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="it leaves out instructions of x86")
@pytest.mark.parametrize("lacks", ["-mno-avx2", "-mno-avx512f"])
def test_older_processors_make_the_same_bits(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{shlex.join(c_library._compiler() or [])} {lacks}")
    assert sees_every_shape()


@needs_compiler
def test_views_that_are_used_keep_their_memory_and_others_give_it_back() -> None:
    specs = paper_views(size=32, local_size=16, blur_kernel=3)
    batch = DecodedBatch.from_images(noise((40, 50), (60, 30)), index=range(2))
    engine = ViewEngine(specs, backend="native")
    made = [draw(specs, batch.sizes, seed=seed, epoch=0, index=batch.index) for seed in range(6)]
    expected = [ViewEngine(specs, backend="reference")(batch, params) for params in made]
    kept = [engine(batch, params)[0] for params in made[:3]]  # the other views' memory is free at once
    assert len({view.data_ptr() for view in kept}) == 3
    part = engine(batch, made[3])[1][:, 1]  # a part of a view holds all of it
    for n in range(6):
        assert same(engine(batch, made[n]), expected[n])
    assert torch.equal(part, expected[3][1][:, 1])
    assert all(torch.equal(view, expected[n][0]) for n, view in enumerate(kept))
    places = {engine(batch, params)[4].data_ptr() for params in made}
    assert len(places) == 1

"""Draws, job tables and checks in C against those in torch: the same bits, the same refusals, without Python's lock."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines import DecodedBatch, InputError, ViewSpec, c_library, draw, paper_views
from pipelines.views import presets
from pipelines.views import sampling as checks
from pipelines.views.fused import jobs
from pipelines.views.fused.jobs import COLUMNS, Jobs, make_jobs, make_jobs_reference
from pipelines.views.native import SAMPLING
from pipelines.views.native import sampling as draws
from pipelines.views.native.sampling import params_fit, sample_native
from pipelines.views.params import SHAPES, ViewParams
from pipelines.views.sampling import check_params, sample_reference
from tests.samples.other_threads import RELEASED, turns_of_another_thread

SOURCES = (SAMPLING, jobs._SOURCE)
needs_compiler = pytest.mark.skipif(
    any(isinstance(c_library.load_library(source), str) for source in SOURCES), reason="needs a C compiler"
)
ALL_PRESETS = (
    presets.paper_views(),
    presets.paper_views(num_local=4, num_global_more=2),
    presets.byol_views(),
    presets.mocov3_views(),
    presets.simsiam_views(),
    presets.no_crop_views(),
    presets.crop_only_views(),
    presets.cutout_only_views(both=True),
    presets.asymmetric(presets.byol_views(size=64, blur_kernel=7)),
)


def sizes_of(count: int, *, largest: int, seed: int) -> Tensor:
    return torch.randint(1, largest + 1, (count, 2), generator=torch.Generator().manual_seed(seed))


def batch_of(sizes: Tensor, index: Tensor) -> DecodedBatch:
    """Images without pixels, each row 5 bytes longer than it needs."""
    stride = sizes[:, 1] * 3 + 5
    length = stride * sizes[:, 0]
    return DecodedBatch(
        pixels=torch.empty(0, dtype=torch.uint8),
        offset=length.cumsum(0) - length,
        sizes=sizes,
        row_stride=stride,
        index=index,
        labels=index,
    )


def assert_same_draws(specs: tuple[ViewSpec, ...], sizes: Tensor, index: Tensor, *, seed: int, epoch: int) -> None:
    ours = sample_native(specs, sizes, seed=seed, epoch=epoch, index=index)
    theirs = sample_reference(specs, sizes, seed=seed, epoch=epoch, index=index)
    assert ours is not None
    for name in SHAPES:
        mine, expected = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == expected.dtype, name
        assert mine.is_contiguous(), name
        assert torch.equal(mine, expected), name
    assert params_fit(ours, specs, sizes)


def assert_same_jobs(specs: tuple[ViewSpec, ...], sizes: Tensor, index: Tensor, images: slice) -> None:
    params, batch = sample_reference(specs, sizes, seed=1, epoch=2, index=index), batch_of(sizes, index)
    ours, theirs = (make(batch, specs, params, images=images) for make in (make_jobs, make_jobs_reference))
    for field in dataclasses.fields(Jobs):
        mine, expected = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(mine, Tensor):
            assert (mine.dtype, mine.shape) == (expected.dtype, expected.shape), field.name
            assert torch.equal(mine, expected), field.name
        else:
            assert mine == expected, field.name


@needs_compiler
@pytest.mark.parametrize("specs", ALL_PRESETS, ids=lambda specs: f"{len(specs)} views, {specs[-1].name}")
def test_every_preset_is_drawn_with_the_same_bits(specs: tuple[ViewSpec, ...]) -> None:
    for seed in (0, 7, 2**32 + 5, 2**64 - 1):
        sizes = sizes_of(300, largest=900, seed=seed % 1000)
        index = torch.cat((torch.arange(297), torch.tensor([2**32, 2**40 + 1, 2**63 - 1])))
        assert_same_draws(specs, sizes, index, seed=seed, epoch=seed % 2**32)
    assert_same_jobs(specs, sizes, index, slice(0, 300))
    assert_same_jobs(specs, sizes, index, slice(256, 512))
    assert_same_jobs(specs, sizes, index, slice(31, 33))


@needs_compiler
def test_every_order_of_the_jitter_comes_up() -> None:
    index = torch.arange(3000)
    params = sample_native(paper_views(), torch.full((3000, 2), 50), seed=5, epoch=0, index=index)
    assert params is not None
    assert len(set(map(tuple, params.jitter_order[0].tolist()))) == 24


ranges = st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(lambda pair: (min(pair), max(pair)))
ratios = st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(lambda pair: (min(pair), max(pair)))
chances = st.one_of(st.sampled_from([0.0, 1.0, 2.0**-32]), st.floats(0, 1))

angles = st.tuples(st.floats(-360, 360), st.floats(-360, 360)).map(lambda pair: (min(pair), max(pair)))


@st.composite
def view_specs(draw_value: Callable[..., object]) -> ViewSpec:
    values = {
        "size": st.sampled_from([8, 16, 64, 224]),
        "area": st.one_of(st.none(), ranges),
        "ratio": ratios,
        "flip": chances,
        "vertical_flip": chances,
        "quarter_turns": chances,
        "rotate": st.one_of(st.none(), st.floats(0, 360), angles, st.sampled_from([(90.0, 90.0), (-180.0, -180.0)])),
        "rotate_interpolation": st.sampled_from(["nearest", "bilinear"]),
        "rotate_fill": st.one_of(st.none(), st.floats(0, 255), st.just((1.0, 2.5, 255.0))),
        "jitter": st.tuples(*[st.floats(0, most) for most in (1.0, 1.0, 1.0, 0.5)]),
        "jitter_p": chances,
        "grayscale": chances,
        "blur": chances,
        "blur_kernel": st.sampled_from([1, 3, 9, 15]),
        "blur_sigma": st.tuples(st.floats(1e-4, 5), st.floats(1e-4, 5)).map(lambda pair: (min(pair), max(pair))),
        "solarize": chances,
        "solarize_threshold": chances,
        "cutout": st.one_of(st.none(), ranges),
        "cutout_ratio": ratios,
    }
    drawn = {name: draw_value(strategy) for name, strategy in values.items()}
    return ViewSpec(name="any", task="any", is_target=True, **drawn)  # type: ignore[arg-type]  # by their names


@needs_compiler
@settings(max_examples=150)
@given(
    specs=st.lists(view_specs(), min_size=1, max_size=4),
    sizes=st.lists(st.tuples(st.integers(1, 70_000), st.integers(1, 70_000)), max_size=5),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    first=st.integers(0, 2**63 - 6),
)
def test_any_view_of_any_image_is_drawn_with_the_same_bits(
    specs: list[ViewSpec], sizes: list[tuple[int, int]], seed: int, epoch: int, first: int
) -> None:
    table = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2)
    index = first + torch.arange(len(sizes))
    assert_same_draws(tuple(specs), table, index, seed=seed, epoch=epoch)
    if sizes:  # no batch is empty where jobs are made
        assert_same_jobs(tuple(specs), table, index, slice(0, 3))


@needs_compiler
def test_slices_of_larger_tensors_are_read_right() -> None:
    sizes, index = sizes_of(20, largest=300, seed=1), torch.arange(40)[::2]
    assert_same_draws(paper_views(), sizes.flip(1), index, seed=3, epoch=4)
    params = draw(paper_views(), sizes, seed=3, epoch=4, index=index)
    half = ViewParams(**{name: getattr(params, name)[:, ::2] for name in SHAPES})
    batch = batch_of(sizes[::2], index[::2])
    ours, theirs = (make(batch, paper_views(), half, images=slice(0, 10)) for make in (make_jobs, make_jobs_reference))
    assert torch.equal(ours.numbers, theirs.numbers)
    assert torch.equal(ours.reals, theirs.reals)


@needs_compiler
def test_threads_that_draw_at_once_draw_the_same() -> None:
    sizes, index = sizes_of(500, largest=500, seed=1), torch.arange(500)
    expected = sample_reference(paper_views(), sizes, seed=3, epoch=4, index=index)
    with ThreadPoolExecutor(4) as pool:
        for params in pool.map(lambda _: draw(paper_views(), sizes, seed=3, epoch=4, index=index), range(40)):
            assert all(torch.equal(getattr(params, name), getattr(expected, name)) for name in SHAPES)


@needs_compiler
@pytest.mark.parametrize("work", ["draw", "jobs"])
def test_the_gil_is_released(work: str) -> None:
    count = 200_000
    sizes, index = torch.full((count, 2), 400), torch.arange(count)
    params = draw(paper_views(), sizes, seed=0, epoch=0, index=index)
    works = {
        "draw": lambda: draw(paper_views(), sizes, seed=0, epoch=0, index=index),
        "jobs": lambda: make_jobs(batch_of(sizes, index), paper_views(), params, images=slice(0, count)),
    }
    assert turns_of_another_thread(works[work]) > RELEASED


REFUSED = {
    "crop": ([0, 0, 11, 5], r"ViewParams.crop\[1, 2\] is \[0, 0, 11, 5\]"),
    "cutout": ([0, 30, 8, 8], r"ViewParams.cutout\[1, 2\]"),
    "jitter": ([1.0, -0.5, 1.0, 0.0], r"ViewParams.jitter\[1, 2\]"),
    "jitter_order": ([0, 1, 2, 2], r"ViewParams.jitter_order\[1, 2\]"),
    "blur_sigma": (float("nan"), r"ViewParams.blur_sigma\[1, 2\]"),
    "quarter_turns": (4, r"ViewParams.quarter_turns\[1, 2\] is 4 but must be 0, 1, 2 or 3"),
    "angle": (float("nan"), r"ViewParams.angle\[1, 2\] is nan but must be degrees from -360 to 360"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_decisions_that_do_not_fit_are_refused_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, message = REFUSED[name]
    specs, sizes = paper_views(size=32, local_size=16, blur_kernel=5), torch.full((4, 2), 10)
    params = draw(specs, sizes, seed=0, epoch=0, index=torch.arange(4))
    check_params(params, specs, sizes)
    getattr(params, name)[1, 2] = torch.tensor(value)
    with pytest.raises(InputError, match=message) as native:
        check_params(params, specs, sizes)
    monkeypatch.setattr(checks, "params_fit", lambda *arguments: False)
    with pytest.raises(InputError) as reference:
        check_params(params, specs, sizes)
    assert str(native.value) == str(reference.value)


@pytest.mark.parametrize(("sizes", "index"), [([[3, 0]], [1]), ([[3, 3]], [-1])])
def test_what_cannot_be_drawn_is_refused(sizes: list[list[int]], index: list[int]) -> None:
    with pytest.raises(InputError, match=r"^(sizes|index) is "):
        draw(paper_views(), torch.tensor(sizes), seed=0, epoch=0, index=index)
    for seed, epoch in ((-1, 0), (2**64, 0), (0, -1), (0, 2**32)):
        with pytest.raises(InputError, match=r"^(seed|epoch) is "):
            draw(paper_views(), torch.tensor([[3, 3]]), seed=seed, epoch=epoch, index=[0])


@pytest.fixture
def _no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(c_library, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("CC", "no-such-compiler")
    for cached in (c_library.load_library, draws._announce):
        cached.cache_clear()
    yield
    for cached in (c_library.load_library, draws._announce):
        cached.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_torch_draws_the_same(caplog: pytest.LogCaptureFixture) -> None:
    sizes, index = sizes_of(9, largest=50, seed=0), torch.arange(9)
    for _ in range(2):
        params = draw(paper_views(), sizes, seed=3, epoch=1, index=index)
    expected = sample_reference(paper_views(), sizes, seed=3, epoch=1, index=index)
    assert all(torch.equal(getattr(params, name), getattr(expected, name)) for name in SHAPES)
    assert caplog.text.count("sampled in Python, which is slower: no C compiler was found") == 1
    check_params(params, paper_views(), sizes)
    assert len(make_jobs(batch_of(sizes, index), paper_views(), params, images=slice(0, 9))) == 45


def test_a_new_operation_must_be_drawn_in_c_too() -> None:
    """Fails when a decision or a field of ViewSpec is added: draw it in sampling.c, or say here that none needs it."""
    assert tuple(field.name for field in dataclasses.fields(ViewParams)) == tuple(SHAPES)
    undrawn = {"name", "task", "is_target", "interpolation", "solarize_threshold"}
    undrawn |= {"rotate_interpolation", "rotate_fill"}
    drawn = {"area", "ratio", "cutout", "cutout_ratio", "blur_sigma", "rotate"} | set(draws.Spec.names or ())
    drawn -= {"crop", "sigma", "sigma_extent", "angle", "angle_extent"}
    assert {field.name for field in dataclasses.fields(ViewSpec)} == drawn | undrawn
    assert len(COLUMNS) == int(jobs._SOURCE.read_text().partition("COLUMNS = ")[2].partition(",")[0])


def test_what_is_included_changes_the_library(tmp_path: Path) -> None:
    (tmp_path / "one.h").write_text("int one;\n")
    (tmp_path / "two.c").write_text('#include <math.h>\n#include "one.h"\nint two;\n')
    assert c_library._text(tmp_path / "two.c") == [(tmp_path / "two.c").read_bytes(), b"int one;\n"]


@pytest.mark.timing
@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux only")
def test_c_is_several_times_faster() -> None:
    sizes, index = sizes_of(256, largest=700, seed=1), torch.arange(256)
    specs, batch = paper_views(), batch_of(sizes, index)

    def native() -> None:
        params = draw(specs, sizes, seed=0, epoch=0, index=index)
        make_jobs(batch, specs, params, images=slice(0, 256))

    def reference() -> None:
        params = sample_reference(specs, sizes, seed=0, epoch=0, index=index)
        make_jobs_reference(batch, specs, params, images=slice(0, 256))

    seconds: dict[Callable[[], None], list[float]] = {native: [], reference: []}
    for _ in range(9):
        for work, taken in seconds.items():
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
    assert statistics.median(seconds[reference]) > 4 * statistics.median(seconds[native])

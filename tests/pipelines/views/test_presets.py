"""The view presets have the numbers of PAPER.md section 2 (typed from there, not from the code)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from pipelines import (
    InputError,
    ViewSpec,
    adapt_views,
    aerial_views,
    asymmetric,
    byol_views,
    crop_only_views,
    cutout_only_views,
    microscopy_views,
    mocov3_views,
    no_crop_views,
    paper_views,
    simsiam_views,
)
from pipelines.views.spec import check_views

Pair = tuple[ViewSpec, ViewSpec]

PAIRS = {
    "byol": byol_views(),
    "mocov3": mocov3_views(),
    "simsiam": simsiam_views(),
    "no crop": no_crop_views(),
    "crop only": crop_only_views(),
    "cutout in one": cutout_only_views(both=False),
    "cutout in both": cutout_only_views(both=True),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_is_two_named_targets_of_task_global(name: str) -> None:
    views = PAIRS[name]
    assert [(v.name, v.task, v.is_target, v.size, v.ratio) for v in views] == [
        ("view_1", "global", True, 224, (3 / 4, 4 / 3)),
        ("view_2", "global", True, 224, (3 / 4, 4 / 3)),
    ]
    check_views(views)


def photometrics(view: ViewSpec) -> tuple[object, ...]:
    return view.flip, view.jitter, view.jitter_p, view.grayscale, view.blur, view.solarize, view.cutout


@pytest.mark.parametrize(("name", "area"), [("byol", (0.08, 1.0)), ("mocov3", (0.2, 1.0)), ("no crop", None)])
def test_byol_mocov3_and_no_crop_differ_in_the_area_only(name: str, area: tuple[float, float] | None) -> None:
    first, second = PAIRS[name]
    assert (first.area, second.area) == (area, area)
    assert photometrics(first) == (0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 1.0, 0.0, None)
    assert photometrics(second) == (0.5, (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.1, 0.2, None)
    assert {(v.blur_kernel, v.blur_sigma, v.solarize_threshold) for v in PAIRS[name]} == {(23, (0.1, 2.0), 0.5)}


def test_simsiam_views_are_alike() -> None:
    for view in PAIRS["simsiam"]:
        assert view.area == (0.2, 1.0)
        assert photometrics(view) == (0.5, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, 0.0, None)
        assert (view.blur_kernel, view.blur_sigma) == (23, (0.1, 2.0))


def off(view: ViewSpec) -> bool:
    """Whether nothing but crop, resize, cutout and normalise can happen."""
    return (view.flip, view.jitter_p, view.grayscale, view.blur, view.solarize) == (0, 0, 0, 0, 0)


def test_crop_only() -> None:
    assert all(off(view) and view.area == (0.08, 1.0) and view.cutout is None for view in PAIRS["crop only"])


@pytest.mark.parametrize(
    ("name", "boxes"),
    [("cutout in one", [(0.2, 0.4), None]), ("cutout in both", [(0.2, 0.4), (0.2, 0.4)])],
)
def test_cutout_only(name: str, boxes: list[tuple[float, float] | None]) -> None:
    assert all(off(view) and view.area is None for view in PAIRS[name])
    assert [view.cutout for view in PAIRS[name]] == boxes
    assert all(view.cutout_ratio == (3 / 4, 4 / 3) for view in PAIRS[name])


def test_asymmetric_view_1_predicts_view_2_only() -> None:
    first, second = asymmetric(byol_views())
    assert (first.task, first.is_target, second.task, second.is_target) == ("global", False, None, True)
    check_views((first, second))
    again = dataclasses.replace(first, is_target=True), dataclasses.replace(second, task="global")
    assert again == byol_views()


def test_asymmetric_needs_a_pair() -> None:
    with pytest.raises(InputError, match=r"views is \['global_1', .* but must be two views: give a two-view preset"):
        asymmetric(paper_views())


@pytest.mark.parametrize("make", [byol_views, mocov3_views, simsiam_views, no_crop_views])
def test_smaller_views(make: Callable[..., Pair]) -> None:
    small = make(size=32, blur_kernel=5)
    assert [(v.size, v.blur_kernel) for v in small] == [(32, 5), (32, 5)]
    assert tuple(dataclasses.replace(v, size=224, blur_kernel=23) for v in small) == make()


def test_smaller_views_without_blur() -> None:
    assert [v.size for v in (*crop_only_views(size=8), *cutout_only_views(both=True, size=8))] == [8, 8, 8, 8]


def test_sizes_that_do_not_fit_name_the_view() -> None:
    with pytest.raises(InputError, match=r"ViewSpec\('view_1'\).size is 100"):
        byol_views(size=100)
    with pytest.raises(InputError, match=r"ViewSpec\('global_1'\).size is 100"):
        paper_views(size=100)
    with pytest.raises(InputError, match=r"ViewSpec\('local_1'\).blur_kernel is 23"):
        paper_views(local_size=8)


def test_other_pictures_change_orientation_and_colour_only() -> None:
    """Typed from the page README.md, not from the code."""
    changed = {
        "microscopy": {"vertical_flip", "quarter_turns", "jitter", "grayscale", "solarize"},
        "aerial": {"vertical_flip", "quarter_turns", "jitter", "solarize"},
        "astronomy": {"vertical_flip", "rotate", "jitter", "grayscale", "solarize"},
        "radiology": {"rotate", "jitter", "grayscale", "solarize"},
        "documents": {"flip", "rotate", "rotate_fill", "solarize"},
    }
    before = paper_views(size=64, local_size=32, blur_kernel=7)
    for preset, names in changed.items():
        after = adapt_views(before, preset)
        check_views(after)
        differ = {
            field.name
            for old, new in zip(before, after, strict=True)
            for field in dataclasses.fields(ViewSpec)
            if getattr(old, field.name) != getattr(new, field.name)
        }
        assert differ == names, preset
        assert {view.solarize for view in after} == {0.0}
    assert microscopy_views() == adapt_views(paper_views(), "microscopy")
    assert aerial_views(num_local=4, size=96) == adapt_views(paper_views(num_local=4, size=96), "aerial")
    for view in (*microscopy_views(), *aerial_views()):
        assert (view.vertical_flip, view.quarter_turns, view.rotate) == (0.5, 1.0, None)
        assert view.jitter[3] * 360 <= 18
    assert all(view.grayscale == 0 and view.jitter[3] * 360 < 15 for view in microscopy_views())


@pytest.mark.parametrize(("name", "words"), [("micro", "did you mean 'microscopy'"), ("x", "choose one of these")])
def test_an_unknown_preset_names_the_others(name: str, words: str) -> None:
    with pytest.raises(InputError, match=rf"view_preset is '{name}' but must be one of microscopy, .*: {words}"):
        adapt_views(paper_views(), name)

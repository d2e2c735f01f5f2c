"""View specs: the paper's table, and a sentence for every value that makes no sense."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines import InputError, ViewSpec, paper_views
from pipelines.views.spec import check_views, tasks


def test_paper_views_are_the_papers_table() -> None:
    specs = paper_views(num_local=2, num_cutout=1, num_global_more=1)
    rows = [(s.task, s.size, s.area, s.blur, s.solarize, s.cutout, s.is_target) for s in specs]
    assert rows == [
        ("global", 224, (0.25, 1.0), 1.0, 0.0, None, True),
        ("global", 224, (0.25, 1.0), 0.1, 0.2, None, True),
        ("local", 96, (0.08, 0.25), 0.5, 0.0, None, False),
        ("local", 96, (0.08, 0.25), 0.5, 0.0, None, False),
        ("cutout", 224, (0.25, 1.0), 0.5, 0.0, (0.2, 0.4), False),
        ("global_more", 224, (0.25, 1.0), 0.5, 0.0, None, False),
    ]
    assert {(s.jitter, s.jitter_p, s.grayscale, s.flip, s.blur_kernel, s.blur_sigma) for s in specs} == {
        ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.5, 23, (0.1, 2.0))
    }
    assert tasks(specs) == ("global", "local", "cutout", "global_more")
    check_views(specs)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": ""}, "ViewSpec.name"),
        ({"task": None}, "neither a task nor is it a target"),
        ({"size": 100}, "size is 100 but must be a multiple of 8"),
        ({"size": 0}, "size is 0"),
        ({"flip": 1.5}, "flip is 1.5"),
        ({"blur": -0.1}, "blur is -0.1"),
        ({"grayscale": float("nan")}, "grayscale is nan"),
        ({"area": (0.5, 0.2)}, "area is"),
        ({"area": (0.0, 1.0)}, "area is"),
        ({"area": (0.2, 1.2)}, "area is"),
        ({"cutout": (-0.2, 0.2)}, "cutout is"),
        ({"ratio": (2.0, 1.0)}, "ratio is"),
        ({"cutout_ratio": (0.0, 1.0)}, "cutout_ratio is"),
        ({"blur_sigma": (0.1, float("inf"))}, "blur_sigma is"),
        ({"jitter": (0.4, 0.4, 0.2)}, "jitter is"),
        ({"jitter": (0.4, 0.4, 0.2, 0.6)}, "jitter is"),
        ({"jitter": (1.4, 0.4, 0.2, 0.1)}, "jitter is"),
        ({"jitter": (0.4, float("nan"), 0.2, 0.1)}, "jitter is"),
        ({"blur_kernel": 22}, "blur_kernel is 22"),
        ({"size": 8, "blur_kernel": 23}, "blur_kernel is 23 but must be odd and at most 15"),
        ({"area": 0.5}, "area is 0.5 but must be two"),
        ({"ratio": (0.5, 1.0, 2.0)}, "ratio is"),
        ({"vertical_flip": 1.5}, "vertical_flip is 1.5 but must be between 0 and 1"),
        ({"quarter_turns": -0.1}, "quarter_turns is -0.1 but must be between 0 and 1"),
        ({"quarter_turns": "twice"}, "quarter_turns is 'twice' but must be a number"),
        ({"rotate": 361}, "rotate is 361 but must be degrees from 0 to 360, a range"),
        ({"rotate": -5}, "rotate is -5 but must be"),
        ({"rotate": (20, 10)}, r"rotate is \(20, 10\) but must be"),
        ({"rotate": (-400, 0)}, r"rotate is \(-400, 0\) but must be"),
        ({"rotate": (1, 2, 3)}, r"rotate is \(1, 2, 3\) but must be"),
        ({"rotate": float("nan")}, "rotate is nan but must be"),
        ({"rotate": 10**400}, "rotate is 1000"),
        ({"rotate": "45"}, "rotate is '45' but must be"),
        ({"rotate": True}, "rotate is True but must be"),
        ({"rotate_interpolation": "bicubic"}, "rotate_interpolation is 'bicubic' but must be nearest or bilinear"),
        ({"rotate_fill": 256}, "rotate_fill is 256 but must be a number from 0 to 255, three of them"),
        ({"rotate_fill": (0, 0)}, r"rotate_fill is \(0, 0\) but must be"),
        ({"rotate_fill": (0, 0, -1)}, r"rotate_fill is \(0, 0, -1\) but must be"),
        ({"rotate_fill": "white"}, "rotate_fill is 'white' but must be"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ViewSpec(**{"name": "a", "task": "t", **values})


def test_a_rotation_by_one_number_or_a_range() -> None:
    ranges = {None: (0, 0), 0: (0, 0), 15: (-15, 15), (-30, 180): (-30, 180)}
    for rotate, degrees in ranges.items():
        assert ViewSpec(name="a", task="t", rotate=rotate).degrees == degrees
    listed = ViewSpec(name="a", task="t", area=[0.1, 0.5], rotate=[-1, 2], rotate_fill=[1, 2, 3])  # type: ignore[arg-type]
    assert listed == ViewSpec(name="a", task="t", area=(0.1, 0.5), rotate=(-1, 2), rotate_fill=(1, 2, 3))
    assert (listed.rotate, listed.fill_colour) == ((-1, 2), (1, 2, 3))
    assert hash(listed) != hash(ViewSpec(name="a", task="t"))
    assert ViewSpec(name="a", task="t", rotate_fill=7).fill_colour == (7, 7, 7)
    assert ViewSpec(name="a", task="t", rotate_fill=None).fill_colour is None


def test_sets_of_views_that_cannot_be_trained_on() -> None:
    target = ViewSpec(name="a", task="t", is_target=True)
    with pytest.raises(InputError, match="views is empty"):
        check_views([])
    with pytest.raises(InputError, match="each name must be unique"):
        check_views([target, target])
    with pytest.raises(InputError, match="has no target to predict"):
        check_views([target])
    with pytest.raises(InputError, match="num_local is -1"):
        paper_views(num_local=-1)

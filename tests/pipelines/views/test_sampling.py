"""Draws are a pure function of seed, epoch, dataset index and view, and always fit their image."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import InputError, ViewSpec, draw, paper_views
from pipelines.views.params import ViewParams
from pipelines.views.sampling import check_params

SPECS = paper_views()
SIZES = torch.randint(20, 600, (40, 2), generator=torch.Generator().manual_seed(0))
INDEX = torch.randperm(100_000, generator=torch.Generator().manual_seed(1))[:40]


def same(a: ViewParams, b: ViewParams) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(ViewParams))


def pick(params: ViewParams, images: torch.Tensor) -> ViewParams:
    return ViewParams(**{f.name: getattr(params, f.name)[:, images] for f in fields(ViewParams)})


def test_shapes_and_types() -> None:
    params = draw(SPECS, SIZES, seed=0, epoch=0, index=INDEX)
    check_params(params, SPECS, SIZES)  # checks each shape and type
    assert params.crop.shape == (5, 40, 4)
    assert params.flip.device.type == "cpu"


def test_same_in_any_batch_and_position() -> None:
    whole = draw(SPECS, SIZES, seed=9, epoch=3, index=INDEX)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert same(draw(SPECS, SIZES[shuffled], seed=9, epoch=3, index=INDEX[shuffled]), pick(whole, shuffled))
    for n in range(0, 40, 7):
        alone = draw(SPECS, SIZES[n : n + 1], seed=9, epoch=3, index=[int(INDEX[n])])
        assert same(alone, pick(whole, torch.tensor([n])))
    assert same(draw(SPECS[:2], SIZES, seed=9, epoch=3, index=INDEX), ViewParams(
        **{f.name: getattr(whole, f.name)[:2] for f in fields(ViewParams)}
    ))  # fmt: skip


def test_depends_on_seed_epoch_index_and_view() -> None:
    twins = [dataclasses.replace(SPECS[0], name=name) for name in ("a", "b")]
    sizes = torch.tensor([[300, 400]]).expand(40, 2)

    def crops(seed: int, epoch: int, shift: int) -> torch.Tensor:
        return draw(twins, sizes, seed=seed, epoch=epoch, index=INDEX + shift).crop

    base = crops(0, 0, 0)
    for other in (crops(1, 0, 0), crops(2**32, 0, 0), crops(0, 1, 0), crops(0, 0, 2**20), crops(0, 0, 2**32)):
        assert (base == other).all(dim=-1).float().mean() < 0.05
    assert (base[0] == base[1]).all(dim=-1).float().mean() < 0.05


def test_changing_one_operation_leaves_the_draws_of_the_others() -> None:
    before = draw(SPECS, SIZES, seed=0, epoch=0, index=INDEX)
    changes: dict[str, dict[str, Any]] = {
        "blur_sigma": {"blur": 1.0},
        "flip": {"flip": 0.1},
        "gray": {"grayscale": 0.9},
        "solarize": {"solarize": 0.7},
        "jitter_on": {"jitter_p": 0.1},
        "cutout": {"cutout": (0.1, 0.9)},
        "crop": {"area": (0.01, 0.02)},
        "jitter": {"jitter": (0.1, 0.1, 0.1, 0.0)},
        "vertical_flip": {"vertical_flip": 0.5},
        "quarter_turns": {"quarter_turns": 1.0},
        "angle": {"rotate": 20.0},
    }
    for changed, values in changes.items():
        specs = [dataclasses.replace(spec, **values) for spec in SPECS]
        after = draw(specs, SIZES, seed=0, epoch=0, index=INDEX)
        for f in fields(ViewParams):
            assert torch.equal(getattr(before, f.name), getattr(after, f.name)) == (f.name != changed), (
                changed,
                f.name,
            )
    blurred = before.blur_sigma > 0
    more = draw([dataclasses.replace(s, blur=1.0) for s in SPECS], SIZES, seed=0, epoch=0, index=INDEX).blur_sigma
    assert torch.equal(more[blurred], before.blur_sigma[blurred])


PINNED = {
    "crop": [[[25, 73, 322, 423], [5, 7, 56, 55]]],
    "cutout": [[[84, 91, 121, 97], [50, 69, 111, 142]]],
    "jitter_order": [[[0, 1, 2, 3], [0, 2, 3, 1]]],
    "flip": [[False, False]],
    "blur_sigma": [[0.6675049066543579, 1.0046879053115845]],
    "jitter": [
        [
            [1.0981847047805786, 0.7993600368499756, 0.8159183859825134, -0.041542332619428635],
            [1.1985987424850464, 0.614952802658081, 1.1766360998153687, -0.09318464994430542],
        ]
    ],
}


def test_pinned_draws() -> None:
    """These numbers may never change: a run that is resumed by a newer version must see the same views."""
    specs = [dataclasses.replace(SPECS[4], blur=1.0)]
    params = draw(specs, torch.tensor([[375, 500], [64, 64]]), seed=42, epoch=7, index=[123456, 2**33 + 1])
    assert params.crop.tolist() == PINNED["crop"]
    assert params.cutout.tolist() == PINNED["cutout"]
    assert params.jitter_order.tolist() == PINNED["jitter_order"]
    assert params.flip.tolist() == PINNED["flip"]
    assert torch.equal(params.blur_sigma, torch.tensor(PINNED["blur_sigma"]))
    assert torch.equal(params.jitter, torch.tensor(PINNED["jitter"]))


VERTICAL = [True, True, True, False, True, False]
QUARTERS = [0, 1, 0, 1, 1, 3]
ANGLES = [-2.576875925064087, 44.51426696777344, 59.107337951660156, 53.95703125, -5.6603007316589355, 31.5411319732666]


def test_pinned_orientations() -> None:
    """As the numbers above: they may never change."""
    specs = [dataclasses.replace(SPECS[4], vertical_flip=0.5, quarter_turns=0.8, rotate=(-30, 60))]
    params = draw(specs, torch.full((6, 2), 64), seed=42, epoch=7, index=[*range(5), 2**33 + 1])
    assert params.vertical_flip.tolist() == [VERTICAL]
    assert params.quarter_turns.tolist() == [QUARTERS]
    assert torch.equal(params.angle, torch.tensor([ANGLES]))


def test_orientations_are_uniform() -> None:
    specs = [dataclasses.replace(SPECS[4], vertical_flip=0.3, quarter_turns=0.8, rotate=(-30, 60))]
    params = draw(specs, torch.full((20_000, 2), 64), seed=1, epoch=0, index=range(20_000))
    assert abs(params.vertical_flip.double().mean() - 0.3) < 0.02
    shares = params.quarter_turns.flatten().bincount(minlength=4) / 20_000
    assert (shares - torch.tensor([0.4, 0.2, 0.2, 0.2])).abs().max() < 0.02
    assert (params.angle.min() < -29.9) & (params.angle.max() > 59.9)
    assert abs(params.angle.mean() - 15.0) < 1.0
    together = torch.stack((params.vertical_flip[0] * 1.0, params.quarter_turns[0] * 1.0, params.angle[0]))
    assert (together.corrcoef() - torch.eye(3)).abs().max() < 0.03


_range = st.tuples(st.floats(1e-4, 1.0), st.floats(1e-4, 1.0)).map(lambda pair: (min(pair), max(pair)))
_ratio = st.tuples(st.floats(0.01, 100.0), st.floats(0.01, 100.0)).map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
    area=st.none() | _range,
    cutout=st.none() | _range,
    ratio=_ratio,
    size=st.integers(1, 40).map(lambda k: 8 * k),
    seed=st.integers(0, 2**64 - 1),
)
def test_boxes_lie_inside_for_any_size(
    sizes: list[tuple[int, int]],
    area: tuple[float, float] | None,
    cutout: tuple[float, float] | None,
    ratio: tuple[float, float],
    size: int,
    seed: int,
) -> None:
    spec = ViewSpec(
        name="a", task="t", size=size, area=area, ratio=ratio, cutout=cutout, cutout_ratio=ratio, blur_kernel=3
    )
    params = draw([spec], torch.tensor(sizes), seed=seed, epoch=0, index=range(len(sizes)))
    check_params(params, [spec], torch.tensor(sizes))
    for (height, width), (top, left, h, w) in zip(sizes, params.crop[0].tolist(), strict=True):
        assert 0 <= top < top + h <= height
        assert 0 <= left < left + w <= width
        if area is None:
            assert (top, left, h, w) == (0, 0, height, width)
    for top, left, h, w in params.cutout[0].tolist():
        assert (h > 0) == (cutout is not None)
        assert 0 <= top <= top + h <= size
        assert 0 <= left <= left + w <= size


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="specs is empty"):
        draw([], SIZES, seed=0, epoch=0, index=INDEX)
    for sizes in (SIZES[:, 0], SIZES[:, :1], SIZES * 0):
        with pytest.raises(InputError, match="sizes is"):
            draw(SPECS, sizes, seed=0, epoch=0, index=INDEX)
    for index in (INDEX[:-1], -INDEX - 1):
        with pytest.raises(InputError, match="index is"):
            draw(SPECS, SIZES, seed=0, epoch=0, index=index)

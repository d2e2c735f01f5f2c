"""Pairs of views and targets, and predictor slots, against lists written by hand."""

from __future__ import annotations

from dataclasses import replace

from mvssl.models.view_batching import online_views, predictor_slots, target_views, task_pairs
from pipelines.views.presets import paper_views
from pipelines.views.spec import ViewSpec


def test_paper_views() -> None:
    specs = paper_views(num_local=2, num_cutout=1)
    assert task_pairs(specs, {"local": 0.5}) == (
        ("global", 1.0, ((0, 1), (1, 0))),
        ("local", 0.5, ((2, 0), (2, 1), (3, 0), (3, 1))),
        ("cutout", 1.0, ((4, 0), (4, 1))),
    )
    assert online_views(specs) == (0, 1, 2, 3, 4)
    assert target_views(specs) == (0, 1)
    assert predictor_slots(specs, "per-view") == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2}
    assert predictor_slots(specs, "shared") == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0}


def test_two_views() -> None:
    specs = paper_views(num_local=0, num_cutout=0)
    assert task_pairs(specs, {}) == (("global", 1.0, ((0, 1), (1, 0))),)


def test_target_only_view_has_no_predictor() -> None:
    clean = ViewSpec(name="clean", task=None, is_target=True)
    specs = (clean, *(replace(spec, is_target=False) for spec in paper_views(num_local=1, num_cutout=0)))
    assert task_pairs(specs, {}) == (("global", 1.0, ((1, 0), (2, 0))), ("local", 1.0, ((3, 0),)))
    assert online_views(specs) == (1, 2, 3)
    assert predictor_slots(specs, "per-view") == {1: 0, 2: 0, 3: 1}


def test_online_network_embeds_targets_first() -> None:
    late = ViewSpec(name="late", task="late", is_target=True)
    specs = (*paper_views(num_local=1, num_cutout=0), late)
    assert online_views(specs) == (0, 1, 3, 2)
    assert predictor_slots(specs, "per-view") == {0: 0, 1: 0, 3: 2, 2: 1}

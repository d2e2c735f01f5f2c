"""mvssl-train --list: one row per recipe, in 120 columns, with the published accuracy if there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest

import mvssl
from mvssl.cli import train as train_cli
from mvssl.cli.help import count_views, size_views
from mvssl.recipes import PUBLISHED, all_recipes


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    assert train_cli.body(["--list"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    return {line.split()[0]: line.split() for line in text.splitlines()}


def test_every_recipe_has_a_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")  # a narrow terminal cuts nothing off
    table = rows(capsys)
    assert set(all_recipes()) < set(table)
    assert (
        " ".join(table["simsiam_resnet50_200ep_shared"][1:]) == "simsiam resnet50 2+2+1 224+96+224 shared 512 200 sgd"
    )
    assert " ".join(table["byol_vitb16_200ep"][1:]) == (
        "byol vit_base_patch16_224 2+2+1 224+96+224 per-view 1024 200 adamw 78.3 %"
    )


def test_views_are_counted_by_task() -> None:
    assert count_views(mvssl.recipes.byol_resnet50_800ep().views) == "2+4+1"
    assert count_views(mvssl.recipes.byol_resnet50_200ep_two_view().views) == "2"
    assert count_views(mvssl.recipes.byol_resnet50_200ep_asymmetric().views) == "1+(1)"


def test_sizes_of_views_stand_by_task() -> None:
    laptop = mvssl.recipes.laptop().views
    assert size_views(laptop) == "64+32+64"
    assert size_views((replace(laptop[0], size=48), *laptop[1:])) == "48/64+32+64"
    assert size_views(mvssl.recipes.byol_resnet50_200ep_asymmetric().views) == "224+(224)"


def test_published_accuracies_are_those_of_the_paper() -> None:
    """PAPER.md section 1."""
    assert set(PUBLISHED) <= set(all_recipes())
    assert PUBLISHED == {
        "byol_resnet50_200ep": 75.6,
        "byol_resnet50_800ep": 76.7,
        "byol_vits16_200ep": 74.5,
        "byol_vitb16_200ep": 78.3,
        "mocov3_resnet50_200ep": 75.7,
        "simsiam_resnet50_200ep": 74.7,
    }

"""Initial weights as the paper's release has them: torchvision's ResNet, and formulas, against ours."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
import torchvision
from torch import Tensor, nn

from mvssl.config.recipe import Backbone
from mvssl.models.backbones import build_backbone
from mvssl.recipes import all_recipes
from pipelines.runtime import InputError


def drawn(name: str, init: Literal["timm", "release"]) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_backbone(Backbone(name=name, init=init)).state_dict()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("init", "zero"), [("release", False), ("timm", True)])
def test_resnets_begin_as_torchvisions(name: str, init: Literal["timm", "release"], zero: bool) -> None:
    """The release's ResNet is torchvision's, with `zero_init_residual` off."""
    theirs = getattr(torchvision.models, name)(zero_init_residual=zero).state_dict()
    compared = 0
    for key, ours in drawn(name, init).items():
        wanted = theirs[key]
        assert ours.shape == wanted.shape
        if ours.dim() < 2:
            assert torch.equal(ours, wanted), key
        else:
            assert float(ours.std()) == pytest.approx(float(wanted.std()), rel=0.03), key
            compared += 1
    assert compared == len([m for m in getattr(torchvision.models, name)().modules() if isinstance(m, nn.Conv2d)])


@pytest.mark.parametrize(("name", "width"), [("vit_small_patch16_224", 384), ("vit_base_patch16_224", 768)])
def test_transformers_begin_as_the_releases(name: str, width: int) -> None:
    ours = drawn(name, "release")
    patches = ours["patch_embed.proj.weight"]
    bound = math.sqrt(6 / (3 * 16**2 + width))
    assert bound * 0.999 < float(patches.abs().max()) <= bound
    assert float(patches.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert float(patches.mean()) == pytest.approx(0, abs=bound / 100)
    assert float(ours["cls_token"].std()) == pytest.approx(0.02, rel=0.15)
    assert float(ours["pos_embed"].std()) == pytest.approx(0.02, rel=0.03)
    for key, value in ours.items():
        if key.endswith("bias"):
            assert not value.any(), key
        elif "norm" in key:
            assert bool((value == 1).all()), key
        elif key.startswith("blocks"):
            assert float(value.std()) == pytest.approx(0.02, rel=0.03), key


def test_other_architectures_stay_as_timm_draws_them() -> None:
    for key, value in drawn("convnext_atto", "release").items():
        assert torch.equal(value, drawn("convnext_atto", "timm")[key]), key


def test_the_papers_recipes_take_the_releases_weights() -> None:
    for name, make in all_recipes().items():
        ours = make.__module__ == "mvssl.recipes.ours"
        assert make().backbone.init == ("timm" if ours else "release"), name


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(InputError, match=r"Backbone.init is 'torch' but must be timm or release: choose one"):
        Backbone(init="torch")  # type: ignore[arg-type]

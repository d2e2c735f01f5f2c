"""Backbones: what is built, and what bad names and sizes get."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from mvssl.backbones import build_backbone, feature_width, is_convolutional
from mvssl.recipe import Backbone
from pipelines.errors import InputError


@pytest.mark.parametrize(("name", "width"), [("test_resnet", 96), ("resnet18", 512), ("vit_tiny_patch16_224", 192)])
def test_features_are_vectors_at_every_size(name: str, width: int) -> None:
    backbone = build_backbone(Backbone(name=name)).eval()
    assert feature_width(backbone, (64, 32), name=name) == width
    for size in (32, 64):
        with torch.no_grad():
            assert backbone(torch.zeros(2, 3, size, size)).shape == (2, width)


def test_feature_width_is_the_real_one_where_timm_counts_otherwise() -> None:
    name = "mobilenetv3_small_050"  # its num_features (288) is not the width of what it gives (1024)
    backbone = build_backbone(Backbone(name=name)).eval()
    with torch.no_grad():
        real = backbone(torch.zeros(1, 3, 32, 32)).shape[1]
    assert feature_width(backbone, (32,), name=name) == real != backbone.num_features


def test_transformer_keeps_timm_shapes_and_drop_path() -> None:
    config = Backbone(name="vit_tiny_patch16_224", drop_path=0.1)
    backbone = build_backbone(config)
    assert backbone.pos_embed.shape == (1, 197, 192)
    assert max(module.drop_prob for module in backbone.modules() if isinstance(module, DropPath)) == pytest.approx(0.1)
    target = build_backbone(config, drop_path=False)
    assert not [module for module in target.modules() if isinstance(module, DropPath) and module.drop_prob]
    assert target.state_dict().keys() == backbone.state_dict().keys()


def test_convolutional_networks_are_told_from_transformers() -> None:
    assert is_convolutional(build_backbone(Backbone(name="test_resnet")))
    assert not is_convolutional(build_backbone(Backbone(name="test_vit")))


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'resnet51' .* did you mean .*resnet50"):
        build_backbone(Backbone(name="resnet51"))
    with pytest.raises(InputError, match="must be the name of a timm model"):
        build_backbone(Backbone(name="hf-hub:someone/model"))


def test_backbone_without_drop_path_refuses_one() -> None:
    with pytest.raises(InputError, match=r"Backbone.drop_path is 0.1 but vgg11 cannot be built with it"):
        build_backbone(Backbone(name="vgg11", drop_path=0.1))


def test_size_that_does_not_fit_is_named() -> None:
    backbone = build_backbone(Backbone(name="vit_tiny_patch16_224"))
    with pytest.raises(InputError, match="vit_tiny_patch16_224 cannot take views of 40 pixels"):
        feature_width(backbone, (32, 40), name="vit_tiny_patch16_224")


def test_maps_instead_of_vectors_are_refused() -> None:
    with pytest.raises(InputError, match=r"gives \[2, 4, 6, 6\] .* must give one vector per image"):
        feature_width(nn.Conv2d(3, 4, 3), (8,), name="a_map")
    flat = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten())
    with pytest.raises(InputError, match=r"features of widths {8: 64, 16: 256}"):
        feature_width(flat, (8, 16), name="flat")

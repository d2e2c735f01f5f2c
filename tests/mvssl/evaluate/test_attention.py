"""Attention maps against a softmax written by hand, activation maps against the feature map itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mvssl.evaluate.attention import feature_maps
from mvssl.evaluate.pages.attention_page import overlay
from pipelines.runtime import InputError
from tests.samples.networks import Brightness, TwoConvolutions


def vit(name: str = "test_vit", **options: Any) -> Any:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
    for parameter in model.parameters():  # weights that make attention far from uniform
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def weights_by_hand(model: Any, images: Tensor) -> Tensor:
    """Attention [B, H, T, T] of the last block: softmax(q k^T / sqrt(d)), one head and image at a time."""
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        for block in model.blocks[:-1]:
            tokens = block(tokens)
        last = model.blocks[-1]
        x = last.norm1(tokens).double()
        weight, bias, heads = last.attn.qkv.weight.double(), last.attn.qkv.bias.double(), last.attn.num_heads
        width = x.shape[-1]
        size = width // heads
        found = torch.empty(len(x), heads, x.shape[1], x.shape[1], dtype=torch.float64)
        for image in range(len(x)):
            for head in range(heads):
                of_q = slice(head * size, (head + 1) * size)
                of_k = slice(width + head * size, width + (head + 1) * size)
                q, k = (x[image] @ weight[part].T + bias[part] for part in (of_q, of_k))
                powers = torch.exp(q @ k.T / math.sqrt(size))
                found[image, head] = powers / powers.sum(dim=1, keepdim=True)
    return found


@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_attention_is_the_softmax_of_queries_and_keys(shape: tuple[int, int]) -> None:
    model, images = vit(), torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    model.train()
    fused = [block.attn.fused_attn for block in model.blocks]
    found = feature_maps(model, images)
    assert model.training
    assert [block.attn.fused_attn for block in model.blocks] == fused
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    rows, columns = shape[0] // 16, shape[1] // 16
    expected = weights_by_hand(model, images)[:, :, 0, 1:].reshape(2, -1, rows, columns)
    assert found.kind == "attention"
    assert expected.std() > 0.01
    assert torch.allclose(found.heads.double(), expected, atol=1e-6)
    assert torch.allclose(found.mean.double(), expected.mean(dim=1), atol=1e-6)


def test_without_a_class_token_it_is_what_patches_receive() -> None:
    model, images = vit("test_vit", class_token=False, global_pool="avg"), torch.randn(2, 3, 64, 64)
    found = feature_maps(model, images)
    expected = weights_by_hand(model, images).mean(dim=2).reshape(2, -1, 4, 4)
    assert torch.allclose(found.heads.double(), expected, atol=1e-6)
    assert "each patch receives" in found.about


def test_activation_is_the_norm_of_the_last_feature_map() -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_resnet", num_classes=0).eval()
    images = torch.randn(2, 3, 96, 64)
    found = feature_maps(model, images)
    with torch.no_grad():
        last = model.forward_features(images)  # [B, C, 3, 2]
    assert found.kind == "activation"
    assert found.heads.shape == (2, 0, 3, 2)
    assert torch.allclose(found.mean, (last**2).sum(dim=1).sqrt(), atol=1e-5)


def test_a_network_of_another_library_has_activation_maps() -> None:
    model = TwoConvolutions().eval()
    images = torch.randn(1, 3, 32, 32)
    assert torch.allclose(feature_maps(model, images).mean, model.features(images).norm(dim=1), atol=1e-6)


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_vit2", "test_mambaout", "test_vit3"])
def test_maps_of_other_architectures(name: str) -> None:
    model: Any = timm.create_model(name, num_classes=0)
    size = model.pretrained_cfg["input_size"][-1]
    found = feature_maps(model, torch.randn(2, 3, size, size))
    assert found.mean.shape[0] == 2
    assert min(found.mean.shape[1:]) > 1
    assert (found.mean >= 0).all()
    assert found.mean.flatten(1).std(dim=1).min() > 0


def test_what_has_no_maps_is_a_sentence() -> None:
    with pytest.raises(InputError, match="Brightness, makes no feature maps"):
        feature_maps(Brightness(), torch.randn(1, 3, 8, 8))
    with pytest.raises(InputError, match="kind is 'attention' but TwoConvolutions has no attention"):
        feature_maps(TwoConvolutions(), torch.randn(1, 3, 32, 32), kind="attention")
    with pytest.raises(InputError, match="kind is 'grad' but must be auto, attention or activation"):
        feature_maps(nn.Identity(), torch.randn(1, 3, 8, 8), kind="grad")  # type: ignore[arg-type]


def test_an_overlay_is_bright_where_the_map_is_large() -> None:
    from PIL import Image

    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    shown = overlay(grey, torch.tensor([[0.0, 0.0], [0.0, 5.0]]), 64)
    corners = [sum(shown.getpixel(at)) for at in ((2, 2), (61, 2), (2, 61), (61, 61))]  # type: ignore[arg-type]
    assert corners[3] > 1.5 * max(corners[:3])
    even = overlay(grey, torch.full((2, 2), 3.0), 64)
    assert len(even.getcolors() or ()) == 1

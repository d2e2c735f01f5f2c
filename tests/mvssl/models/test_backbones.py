"""Backbones: what is built, and what bad names and sizes get."""

from __future__ import annotations

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from mvssl.config.recipe import Backbone
from mvssl.models.backbones import build_backbone, feature_width, is_convolutional
from pipelines.runtime import InputError


@pytest.mark.parametrize(("name", "width"), [("test_resnet", 96), ("resnet18", 512), ("vit_tiny_patch16_224", 192)])
def test_features_are_vectors_at_every_size(name: str, width: int) -> None:
    backbone = build_backbone(Backbone(name=name)).eval()
    assert feature_width(backbone, (64, 32), name=name) == width
    for size in (32, 64):
        with torch.no_grad():
            assert backbone(torch.zeros(2, 3, size, size)).shape == (2, width)


def on_meta(name: str, *, freeze_stem: bool = False) -> nn.Module:
    with torch.device("meta"):
        return build_backbone(Backbone(name=name, freeze_stem=freeze_stem))


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Published sizes (arXiv 1512.03385, 1605.07146, 2012.12877) less the classifier of 1000 classes.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_176_512),
        ("resnet34", 21_284_672),
        ("resnet50", 23_508_032),
        ("resnet101", 42_500_160),
        ("resnet152", 58_143_808),
        ("wide_resnet50_2", 66_834_240),
        ("vit_tiny_patch16_224", 5_524_416),
        ("vit_small_patch16_224", 21_665_664),
        ("vit_base_patch16_224", 85_798_656),
        ("vit_large_patch16_224", 303_301_632),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    assert parameter_count(on_meta(name)) == count


def bottleneck_resnet(depths: tuple[int, ...], factor: int) -> int:
    """Parameters of a bottleneck ResNet without classifier: no convolution has a bias, a norm has two per channel."""

    def conv_and_norm(inputs: int, outputs: int, side: int) -> int:
        return inputs * outputs * side**2 + 2 * outputs

    total, inputs = conv_and_norm(3, 64, 7), 64
    for stage, depth in enumerate(depths):
        inner, outer = 64 * factor * 2**stage, 256 * 2**stage
        total += conv_and_norm(inputs, outer, 1)  # the stage's shortcut
        for _ in range(depth):
            total += conv_and_norm(inputs, inner, 1) + conv_and_norm(inner, inner, 3) + conv_and_norm(inner, outer, 1)
            inputs = outer
    return total


# The first is published and vouches for the formula; the others are the formula's.
@pytest.mark.parametrize(
    ("name", "depths", "factor"),
    [
        ("resnet50", (3, 4, 6, 3), 1),
        ("resnet200", (3, 24, 36, 3), 1),
        ("wide_resnet101_2", (3, 4, 23, 3), 2),
    ],
)
def test_parameter_counts_follow_the_architecture(name: str, depths: tuple[int, ...], factor: int) -> None:
    assert parameter_count(on_meta(name)) == bottleneck_resnet(depths, factor)


@pytest.mark.parametrize(
    ("name", "width", "depth"),
    [
        ("vit_tiny_patch16_224", 192, 12),
        ("vit_small_patch16_224", 384, 12),
        ("vit_base_patch16_224", 768, 12),
        ("vit_large_patch16_224", 1024, 24),
    ],
)
def test_transformers_are_the_papers(name: str, width: int, depth: int) -> None:
    backbone = on_meta(name)
    assert feature_width(backbone, (96, 224), name=name) == width
    assert backbone.pos_embed.shape == (1, 1 + 14 * 14, width)
    assert backbone.cls_token.shape == (1, 1, width)
    assert [block.attn.num_heads for block in backbone.blocks] == [width // 64] * depth
    norms = [module for module in backbone.modules() if isinstance(module, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-6] * (2 * depth + 1)


def test_transformer_gives_the_class_token() -> None:
    backbone = build_backbone(Backbone(name="vit_tiny_patch16_224")).eval()
    tokens: list[Tensor] = []
    backbone.norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 96, 96))
    assert tokens[0].shape == (2, 1 + 6 * 6, 192)
    assert torch.equal(features, tokens[0][:, 0])


def bicubic(source: int, target: int) -> Tensor:
    """Weights [target, source] of antialiased bicubic shrinking (a = -0.5, pixel centres at halves), float64."""
    scale = source / target
    rows = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        for j in range(source):
            x = abs((j + 0.5) / scale - (i + 0.5))
            if x < 1:
                rows[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1
            elif x < 2:
                rows[i, j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return rows / rows.sum(1, keepdim=True)


def test_position_embedding_is_interpolated_for_local_views() -> None:
    backbone = build_backbone(Backbone(name="vit_tiny_patch16_224")).eval()
    tokens: list[Tensor] = []
    backbone.pos_drop.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        for p in (*backbone.patch_embed.parameters(), backbone.cls_token):
            p.zero_()  # what is left is the embedding alone
        torch.nn.init.normal_(backbone.pos_embed)
        for size in (224, 96):
            backbone(torch.zeros(1, 3, size, size))
    embedding = backbone.pos_embed.detach().double()[0]  # [1 + 196, 192]
    assert torch.equal(tokens[0][0].double(), embedding)
    grid = embedding[1:].view(14, 14, 192)
    weights = bicubic(14, 6)
    small = torch.einsum("ai,bj,ijc->abc", weights, weights, grid).reshape(36, 192)
    torch.testing.assert_close(tokens[1][0].double(), torch.cat([embedding[:1], small]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "width"), [("convnext_tiny", 768), ("convnext_atto", 320), ("pvt_v2_b0", 256)])
def test_other_models_with_pooled_features_fit(name: str, width: int) -> None:
    assert feature_width(on_meta(name), (96, 224), name=name) == width


def test_convnext_runs_on_local_views() -> None:
    backbone = build_backbone(Backbone(name="convnext_atto"))
    features = backbone(torch.randn(2, 3, 96, 96))
    assert features.shape == (2, 320)
    features.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


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


def test_drop_path_rises_with_depth_and_only_where_asked() -> None:
    with torch.device("meta"):
        asked = build_backbone(Backbone(name="vit_small_patch16_224", drop_path=0.1))
    rates = [block.drop_path1.drop_prob if isinstance(block.drop_path1, DropPath) else 0.0 for block in asked.blocks]
    assert rates == pytest.approx([0.1 * block / 11 for block in range(12)])
    without = on_meta("vit_small_patch16_224")
    assert not [module for module in without.modules() if isinstance(module, DropPath) and module.drop_prob]


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("resnet50", {"conv1.weight"}),
        ("vit_small_patch16_224", {"patch_embed.proj.weight", "patch_embed.proj.bias"}),
        ("convnext_tiny", {"stem.0.weight", "stem.0.bias"}),
    ],
)
def test_frozen_stem_is_the_first_convolution(name: str, frozen: set[str]) -> None:
    backbone = on_meta(name, freeze_stem=True)
    assert {key for key, p in backbone.named_parameters() if not p.requires_grad} == frozen
    assert all(p.requires_grad for p in on_meta(name).parameters())


def test_frozen_stem_gets_no_gradient_and_the_rest_does() -> None:
    backbone = build_backbone(Backbone(name="test_vit", freeze_stem=True))
    backbone(torch.randn(2, 3, 32, 32)).square().sum().backward()
    without = {key for key, p in backbone.named_parameters() if p.grad is None}
    assert without == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_stem_of_a_model_without_convolution_cannot_be_frozen() -> None:
    name = "naflexvit_base_patch16_gap"  # embeds its patches by a linear layer
    with pytest.raises(InputError, match=rf"freeze_stem is True but {name} has no convolution to freeze: set it to"):
        on_meta(name, freeze_stem=True)


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


def test_model_of_one_size_refuses_local_views() -> None:
    name = "mixer_s32_224"
    with pytest.raises(InputError, match=rf"{name} cannot take views of 96 pixels \(.*\): give its views a size that"):
        feature_width(on_meta(name), (96, 224), name=name)


def test_maps_instead_of_vectors_are_refused() -> None:
    with pytest.raises(InputError, match=r"gives \[2, 4, 6, 6\] .* must give one vector per image"):
        feature_width(nn.Conv2d(3, 4, 3), (8,), name="a_map")
    flat = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten())
    with pytest.raises(InputError, match=r"features of widths {8: 64, 16: 256}"):
        feature_width(flat, (8, 16), name="flat")

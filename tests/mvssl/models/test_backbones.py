"""Backbones: architectures, initial weights, and errors for bad names and sizes."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
import torchvision
from timm.layers.drop import DropPath
from torch import Tensor, nn

from mvssl.config.recipe import Backbone
from mvssl.models.backbones import build_backbone, feature_width, is_convolutional
from mvssl.recipes import all_recipes
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
        ("resnet50x2", 93_907_072),  # BYOL's table (arXiv 2006.07733): 94, 375 and 250 million
        ("resnet50x4", 375_378_176),
        ("resnet200x2", 250_128_512),
        ("vit_tiny_patch16_224", 5_524_416),
        ("vit_small_patch16_224", 21_665_664),
        ("vit_base_patch16_224", 85_798_656),
        ("vit_large_patch16_224", 303_301_632),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    assert parameter_count(on_meta(name)) == count


class WideResNet(torchvision.models.ResNet):  # type: ignore[misc]
    """torchvision's ResNet-50 with two times the channels everywhere."""

    def __init__(self) -> None:
        super().__init__(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3])
        self.conv1 = nn.Conv2d(3, 128, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(128)
        self.fc: nn.Module = nn.Identity()

    def _make_layer(self, block: Any, planes: int, *rest: Any, **options: Any) -> nn.Sequential:
        if planes == 64:
            self.inplanes = 128
        layer: nn.Sequential = super()._make_layer(block, 2 * planes, *rest, **options)
        return layer


def test_wide_resnets_give_the_features_of_torchvisions_blocks() -> None:
    torch.manual_seed(0)
    reference = WideResNet()
    ours = build_backbone(Backbone(name="resnet50x2"))
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for model in (reference, ours):
        model.train()(x)  # changes the running statistics
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), reference(x), rtol=1e-4, atol=1e-5)


def bottleneck_resnet(depths: tuple[int, ...], factor: int) -> int:
    """Parameters of a bottleneck ResNet without classifier: convolutions have no bias, norms two vectors."""

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


# The first is published and validates the formula; the others follow from it.
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
def test_transformer_shapes_follow_the_papers(name: str, width: int, depth: int) -> None:
    backbone = on_meta(name)
    assert feature_width(backbone, (96, 224), name=name) == width
    assert backbone.pos_embed.shape == (1, 1 + 14 * 14, width)
    assert backbone.cls_token.shape == (1, 1, width)
    assert [block.attn.num_heads for block in backbone.blocks] == [width // 64] * depth
    norms = [module for module in backbone.modules() if isinstance(module, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-6] * (2 * depth + 1)


def test_transformer_returns_the_class_token() -> None:
    backbone = build_backbone(Backbone(name="vit_tiny_patch16_224")).eval()
    tokens: list[Tensor] = []
    backbone.norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 96, 96))
    assert tokens[0].shape == (2, 1 + 6 * 6, 192)
    assert torch.equal(features, tokens[0][:, 0])


def bicubic(source: int, target: int) -> Tensor:
    """Weights [target, source] of antialiased bicubic downsampling (a = -0.5, pixel centres at halves), float64."""
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
    backbone: Any = build_backbone(Backbone(name="vit_tiny_patch16_224")).eval()
    tokens: list[Tensor] = []
    backbone.pos_drop.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        for p in (*backbone.patch_embed.parameters(), backbone.cls_token):
            p.zero_()  # leaves the position embedding only
        torch.nn.init.normal_(backbone.pos_embed)
        for size in (224, 96):
            backbone(torch.zeros(1, 3, size, size))
    embedding = backbone.pos_embed.detach().double()[0]  # [1 + 196, 192]
    assert torch.equal(tokens[0][0].double(), embedding)
    grid = embedding[1:].view(14, 14, 192)
    weights = bicubic(14, 6)
    small = torch.einsum("ai,bj,ijc->abc", weights, weights, grid).reshape(36, 192)
    torch.testing.assert_close(tokens[1][0].double(), torch.cat([embedding[:1], small]), rtol=1e-5, atol=1e-5)


def cubic(source: int, target: int, factor: float) -> Tensor:
    """Weights [target, source] of bicubic interpolation without antialiasing (a = -0.75, border repeated), float64.

    Position i of the target lies at (i + 0.5) / factor - 0.5 of the source.
    """
    rows = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        x = (i + 0.5) / factor - 0.5
        for j in range(math.floor(x) - 1, math.floor(x) + 3):
            d = abs(x - j)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3
            rows[i, min(max(j, 0), source - 1)] += near if d <= 1 else far
    return rows


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_tiny_patch16_224", ((96, 96), (96, 160), (224, 96), (240, 384))),
        ("test_vit", ((32, 32), (96, 64))),
        ("vit_small_patch8_224", ((96, 96),)),
    ],
)
def test_positions_as_by_the_reference_implementation(name: str, sizes: tuple[tuple[int, int], ...]) -> None:
    """Values and gradients, by a separable formula; SPEC of the factor: (target + 0.1) / source."""
    backbone: Any = build_backbone(Backbone(name=name, pos_embed="release")).double().eval()
    tokens: list[Tensor] = []
    backbone.pos_drop.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    with torch.no_grad():
        for p in (*backbone.patch_embed.parameters(), backbone.cls_token):
            p.zero_()  # leaves the position embedding only
        torch.nn.init.normal_(backbone.pos_embed)
    side, patch = backbone.patch_embed.grid_size[0], backbone.patch_embed.patch_size[0]
    for height, width in sizes:
        backbone(torch.zeros(2, 3, height, width, dtype=torch.float64))
        embedding = backbone.pos_embed.detach()[0].requires_grad_()
        grid = embedding[1:].view(side, side, -1)
        h, w = height // patch, width // patch
        rows, columns = (cubic(side, n, (n + 0.1) / side) if (h, w) != (side, side) else torch.eye(n) for n in (h, w))
        wanted = torch.cat([embedding[:1], torch.einsum("ai,bj,ijc->abc", rows, columns, grid).flatten(0, 1)])
        found = tokens.pop()
        torch.testing.assert_close(found, wanted.expand(2, -1, -1), rtol=1e-9, atol=1e-9)
        weights = torch.randn_like(wanted)
        (ours,) = torch.autograd.grad((found * weights).sum(), backbone.pos_embed)
        (theirs,) = torch.autograd.grad(2 * (wanted * weights).sum(), embedding)
        torch.testing.assert_close(ours[0], theirs, rtol=1e-9, atol=1e-9)


def test_reference_positions_change_small_views_only_and_compile_as_one_graph() -> None:
    theirs: Any = build_backbone(Backbone(name="test_vit")).eval()
    ours: Any = build_backbone(Backbone(name="test_vit", pos_embed="release")).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    side = theirs.patch_embed.img_size[0]
    whole, small = torch.randn(2, 3, side, side), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(whole), theirs(whole))
        assert not torch.allclose(ours(small), theirs(small), rtol=1e-2)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(small), ours(small))


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_small_patch16_dinov3", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_reference_positions_need_a_plain_transformer(name: str) -> None:
    with pytest.raises(InputError, match=rf"Backbone\.pos_embed is 'release' but {name} is not a plain vision transf"):
        build_backbone(Backbone(name=name, pos_embed="release"))


@pytest.mark.parametrize(("name", "width"), [("convnext_tiny", 768), ("convnext_atto", 320), ("pvt_v2_b0", 256)])
def test_other_models_have_pooled_features(name: str, width: int) -> None:
    assert feature_width(on_meta(name), (96, 224), name=name) == width


def test_convnext_runs_on_local_views() -> None:
    backbone = build_backbone(Backbone(name="convnext_atto"))
    features = backbone(torch.randn(2, 3, 96, 96))
    assert features.shape == (2, 320)
    features.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_feature_width_is_measured_and_not_taken_from_timm() -> None:
    name = "mobilenetv3_small_050"  # num_features is 288, the output has 1024
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


def test_drop_path_rate_rises_with_depth_and_is_off_by_default() -> None:
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


def test_model_without_convolution_has_no_stem_to_freeze() -> None:
    name = "naflexvit_base_patch16_gap"  # has a linear patch embedding
    with pytest.raises(InputError, match=rf"freeze_stem is True but {name} has no convolution to freeze: set it to"):
        on_meta(name, freeze_stem=True)


def test_is_convolutional() -> None:
    assert is_convolutional(build_backbone(Backbone(name="test_resnet")))
    assert not is_convolutional(build_backbone(Backbone(name="test_vit")))


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'resnet51' .* did you mean .*resnet50"):
        build_backbone(Backbone(name="resnet51"))
    with pytest.raises(InputError, match="must be the name of a timm model"):
        build_backbone(Backbone(name="hf-hub:someone/model"))


def test_backbone_without_drop_path_refuses_one() -> None:
    with pytest.raises(InputError, match=r"Backbone.drop_path is 0.1 but vgg11 cannot be built with it"):
        build_backbone(Backbone(name="vgg11", drop_path=0.1))


def test_unsupported_view_size_is_refused() -> None:
    backbone = build_backbone(Backbone(name="vit_tiny_patch16_224"))
    with pytest.raises(InputError, match="vit_tiny_patch16_224 cannot take views of 40 pixels"):
        feature_width(backbone, (32, 40), name="vit_tiny_patch16_224")


def test_model_of_one_size_refuses_local_views() -> None:
    name = "mixer_s32_224"
    with pytest.raises(InputError, match=rf"{name} cannot take views of 96 pixels \(.*\): give its views a size that"):
        feature_width(on_meta(name), (96, 224), name=name)


def test_feature_maps_are_refused() -> None:
    with pytest.raises(InputError, match=r"gives \[2, 4, 6, 6\] .* must give one vector per image"):
        feature_width(nn.Conv2d(3, 4, 3), (8,), name="a_map")
    flat = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten())
    with pytest.raises(InputError, match=r"features of widths {8: 64, 16: 256}"):
        feature_width(flat, (8, 16), name="flat")


def initial_state(name: str, init: Literal["timm", "release"]) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_backbone(Backbone(name=name, init=init)).state_dict()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("init", "zero"), [("release", False), ("timm", True)])
def test_initial_resnets_match_torchvision(name: str, init: Literal["timm", "release"], zero: bool) -> None:
    """The reference implementation uses torchvision's ResNet without `zero_init_residual`."""
    reference = getattr(torchvision.models, name)(zero_init_residual=zero).state_dict()
    compared = 0
    for key, ours in initial_state(name, init).items():
        wanted = reference[key]
        assert ours.shape == wanted.shape
        if ours.dim() < 2:
            assert torch.equal(ours, wanted), key
        else:
            assert float(ours.std()) == pytest.approx(float(wanted.std()), rel=0.03), key
            compared += 1
    assert compared == len([m for m in getattr(torchvision.models, name)().modules() if isinstance(m, nn.Conv2d)])


@pytest.mark.parametrize(("name", "width"), [("vit_small_patch16_224", 384), ("vit_base_patch16_224", 768)])
def test_initial_transformers_match_the_reference_implementation(name: str, width: int) -> None:
    ours = initial_state(name, "release")
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


def test_other_architectures_keep_timms_initialisation() -> None:
    for key, value in initial_state("convnext_atto", "release").items():
        assert torch.equal(value, initial_state("convnext_atto", "timm")[key]), key


def test_published_recipes_initialise_as_the_reference_implementation() -> None:
    for name, make in all_recipes().items():
        ours = make.__module__ == "mvssl.recipes.small_scale"
        assert make().backbone.init == ("timm" if ours else "release"), name


def test_unknown_initialisation_is_refused() -> None:
    with pytest.raises(InputError, match=r"Backbone.init is 'torch' but must be timm or release: choose one"):
        Backbone(init="torch")  # type: ignore[arg-type]

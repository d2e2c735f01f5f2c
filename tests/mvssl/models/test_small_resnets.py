"""ResNets for small images: torchvision's with another stem, and exported like all backbones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from mvssl.config.recipe import Backbone
from mvssl.models.backbones import build_backbone, is_convolutional
from mvssl.models.small_resnets import NAMES
from mvssl.weights.backbone_file import export_backbone, loading_code
from mvssl.weights.export import export
from mvssl.weights.load import BackboneSource, LoadedBackbone, load_backbone
from pipelines.runtime import InputError


def theirs(name: str) -> nn.Module:
    """torchvision's ResNet with the stem of networks for CIFAR (SimCLR, arXiv 2002.05709, appendix B.9)."""
    model: nn.Module = getattr(torchvision.models, name)()
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    return model


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_features_match_torchvision_with_another_stem(name: str) -> None:
    torch.manual_seed(0)
    reference = theirs(name)
    ours = build_backbone(Backbone(name=f"{name}_small"))
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(4, 3, 24, 24)
    for model in (reference, ours):
        model.train()(x)  # changes the running statistics
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), reference(x), rtol=1e-4, atol=1e-5)
    assert is_convolutional(ours)


@pytest.mark.parametrize(("name", "width", "stride"), [("resnet10_tiny", 16, 8), ("resnet10_half", 32, 16)])
def test_resnet10_is_narrow_and_shallow(name: str, width: int, stride: int) -> None:
    model: Any = build_backbone(Backbone(name=name)).eval()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 1 + 4 * 2 + 3  # stem, two per block, projections: depth 10 with the classifier
    assert convolutions[0].out_channels == width
    images = torch.zeros(2, 3, 64, 64)
    with torch.no_grad():
        assert model.forward_features(images).shape == (2, 8 * width, 64 // stride, 64 // stride)
        assert model(images).shape == (2, 8 * width)


@pytest.mark.parametrize("name", NAMES)
def test_registered_with_timm(name: str) -> None:
    assert timm.is_model(name)
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_path_rate=0.1).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 7)
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model(name, pretrained=True)


def features(backbone: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = backbone.eval()(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    return result


def test_printed_loading_code_loads_an_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(Backbone(name="resnet10_tiny"))
    path = tmp_path / "b.safetensors"
    export_backbone(backbone, "resnet10_tiny", path)
    measured = load_backbone(BackboneSource(weights=path))
    assert measured.architecture == "resnet10_tiny"
    torch.testing.assert_close(features(measured.backbone), features(backbone), rtol=0, atol=0)

    ask = "import torch; x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))"
    show = "print(float(backbone.eval()(x).sum()))"
    program = "\n".join([*loading_code("resnet10_tiny", str(path)), ask, show])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(float(features(backbone).sum()), rel=1e-4)
    assert loading_code("resnet50", "b.safetensors") == [
        "import timm",
        'backbone = timm.create_model("resnet50", num_classes=0, checkpoint_path="b.safetensors")',
    ]


@pytest.mark.parametrize(("kind", "ending"), [("torchvision", ".pth"), ("detectron2", ".pkl")])
@pytest.mark.parametrize("name", ["resnet18_small", "resnet10t", "resnet50x2"])
def test_formats_without_such_a_stem_refuse_it(tmp_path: Path, kind: str, ending: str, name: str) -> None:
    measured = load_backbone(BackboneSource(untrained=True, arch=name))
    assert isinstance(measured, LoadedBackbone)
    with pytest.raises(InputError, match=f"format is '{kind}' but {name} does not start with one 7x7 convolution"):
        export(measured, kind, tmp_path / f"b{ending}")
    assert list(tmp_path.iterdir()) == []

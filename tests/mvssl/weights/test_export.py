"""The exported backbone is what timm loads, and gives the same features."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from mvssl.config.recipe import Backbone
from mvssl.models.backbones import build_backbone
from mvssl.weights.backbone_file import export_backbone, load_backbone, read_backbone
from pipelines.runtime import InputError


def test_timm_loads_the_file_and_gives_the_same_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(Backbone(name="test_resnet"))
    x = torch.randn(4, 3, 32, 32)
    backbone.train()(x)  # move the BatchNorm statistics, which must travel too
    backbone.eval()
    out = tmp_path / "backbone.safetensors"
    export_backbone(backbone, "test_resnet", out)
    loaded = timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(out)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), backbone(x))
    assert read_backbone(out)[0] == "test_resnet"
    (tmp_path / "other").touch()
    assert out.stat().st_mode == (tmp_path / "other").stat().st_mode  # others may read it, as any file


def test_wrong_architecture_and_damage_are_sentences(tmp_path: Path) -> None:
    backbone = build_backbone(Backbone(name="test_resnet"))
    out = tmp_path / "backbone.safetensors"
    export_backbone(backbone, "test_resnet", out)
    with pytest.raises(InputError, match=r"holds a test_resnet but the recipe's backbone is resnet18"):
        load_backbone(backbone, out, architecture="resnet18")
    out.write_bytes(out.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read"):
        read_backbone(out)
    with pytest.raises(InputError, match="cannot be read"):
        read_backbone(tmp_path / "missing.safetensors")


def test_unwritable_place_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be written"):
        export_backbone(
            build_backbone(Backbone(name="test_resnet")), "test_resnet", tmp_path / "file" / "b.safetensors"
        )

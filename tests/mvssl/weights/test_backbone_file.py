"""timm loads the exported backbone, which gives the same features."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from mvssl.config.recipe import Backbone
from mvssl.models.backbones import build_backbone
from mvssl.weights.backbone_file import export_backbone
from mvssl.weights.read import read_metadata, read_weights
from pipelines.runtime import InputError


def test_timm_loads_the_file_and_gives_the_same_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(Backbone(name="test_resnet"))
    x = torch.randn(4, 3, 32, 32)
    backbone.train()(x)  # changes the BatchNorm statistics, which must be exported too
    backbone.eval()
    out = tmp_path / "backbone.safetensors"
    export_backbone(backbone, "test_resnet", out)
    loaded = timm.create_model("test_resnet", num_classes=0, checkpoint_path=str(out)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), backbone(x))
    assert read_metadata(out)["architecture"] == "test_resnet"
    (tmp_path / "other").touch()
    assert out.stat().st_mode == (tmp_path / "other").stat().st_mode  # readable by others


def test_a_damaged_or_missing_file_is_an_input_error(tmp_path: Path) -> None:
    out = tmp_path / "backbone.safetensors"
    export_backbone(build_backbone(Backbone(name="test_resnet")), "test_resnet", out)
    out.write_bytes(out.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(out)
    with pytest.raises(InputError, match="there is no file of that name"):
        read_weights(tmp_path / "missing.safetensors")


def test_an_unwritable_path_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="could not be written"):
        export_backbone(
            build_backbone(Backbone(name="test_resnet")), "test_resnet", tmp_path / "file" / "b.safetensors"
        )

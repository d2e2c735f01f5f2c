"""Other programs load the exported files and compute the same features."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torchvision
from torch import nn

from mvssl.config.recipe import Backbone, Evaluation
from mvssl.models.backbones import build_backbone
from mvssl.weights import export as exporting
from mvssl.weights.export import export
from mvssl.weights.load import BackboneSource, LoadedBackbone, load_backbone
from pipelines.runtime import InputError
from tests.samples.checkpoint_samples import random_backbone, release, write
from tests.samples.data_faults import limited_files


def a_backbone(name: str, *, crop: int = 64) -> LoadedBackbone:
    return LoadedBackbone(
        name="x",
        backbone=random_backbone(name, seed=1),
        architecture=name,
        evaluation=Evaluation(resize=crop, crop=crop),
    )


def features(model: nn.Module, size: int) -> torch.Tensor:
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        result: torch.Tensor = model.eval()(images)
    return result


def test_timm_loads_it(tmp_path: Path) -> None:
    original = a_backbone("resnet18")
    usage = export(original, "timm", tmp_path / "b.safetensors")
    path = tmp_path / "b.safetensors"
    assert usage == f'import timm; backbone = timm.create_model("resnet18", num_classes=0, checkpoint_path="{path}")'
    loaded = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(tmp_path / "b.safetensors"))
    assert torch.equal(features(loaded, 64), features(original.backbone, 64))


def test_positions_as_by_the_reference_implementation_are_kept(tmp_path: Path) -> None:
    """By our own file, a checkpoint of the reference implementation, and the program for images of another size."""
    backbone = build_backbone(Backbone(name="vit_tiny_patch16_224", pos_embed="release")).eval()
    backbone.load_state_dict(random_backbone("vit_tiny_patch16_224", seed=1).state_dict())
    settings = Evaluation(resize=96, crop=96)
    original = LoadedBackbone(
        name="x", backbone=backbone, architecture="vit_tiny_patch16_224", evaluation=settings, about=""
    )
    assert "at other sizes timm interpolates" in export(original, "timm", tmp_path / "b.safetensors")
    tensors = backbone.state_dict()
    theirs = write(tmp_path / "release.pth", release(tensors, tensors, {}, module=True))
    plain = write(tmp_path / "plain.pth", dict(tensors))
    expected = features(backbone, 96)
    for path in (tmp_path / "b.safetensors", theirs):
        assert torch.equal(features(load_backbone(BackboneSource(weights=path)).backbone, 96), expected)
    assert not torch.allclose(features(load_backbone(BackboneSource(weights=plain)).backbone, 96), expected, rtol=0.01)
    export(original, "program", tmp_path / "b.pt2")
    with torch.no_grad():
        images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(torch.export.load(tmp_path / "b.pt2").module()(images), expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_loads_its_resnets(name: str, tmp_path: Path) -> None:
    original = a_backbone(name)
    export(original, "torchvision", tmp_path / "b.pth")
    model = torchvision.models.get_model(name, weights=None)
    left = model.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True), strict=False)
    assert left.unexpected_keys == []
    assert left.missing_keys == ["fc.weight", "fc.bias"]
    model.fc = nn.Identity()
    torch.testing.assert_close(features(model, 64), features(original.backbone, 64), rtol=1e-5, atol=1e-5)


def test_torchvision_loads_its_transformers_and_we_load_them_back(tmp_path: Path) -> None:
    original = a_backbone("vit_tiny_patch16_224", crop=224)
    export(original, "torchvision", tmp_path / "b.pth")
    model = torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768)
    left = model.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True), strict=False)
    assert left.unexpected_keys == []
    assert left.missing_keys == ["heads.head.weight", "heads.head.bias"]
    model.heads = nn.Identity()
    torch.testing.assert_close(features(model, 224), features(original.backbone, 224), rtol=1e-4, atol=1e-4)
    back = load_backbone(BackboneSource(weights=tmp_path / "b.pth"))
    ours = original.backbone.state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in back.backbone.state_dict().items())


def test_detectron2_finds_all_its_tensors(tmp_path: Path) -> None:
    """The names come from detectron2/modeling/backbone/resnet.py, block by block."""
    original = a_backbone("resnet50")
    export(original, "detectron2", tmp_path / "b.pkl")
    held = pickle.loads((tmp_path / "b.pkl").read_bytes())
    norm = ("weight", "bias", "running_mean", "running_var")
    shapes = {"stem.conv1.weight": (64, 3, 7, 7)} | {f"stem.conv1.norm.{n}": (64,) for n in norm}
    width = 64
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        inner, outer = 64 * 2 ** (stage - 2), 256 * 2 ** (stage - 2)
        for block in range(blocks):
            convolutions = {"conv1": (inner, width, 1, 1), "conv2": (inner, inner, 3, 3), "conv3": (outer, inner, 1, 1)}
            if block == 0:
                convolutions["shortcut"] = (outer, width, 1, 1)
            width = outer
            for name, shape in convolutions.items():
                shapes[f"res{stage}.{block}.{name}.weight"] = shape
                shapes |= {f"res{stage}.{block}.{name}.norm.{n}": shape[:1] for n in norm}
    assert {name: array.shape for name, array in held["model"].items()} == shapes
    assert all(isinstance(array, np.ndarray) for array in held["model"].values())
    theirs, ours = held["model"], original.backbone.state_dict()
    assert np.array_equal(theirs["res4.5.conv2.norm.running_var"], ours["layer3.5.bn2.running_var"])
    assert np.array_equal(theirs["res5.0.shortcut.norm.bias"], ours["layer4.0.downsample.1.bias"])
    assert held["matching_heuristics"] is True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_onnxruntime_gives_the_same_features_for_any_batch_size(name: str, tmp_path: Path) -> None:
    crop = 64 if name == "resnet18" else 224
    original = a_backbone(name, crop=crop)
    usage = export(original, "onnx", tmp_path / "b.onnx")
    assert re.search(r"onnxruntime gives the same features \(largest difference \d\.\de-\d\d of", usage)
    assert [path.name for path in tmp_path.iterdir()] == ["b.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "b.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 4):
        images = torch.randn(count, 3, crop, crop)
        with torch.no_grad():
            expected = original.backbone(images).numpy()
        (found,) = session.run(["features"], {"images": images.numpy()})
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_a_torch_program_gives_the_same_features_for_any_batch_size(tmp_path: Path) -> None:
    original = a_backbone("resnet18")
    export(original, "program", tmp_path / "b.pt2")
    program = torch.export.load(tmp_path / "b.pt2").module()
    for count in (1, 4):
        images = torch.randn(count, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(program(images), original.backbone(images), rtol=1e-5, atol=1e-5)


def test_a_wrong_program_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_TOLERANCE", -1.0)
    with pytest.raises(InputError, match="gives other features than resnet18"):
        export(a_backbone("resnet18"), "program", tmp_path / "b.pt2")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_an_input_error(tmp_path: Path) -> None:
    convnext = a_backbone("test_convnext")
    with pytest.raises(InputError, match="is not a ResNet, the only backbone"):
        export(convnext, "detectron2", tmp_path / "b.pkl")
    with pytest.raises(InputError, match="which no torchvision model has"):
        export(convnext, "torchvision", tmp_path / "b.pth")
    with pytest.raises(InputError, match=r"a file of format onnx must end in \.onnx"):
        export(convnext, "onnx", tmp_path / "b.pth")
    with pytest.raises(InputError, match="must be one of timm, timm-folder, torchvision, detectron2, onnx, program"):
        export(convnext, "tflite", tmp_path / "b.tflite")
    (tmp_path / "b.safetensors").write_text("mine")
    with pytest.raises(InputError, match="which exists: add --overwrite"):
        export(convnext, "timm", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_text() == "mine"
    export(convnext, "timm", tmp_path / "b.safetensors", overwrite=True)
    path = write(tmp_path / "vit.pth", random_backbone("vit_tiny_patch16_224", seed=4).state_dict())
    tagged = load_backbone(BackboneSource(weights=path, arch="vit_tiny_patch16_224.augreg_in21k_ft_in1k"))
    with pytest.raises(InputError, match="expect another normalisation than ImageNet's"):
        export(tagged, "timm", tmp_path / "vit.safetensors")


def test_a_full_disk_keeps_a_folder_as_it_was(tmp_path: Path) -> None:
    loaded, out = a_backbone("test_resnet"), tmp_path / "backbone"
    export(loaded, "timm-folder", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    changed = replace(loaded, evaluation=Evaluation(resize=80, crop=72))
    for place in (out, tmp_path / "new"):
        with limited_files(10_000), pytest.raises(OSError, match="File too large"):
            export(changed, "timm-folder", place, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["backbone"]


@pytest.mark.parametrize("kind", [kind for kind, chosen in exporting.EXPORT_FORMATS.items() if chosen.endings])
def test_a_full_disk_is_one_error_of_the_system_and_keeps_the_file_that_was_there(kind: str, tmp_path: Path) -> None:
    loaded = a_backbone("resnet18" if kind in ("torchvision", "detectron2") else "test_resnet")
    out = tmp_path / f"backbone{exporting.EXPORT_FORMATS[kind].endings[0]}"
    out.write_bytes(b"before")
    with limited_files(10_000), pytest.raises(OSError, match="File too large") as failed:
        export(loaded, kind, out, overwrite=True)
    assert failed.value.filename is not None
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_bytes() == b"before"

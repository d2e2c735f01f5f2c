"""`mvssl.load_backbone` gives a frozen module with the transform and the features of the evaluations."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import mvssl
from mvssl.cli import export as export_cli
from mvssl.evaluate.features import extract_features
from mvssl.evaluate.session import Session
from mvssl.weights.load import BackboneSource
from mvssl.weights.load import load_backbone as load_source
from pipelines.storage import open_source
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def backbone(finished: Path) -> mvssl.FrozenBackbone:
    return mvssl.load_backbone(finished)


def picture(height: int = 70, width: int = 51) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_its_features_are_those_of_the_evaluations(
    backbone: mvssl.FrozenBackbone, finished: Path, images: Path
) -> None:
    loaded = load_source(BackboneSource(run=finished))
    source = open_source(images / "val")
    expected = extract_features(Session(device=torch.device("cpu")), loaded.backbone, source, loaded.evaluation)
    found = backbone.features(images / "val")
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.labels, expected.labels)
    assert found.values.shape == (12, backbone.feature_dim)
    pictures = [Image.open(path) for path in sorted((images / "val").rglob("*.jpg"))]
    assert torch.equal(backbone.features(pictures, batch_size=5).index, expected.index)
    alone = backbone(torch.stack([backbone.transform(image) for image in pictures]))
    torch.testing.assert_close(alone, expected.values)


def test_it_stays_frozen(backbone: mvssl.FrozenBackbone) -> None:
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert not any(module.training for module in backbone.train().modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    backbone(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    head = torch.nn.Linear(backbone.feature_dim, 2)
    torch.nn.Sequential(backbone, head).train()(torch.randn(4, 3, 32, 32)).sum().backward()
    assert head.weight.grad is not None


def test_the_transform_is_torchvisions(backbone: mvssl.FrozenBackbone, tmp_path: Path) -> None:
    pixels = torch.from_numpy(picture()).permute(2, 0, 1)
    theirs = v2.Compose(
        [
            v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    assert (backbone.mean, backbone.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (backbone.transform.resize, backbone.transform.crop) == (32, 32)
    image, file = Image.fromarray(picture()), io.BytesIO()
    image.save(file, "PNG")
    (tmp_path / "image.png").write_bytes(file.getvalue())
    every: list[Any] = [image, picture(), pixels, file.getvalue(), tmp_path / "image.png", {"image": image}]
    for given in every:
        torch.testing.assert_close(backbone.transform(given), theirs(pixels), rtol=0, atol=1e-6)
    again = pickle.loads(pickle.dumps(backbone.transform))
    assert torch.equal(again(image), backbone.transform(image))


def test_a_file_and_timms_folder_give_the_same(backbone: mvssl.FrozenBackbone, finished: Path, tmp_path: Path) -> None:
    for name, options in (("b.safetensors", ()), ("folder", ("--format", "timm-folder"))):
        export_cli.body(["--run", str(finished), "--out", str(tmp_path / name), *options])
    view = torch.randn(3, 3, 32, 32)
    for name in ("b.safetensors", "folder"):
        loaded = mvssl.load_backbone(tmp_path / name, resize=32, crop=32)
        assert torch.equal(loaded(view), backbone(view))
    target = mvssl.load_backbone(str(finished), network="target")
    assert not torch.equal(target(view), backbone(view))
    assert "target network" in target.about


def test_a_result_has_its_backbone(backbone: mvssl.FrozenBackbone, finished: Path) -> None:
    result = mvssl.TrainResult(out=finished, steps=12, knn={}, images_per_second=1.0, data_wait=0.0)
    view = torch.randn(3, 3, 32, 32)
    assert torch.equal(result.backbone()(view), backbone(view))
    assert torch.equal(result.backbone(network="target")(view), mvssl.load_backbone(finished, network="target")(view))


def test_what_is_wrong_is_said_in_a_sentence(backbone: mvssl.FrozenBackbone, finished: Path, tmp_path: Path) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "nowhere", {}, "nowhere', which does not exist: give a run folder"),
        (tmp_path, {}, "config.json"),
        (3, {}, "path is 3 but must be"),
        ("", {}, "path is '' but must be a path"),
        (finished, {"network": "best"}, "network is 'best' but must be"),
        (finished, {"crop": 0}, "crop is 0"),
        (finished, {"networks": 1}, "did you mean network"),
    ]
    for path, options, words in cases:
        with pytest.raises(mvssl.InputError, match=words):
            mvssl.load_backbone(path, **options)
    broken = tmp_path / "broken"
    shutil.copytree(finished, broken, symlinks=True)
    (broken / "checkpoints/last/state.pt").write_bytes(b"PK")
    with pytest.raises(mvssl.InputError, match=r"state\.pt"):
        mvssl.load_backbone(broken)
    for images, words in (
        (
            torch.zeros(3, 32, 32),
            r"images is a tensor of float32 \[3, 32, 32\] but must be a float tensor \[B, 3, S, S\]",
        ),
        (torch.zeros(1, 1, 32, 32), r"images is a tensor of float32 \[1, 1, 32, 32\] but"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"images is a tensor of uint8 .*transform\(image\)\[None\]"),
        ([torch.zeros(3)], "images is .* but must be a float tensor"),
    ):
        with pytest.raises(mvssl.InputError, match=words):
            backbone(images)
    for image, words in (
        (torch.zeros(3, 8, 8), r"image is a tensor of float32 \[3, 8, 8\] but must be of uint8"),
        (b"no image", "image cannot be decoded .not an image file"),
        ("none.jpg", "image cannot be read: No such file"),
        (None, "image is None .NoneType. but must be"),
    ):
        with pytest.raises(mvssl.InputError, match=words):
            backbone.transform(image)

"""A run starts from weights that timm knows, with their normalisation, and resumes without them."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mvssl
from mvssl.cli import train as train_cli
from mvssl.config.recipe import Backbone, Recipe
from mvssl.config.serialize import from_dict, to_dict
from mvssl.models.backbones import build_backbone, feature_width
from mvssl.models.encoder import build_networks
from mvssl.runs.folder import RunFolder
from mvssl.weights import pretrained
from mvssl.weights.init_from import init_from
from mvssl.weights.load import BackboneSource, load_backbone
from mvssl.weights.pretrained import load_pretrained, named_architecture, resolve_pretrained
from pipelines.runtime import InputError
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD

NAME = "test_vit.r160_in1k"  # images of 160 pixels, mean and standard deviation 0.5
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def timms(name: str, *, classes: int | None = None, **options: Any) -> nn.Module:
    """A model of timm with random weights, standing for the published ones."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model: Any = timm.create_model(name, pretrained=False, **options).eval()
    for attention in model.modules():  # trained ones attend to few places; new ones hardly distinguish any
        if hasattr(attention, "qkv"):
            attention.qkv.weight.data *= 8
    if classes is not None:
        model.reset_classifier(classes)
    result: nn.Module = model
    return result


def features(model: nn.Module, mean: Sequence[float], std: Sequence[float], *, size: int = 160) -> torch.Tensor:
    """Features of the same images each time, normalised as is said."""
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(9))
    images = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        result: torch.Tensor = model.eval()(images)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the hub's layout, as timm writes it."""
    path = tmp_path_factory.mktemp("pretrained") / "model"
    timm.models.save_for_hf(timms(NAME), str(path), safe_serialization=True)
    return path


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's client that holds `NAME`, on a machine without a network."""
    return offline_cache(tmp_path / "hub", folder, monkeypatch, with_weights=True)


def offline_cache(where: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *, with_weights: bool) -> Path:
    repository = where / f"models--timm--{NAME}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors") if with_weights else ("config.json",):
        shutil.copy(folder / name, snapshot / name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(where))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return where


def started(recipe: Recipe) -> tuple[Recipe, nn.Module, nn.Module, str]:
    """The resolved recipe, its networks' backbones as a run starts them, and the line on what was loaded."""
    recipe = resolve_pretrained(recipe)
    online, target = build_networks(recipe)
    line = init_from(online, target, recipe, None)
    assert line is not None
    return recipe, online.backbone, target.backbone, line


@pytest.mark.parametrize("text", [NAME, "r160_in1k", "true", f"hf-hub:timm/{NAME}"])
def test_both_networks_start_from_the_cached_weights_with_their_normalisation(
    text: str, cache: Path, tiny_recipe: Recipe
) -> None:
    assert cache.is_dir()
    recipe, online, target, line = started(
        replace(
            tiny_recipe,
            backbone=Backbone(name="test_vit", pretrained=text),
            views=tuple(replace(view, size=32) for view in tiny_recipe.views),
        )
    )
    assert (recipe.backbone.mean, recipe.backbone.std) == ((0.5,) * 3, (0.5,) * 3)
    expected = features(timms(NAME, classes=0), (0.5,) * 3, (0.5,) * 3)
    for backbone in (online, target):
        torch.testing.assert_close(features(backbone, IMAGENET_MEAN, IMAGENET_STD), expected, atol=1e-3, rtol=1e-3)
    assert f"timm/{NAME}" in line
    assert "mean (0.5, 0.5, 0.5)" in line
    assert build_networks(recipe)[0].backbone.state_dict().keys() == timms(NAME, classes=0).state_dict().keys()


def test_a_hub_repository_of_any_name_says_its_architecture(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = offline_cache(tmp_path / "hub", folder, monkeypatch, with_weights=True)
    (cache / f"models--timm--{NAME}").rename(cache / "models--me--mine")
    assert named_architecture("hf-hub:me/mine") == "test_vit"
    assert named_architecture("hf-hub:me/none") is None  # no network: the run reports it


def test_a_damaged_file_in_the_cache_is_not_called_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short, and of another network; neither is a matter of the network."""
    snapshot = (
        offline_cache(tmp_path / "hub", folder, monkeypatch, with_weights=True)
        / f"models--timm--{NAME}/snapshots/{COMMIT}"
    )
    config, weights = Backbone(name="test_vit", pretrained=NAME), snapshot / "model.safetensors"
    whole = weights.read_bytes()
    for number in range(2):
        if number:
            save_file({"other": torch.zeros(3)}, weights)
        else:
            weights.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=r"model.safetensors of timm/.* cannot be loaded .*: delete it from the"):
            load_pretrained(build_backbone(config), config)


def test_true_in_python_and_files_is_the_default_tag() -> None:
    assert Backbone(name="test_vit", pretrained=True) == Backbone(name="test_vit", pretrained="true")
    assert Backbone(pretrained=False).pretrained is Backbone(pretrained="none").pretrained is None
    recipe = mvssl.recipes.demo()
    plain = to_dict(recipe) | {"backbone": {"name": "test_vit", "pretrained": True, "mean": [0.4, 0.5, 0.6]}}
    read = from_dict(plain).backbone
    assert read == Backbone(name="test_vit", pretrained="true", mean=(0.4, 0.5, 0.6))
    assert from_dict(to_dict(recipe)) == recipe
    with pytest.raises(InputError, match=r"Backbone.std is .* but must be three numbers above 0"):
        Backbone(std=(1.0, 0.0, 1.0))
    with pytest.raises(InputError, match=r"Backbone.pretrained is ' ' but must be a tag"):
        Backbone(pretrained=" ")


def test_a_backbone_of_another_normalisation_takes_our_views_in_any_precision() -> None:
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    backbone = build_backbone(Backbone(name="test_resnet", mean=clip[0], std=clip[1])).eval()
    plain = timms("test_resnet", classes=0)
    plain.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(
        features(backbone, IMAGENET_MEAN, IMAGENET_STD), features(plain, *clip), atol=1e-3, rtol=1e-3
    )
    low = backbone.bfloat16()(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert feature_width(backbone, [32, 64], name="test_resnet") > 0


def test_a_folder_names_its_architecture_and_fits_other_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model"
    timm.models.save_for_hf(
        timms("test_vit", img_size=96), str(path), model_args={"img_size": 96}, safe_serialization=True
    )
    assert named_architecture(str(path)) == named_architecture(f"local-dir:{path}") == "test_vit"
    config = Backbone(name="test_vit", pretrained=f"local-dir:{path}")
    backbone = build_backbone(config)
    load_pretrained(backbone, config)  # its position embedding is resized to the architecture's 160 pixels
    blocks = load_file(path / "model.safetensors")["blocks.0.attn.qkv.weight"]
    assert torch.equal(backbone.state_dict()["blocks.0.attn.qkv.weight"], blocks)


def test_one_channel_is_adapted_to_three(tmp_path: Path) -> None:
    path = tmp_path / "gray"
    model = timms("test_resnet", in_chans=1)
    timm.models.save_for_hf(model, str(path), model_args={"in_chans": 1}, safe_serialization=True)
    config = resolve_pretrained(
        replace(mvssl.recipes.demo(), backbone=Backbone(name="test_resnet", pretrained=str(path)))
    ).backbone
    assert config.mean == (0.5, 0.5, 0.5)
    backbone = build_backbone(config)
    load_pretrained(backbone, config)
    grey = model.get_parameter("conv1.0.weight" if "conv1.0.weight" in model.state_dict() else "conv1.weight")
    ours = next(parameter for parameter in backbone.parameters() if parameter.shape[1:2] == (3,))
    torch.testing.assert_close(ours.sum(dim=1), grey.sum(dim=1))


def test_views_that_patches_do_not_divide_name_a_size_that_fits() -> None:
    backbone = build_backbone(Backbone(name="vit_tiny_patch16_224"))
    assert feature_width(backbone, [224, 96], name="vit_tiny_patch16_224") == 192
    backbone.patch_embed.patch_size = (14, 14)
    with pytest.raises(
        InputError, match=r"cannot take views of 96 pixels .*evaluation.crop\) 112 pixels, as its patches"
    ):
        feature_width(backbone, [224, 96], name="vit_patch14")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("test_vit", "r160_in2k", "must be one of test_vit's tags: did you mean r160_in1k?"),
        ("vit_small_patch14_dinov2", "lvd142", "did you mean lvd142m?"),
        ("vit_base_patch16_clip_224", "opnai", "did you mean openai?"),
        ("vit_smal_patch14_dinov2", "vit_smal_patch14_dinov2.lvd142m", "Backbone.name is 'vit_smal_patch14_dinov2'"),
        ("resnet50", "vit_small_patch14_dinov2.lvd142m", "set --backbone.name vit_small_patch14_dinov2"),
        ("resnet18", "vit_smal_patch14_dinov2", "or the name of other weights: did you mean vit_small_patch14_dinov2."),
        ("resnet18", "openai", "tv_in1k) or the name of other weights: did you mean resnet50_clip.openai"),
        ("resnet50_small", "true", "left out for resnet50_small, of which timm has no weights"),
        ("resnet50", "timm/resnet50.a1_in1k", "must be a tag, timm's full name, hf-hub:USER/NAME or local-dir:FOLDER"),
        ("resnet50", "local-dir:/no/such/folder", "there is no folder /no/such/folder"),
    ],
)
def test_what_does_not_exist_is_named_with_the_nearest(name: str, text: str, words: str) -> None:
    recipe = replace(mvssl.recipes.demo(), backbone=Backbone(name=name, pretrained=text))
    with pytest.raises(InputError) as caught:
        resolve_pretrained(recipe)
    assert words in str(caught.value)


def test_without_a_network_the_missing_file_and_the_ways_to_bring_it_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline_cache(tmp_path / "hub", folder, monkeypatch, with_weights=False)
    for text, missing in (("true", f"model.safetensors of timm/{NAME}"), ("hf-hub:a/b", "config.json of a/b")):
        config = Backbone(name="test_vit", pretrained=text)
        with pytest.raises(InputError) as caught:
            load_pretrained(build_backbone(config), config)
        assert missing in str(caught.value)
        for word in (str(tmp_path / "hub"), "HF_HUB_OFFLINE=1", "local-dir:FOLDER"):
            assert word in str(caught.value)


def test_damaged_or_different_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    def refused(config: dict[str, object], words: str, *, weights: bytes | None = None) -> None:
        path = tmp_path / words.replace("/", "_")
        shutil.copytree(folder, path)
        content = json.loads((folder / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(content | config))
        if weights is not None:
            (path / "model.safetensors").write_bytes(weights)
        backbone = Backbone(name="test_vit", pretrained=f"local-dir:{path}")
        with pytest.raises(InputError) as caught:
            load_pretrained(build_backbone(replace(backbone, pretrained=None)), backbone)
        assert words in str(caught.value)

    prepared = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    refused({"architecture": "test_resnet"}, "must be those of the backbone test_vit")
    refused({"model_args": {"num_heads": 8}}, "built with other arguments than timm's test_vit")
    refused({"model_args": {"global_pool": "avg"}}, "in which its weights give other features")
    refused({"pretrained_cfg": prepared | {"std": [0.5, 0, 0.5]}}, "does not say how images are prepared")
    refused({"pretrained_cfg": prepared | {"mean": "grey"}}, "correct its mean, std")
    refused({}, "cannot be loaded into test_vit", weights=b"no weights")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    refused({}, "copy the folder again", weights=(tmp_path / "other.safetensors").read_bytes())


def test_a_run_says_what_it_loaded_and_resumes_without_it(
    images: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(folder, model)
    sizes = [word for n in range(5) for word in (f"--views.{n}.size", "32")]
    heads = ["--projector.hidden", "16", "--predictor.hidden", "16", "--epochs", "1", "--log", "none"]
    places = ["--data", str(images), "--out", str(out), "--device", "cpu"]
    start = ["demo", *places, *sizes, *heads, "--backbone.pretrained", f"local-dir:{model}", "--batch-size", "12"]
    with pytest.raises(InputError, match=r"leave --backbone.pretrained or --init-from out"):
        train_cli.body([*start, "--init-from", str(model)])
    assert not out.exists()
    assert train_cli.body(start) == 0
    line = f"initial weights: {model} (folder {model}"
    assert line in " ".join((out / "train.log").read_text().split("\n"))
    assert line in (out / "report.html").read_text()
    begun = RunFolder(out).recipe().backbone
    assert (begun.name, begun.mean, begun.std) == ("test_vit", (0.5,) * 3, (0.5,) * 3)
    own = load_backbone(BackboneSource(run=out))
    by_file = load_backbone(BackboneSource(weights=out / "backbone.safetensors"))
    first = load_backbone(BackboneSource(run=out, untrained=True))
    of = [features(one.backbone, IMAGENET_MEAN, IMAGENET_STD) for one in (own, by_file, first)]
    torch.testing.assert_close(of[1], of[0])
    torch.testing.assert_close(of[2], features(timms(NAME, classes=0), (0.5,) * 3, (0.5,) * 3), atol=1e-3, rtol=1e-3)
    shutil.rmtree(model)
    assert train_cli.body([*start, "--resume"]) == 0
    longer = [*start, "--resume", "--extend", "--epochs", "2"]
    longer.remove("1")
    longer.remove("--epochs")
    assert train_cli.body(longer) == 0
    assert RunFolder(out).recipe().backbone == begun
    assert RunFolder(out).recipe().epochs == 2


def test_a_hub_that_does_not_answer_is_not_asked_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pretrained._offline_if_unreachable():
            assert not constants.HF_HUB_OFFLINE
    with pretrained._offline_if_unreachable():  # nobody listens any more
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(pretrained, "getproxies", lambda: {"https": "http://proxy:1"})
    with pretrained._offline_if_unreachable():
        assert not constants.HF_HUB_OFFLINE

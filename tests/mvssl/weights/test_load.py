"""Weights of other projects: the right network, the same features, no code from the file is run."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from mvssl.config.recipe import Backbone, Head, Recipe
from mvssl.models.backbones import build_backbone
from mvssl.models.encoder import build_networks
from mvssl.models.heads import MLP
from mvssl.training.step import TrainStep
from mvssl.weights.backbone_file import export_backbone
from mvssl.weights.formats import guess_architecture
from mvssl.weights.init_from import init_from
from mvssl.weights.load import BackboneSource, load_backbone
from mvssl.weights.read import read_weights
from pipelines.runtime import InputError
from tests.samples.checkpoint_samples import dino, moco_v2, moco_v3, put, random_backbone, release, simsiam, write

SIZE = 224


def features(model: nn.Module, *, size: int = SIZE) -> torch.Tensor:
    """Features of the same two images each time."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        result: torch.Tensor = model.eval()(images)
    return result


@pytest.fixture(scope="module")
def online() -> nn.Module:
    return random_backbone("resnet18", seed=1)


@pytest.fixture(scope="module")
def target() -> nn.Module:
    return random_backbone("resnet18", seed=2)


TWO: dict[str, Callable[[Any, Any], Any]] = {
    "release": lambda one, two: release(one, two, {"projector.0.weight": torch.ones(2, 2)}, module=False),
    "release, module": lambda one, two: release(one, two, {"predictor.0.weight": torch.ones(2, 2)}, module=True),
    "moco v3": moco_v3,
    "moco v2": moco_v2,
    "dino": lambda one, two: dino(one, two),
}


@pytest.mark.parametrize("project", TWO)
def test_either_network_of_a_checkpoint(project: str, online: nn.Module, target: nn.Module, tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoint.pth.tar", TWO[project](online.state_dict(), target.state_dict()))
    for network, model in (("online", online), ("target", target)):
        loaded = load_backbone(BackboneSource(weights=path, network=network))  # type: ignore[arg-type]
        assert loaded.architecture == "resnet18"
        assert torch.equal(features(loaded.backbone, size=64), features(model, size=64))
    usual = target if project == "dino" else online
    assert torch.equal(
        features(load_backbone(BackboneSource(weights=path)).backbone, size=64), features(usual, size=64)
    )


@pytest.mark.parametrize(
    "content",
    [
        lambda tensors: simsiam(tensors),
        lambda tensors: tensors,
        lambda tensors: {"state_dict": put("module.", tensors)},
        lambda tensors: {"model": tensors, "epoch": 3},
        lambda tensors: put("backbone.", tensors),
        lambda tensors: put("_orig_mod.", tensors) | put("_orig_mod.", {"fc.weight": torch.ones(10, 512)}),
        lambda tensors: {name: value for name, value in tensors.items() if "num_batches" not in name},
        lambda tensors: {"state_dict": put("net.encoder.", tensors), "hyper_parameters": argparse.Namespace(lr=1)},
        lambda tensors: {"module": put("module.", tensors), "optimizer": None},
        lambda tensors: {"checkpoint": {"model": {"state_dict": tensors}}, "optimizer": {"state": {0: tensors}}},
        lambda tensors: {
            name.replace("layer1.", "layer1._checkpoint_wrapped_module."): value for name, value in tensors.items()
        },
        lambda tensors: put("module.", tensors) | {"n_averaged": torch.tensor(3)},
        lambda tensors: {name: torch._neg_view(-value) for name, value in tensors.items()},
    ],
    ids=[
        *("simsiam", "bare", "wrapped", "model", "prefixed", "with a classifier", "old, without batch counters"),
        *("lightning", "deepspeed", "nested", "wrapped layers", "averaged model", "negated views"),
    ],
)
def test_one_network(content: Callable[[Any], Any], online: nn.Module, tmp_path: Path) -> None:
    path = write(tmp_path / "weights.pth", content(dict(online.state_dict())))
    assert torch.equal(
        features(load_backbone(BackboneSource(weights=path)).backbone, size=64), features(online, size=64)
    )
    with pytest.raises(InputError, match=r"^network is 'target' but .*weights\.pth"):
        load_backbone(BackboneSource(weights=path, network="target"))


def test_timms_own_file_with_its_classifier(tmp_path: Path) -> None:
    model: Any = timm.create_model("resnet26d", num_classes=7).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="does not tell its architecture"):
        load_backbone(BackboneSource(weights=tmp_path / "model.safetensors"))
    loaded = load_backbone(BackboneSource(weights=tmp_path / "model.safetensors", arch="resnet26d"))
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(torch.ones(1, 3, 64, 64)), pre_logits=True)
        assert torch.equal(loaded.backbone(torch.ones(1, 3, 64, 64)), expected)


@pytest.mark.parametrize("ema", ["state_dict_ema", "model_ema", "ema_model", "teacher"])
def test_an_ema_network_beside_another_or_alone(ema: str, online: nn.Module, target: nn.Module, tmp_path: Path) -> None:
    both = {"state_dict": dict(online.state_dict()), ema: {"module": put("module.", target.state_dict())}}
    path, alone = write(tmp_path / "both.pth", both), write(tmp_path / "alone.pth", {ema: both[ema], "epoch": 3})
    for file, network, model in ((path, "online", online), (path, "target", target), (alone, None, target)):
        loaded = load_backbone(BackboneSource(weights=file, network=network))  # type: ignore[arg-type]
        tensors = model.state_dict()
        assert all(torch.equal(value, tensors[name]) for name, value in loaded.backbone.state_dict().items())


def test_several_backbones_and_tensors_that_are_not_read(online: nn.Module, tmp_path: Path) -> None:
    tensors = dict(online.state_dict())
    two = write(tmp_path / "two.pth", {"state_dict": put("left.", tensors) | put("right.", tensors)})
    with pytest.raises(InputError, match=r"several backbones \(state_dict/left\., state_dict/right\.\)"):
        load_backbone(BackboneSource(weights=two))
    sparse = write(tmp_path / "sparse.pth", tensors | {"conv1.weight": tensors["conv1.weight"].to_sparse()})
    with pytest.raises(InputError, match=r"holds conv1\.weight as a tensor that is not dense \(_rebuild_sparse"):
        load_backbone(BackboneSource(weights=sparse))
    undefined = write(tmp_path / "nan.pth", tensors | {"bn1.bias": torch.full((64,), torch.nan)})
    with pytest.raises(InputError, match=r"undefined numbers in bn1\.bias but must have finite"):
        load_backbone(BackboneSource(weights=undefined))


@pytest.mark.parametrize("name", ["efficientnet_b0", "densenet121", "mobilenetv3_small_100"])
def test_any_architecture_of_timm_that_is_named(name: str, tmp_path: Path) -> None:
    model: Any = timm.create_model(name, num_classes=3)
    path = write(tmp_path / "model.pth", {"model_ema": model.state_dict()})
    tensors = load_backbone(BackboneSource(weights=path, arch=name)).backbone.state_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in tensors.items())


def test_safetensors_of_any_name_and_odd_metadata(online: nn.Module, tmp_path: Path) -> None:
    odd = {"num_heads": "0", "pos_embed": "release", "mean": "[1e999,0,0]", "std": "[1,1,1]", "architecture": "x"}
    for name in ("model.SAFETENSORS", "model.pth"):
        save_file(dict(online.state_dict()), tmp_path / name, metadata=odd)
    torch.save(online.state_dict(), tmp_path / "torch.safetensors")
    for name in ("model.SAFETENSORS", "model.pth", "torch.safetensors"):
        loaded = load_backbone(BackboneSource(weights=tmp_path / name)).backbone.state_dict()
        assert all(torch.equal(value, online.state_dict()[key]) for key, value in loaded.items())


def torchvision_vit(heads: int, width: int) -> nn.Module:
    torch.manual_seed(3)
    model: nn.Module = torchvision.models.VisionTransformer(
        image_size=SIZE, patch_size=16, num_layers=12, num_heads=heads, hidden_dim=width, mlp_dim=4 * width
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    model.heads = nn.Identity()
    return model.eval()


def test_torchvisions_transformer_gives_its_features(tmp_path: Path) -> None:
    model = torchvision_vit(3, 192)
    loaded = load_backbone(BackboneSource(weights=write(tmp_path / "vit.pth", model.state_dict())))
    assert loaded.architecture == "vit_tiny_patch16_224"
    torch.testing.assert_close(features(loaded.backbone), features(model), atol=1e-4, rtol=1e-4)


def test_moco_v3s_small_transformer_has_twelve_heads(tmp_path: Path) -> None:
    from mvssl.weights.formats import from_torchvision

    model = torchvision_vit(12, 384)
    tensors = from_torchvision(model.state_dict())
    path = write(tmp_path / "vit-s.pth.tar", moco_v3(tensors, tensors))
    loaded = load_backbone(BackboneSource(weights=path))
    assert loaded.architecture == "vit_small_patch16_224"
    torch.testing.assert_close(features(loaded.backbone), features(model), atol=1e-4, rtol=1e-4)
    # Its linear probe: no prefix, a classifier, and no position of the class token.
    tensors["pos_embed"][:, 0] = 0  # also the model's
    probe = put("module.", tensors | {"head.weight": torch.ones(5, 384), "head.bias": torch.ones(5)})
    path = write(tmp_path / "linear-vit-s.pth.tar", {"arch": "vit_small", "state_dict": probe})
    loaded = load_backbone(BackboneSource(weights=path))
    torch.testing.assert_close(features(loaded.backbone), features(model), atol=1e-4, rtol=1e-4)


def test_images_are_normalised_as_the_weights_expect(tmp_path: Path) -> None:
    model = random_backbone("vit_tiny_patch16_224", seed=4)
    path = write(tmp_path / "vit.pth", model.state_dict())
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    loaded = load_backbone(BackboneSource(weights=path, arch=name))
    pixels = torch.rand(2, 3, SIZE, SIZE)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    ours = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone(ours), model(2 * pixels - 1), atol=1e-4, rtol=1e-4)
    assert (loaded.evaluation.resize, loaded.evaluation.crop) == (248, 224)


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "resnet50", "resnet101", "wide_resnet50_2", "resnet50x2", "resnet101x3", "resnet200x2"),
        *("resnext50_32x4d", "resnext101_64x4d"),
        "vit_tiny_patch16_224",
    ],
)
def test_architectures_are_guessed_from_their_tensors(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    assert guess_architecture(model.state_dict()) == name


def test_an_unknown_format_is_described(tmp_path: Path) -> None:
    content = {"net": {"trunk.conv1.weight": torch.ones(1), "trunk.bn1.weight": torch.ones(1)}, "step": 3}
    path = write(tmp_path / "theirs.pt", content)
    with pytest.raises(InputError) as caught:
        load_backbone(BackboneSource(weights=path))
    for words in (
        "net/trunk.bn1, net/trunk.conv1",
        "which is no known checkpoint format. The nearest one, ",
        "Known formats: the reference implementation",
    ):
        assert words in str(caught.value)
    nearly = write(tmp_path / "nearly.pt", {"state_dict": {"base_encoders.conv1.weight": torch.ones(1)}})
    with pytest.raises(InputError, match=r"nearest one, MoCo v3, has names that start with state_dict/base_enc"):
        load_backbone(BackboneSource(weights=nearly))


class Evil:
    """Creates a folder when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_files_without_weights(tmp_path: Path, online: nn.Module) -> None:
    done = tmp_path / "done"
    with pytest.raises(InputError, match=r"evil\.pt holds .*mkdir, which is code and is not run here"):
        read_weights(write(tmp_path / "evil.pt", {"state_dict": Evil(done)}))
    assert not done.exists()
    whole = write(tmp_path / "whole.pt", online.state_dict()).read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("half.pt", "text.pt", "empty.pt", "text.safetensors"):
        with pytest.raises(InputError, match="cannot be read as a"):
            read_weights(tmp_path / name)
    with pytest.raises(InputError, match="there is no file of that name"):
        read_weights(tmp_path / "nothing.pt")
    with pytest.raises(InputError, match="holds a list but must hold a mapping"):
        read_weights(write(tmp_path / "list.pt", [torch.ones(2)]))


def test_tensors_that_do_not_fit_are_named(online: nn.Module, tmp_path: Path) -> None:
    path = write(tmp_path / "weights.pth", online.state_dict())
    with pytest.raises(InputError, match=r"does not fit resnet34: it lacks layer1\.2\.conv1\.weight.* and \d+ more"):
        load_backbone(BackboneSource(weights=path, arch="resnet34"))
    more = write(tmp_path / "more.pth", dict(online.state_dict()) | {"layer9.x": torch.ones(1)})
    with pytest.raises(InputError, match=r"it has the unexpected layer9\.x\."):
        load_backbone(BackboneSource(weights=more))
    wide = dict(online.state_dict()) | {"layer4.1.bn2.bias": torch.ones(3)}
    with pytest.raises(InputError, match=r"it has layer4\.1\.bn2\.bias \[3\] instead of \[512\]"):
        load_backbone(BackboneSource(weights=write(tmp_path / "wide.pth", wide)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "no backbone is named"),
        ({"untrained": True, "weights": Path("x")}, "untrained excludes weights"),
        ({"run": Path("x"), "arch": "resnet18"}, "leave --arch out"),
    ],
)
def test_contradictory_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        BackboneSource(**options)


def test_both_networks_of_a_run(finished: Path, tiny_recipe: Recipe) -> None:
    state = torch.load(finished / "checkpoints/last/state.pt", weights_only=True)["step"]
    for network in ("online", "target"):
        expected = build_backbone(tiny_recipe.backbone)
        prefix = "backbone."
        expected.load_state_dict({k.removeprefix(prefix): v for k, v in state[network].items() if k.startswith(prefix)})
        loaded = load_backbone(BackboneSource(run=finished, network=network))
        assert torch.equal(features(loaded.backbone, size=32), features(expected, size=32))
        assert (loaded.evaluation.resize, loaded.evaluation.k) == (32, (5, 1))
    untrained = load_backbone(BackboneSource(run=finished, untrained=True))
    assert torch.equal(
        features(untrained.backbone, size=32), features(build_networks(tiny_recipe)[0].backbone, size=32)
    )
    exported = load_backbone(BackboneSource(weights=finished / "backbone.safetensors"))
    assert exported.architecture == "test_resnet"
    assert exported.digest == load_backbone(BackboneSource(run=finished)).digest != untrained.digest


def step_of(recipe: Recipe) -> TrainStep:
    return TrainStep(recipe, device=torch.device("cpu"), total_steps=4, steps_per_epoch=4)


def heads_of(recipe: Recipe, width: int) -> tuple[MLP, dict[str, MLP]]:
    torch.manual_seed(5)
    tasks = ("global", "local", "cutout")
    return MLP(width, recipe.projector), {task: MLP(recipe.projector.out, recipe.predictor) for task in tasks}


def test_training_starts_from_a_checkpoint_of_the_reference_implementation(tiny_recipe: Recipe, tmp_path: Path) -> None:
    step = step_of(tiny_recipe)
    backbone = random_backbone("test_resnet", seed=6)
    projector, predictors = heads_of(tiny_recipe, step.online.feature_width)
    heads = put("projector.", projector.state_dict())
    for task, mlp in predictors.items():
        heads |= put(f"predictors.{task}.", mlp.state_dict())
    content = release(put("", backbone.state_dict()), put("", backbone.state_dict()), heads, module=True)
    init_from(step.online, step.target, tiny_recipe, write(tmp_path / "release.pth", content))
    torch.testing.assert_close(features(step.online.backbone, size=32), features(backbone, size=32))
    z = torch.randn(4, tiny_recipe.projector.out)
    for slot, task in enumerate(step.online.predictors.tasks):
        theirs = predictors[task].eval()(z)
        ours = step.online.predictors.eval()(z[None], (slot,))[0]
        torch.testing.assert_close(ours, theirs)
    assert step.target is not None
    torch.testing.assert_close(features(step.target.backbone, size=32), features(backbone, size=32))
    x = torch.randn(4, step.online.feature_width)
    torch.testing.assert_close(step.online.projector.eval()(x), projector.eval()(x))


def test_heads_that_do_not_fit_are_freshly_initialised(tiny_recipe: Recipe, tmp_path: Path) -> None:
    step = step_of(tiny_recipe)
    before = {name: value.clone() for name, value in step.online.predictors.state_dict().items()}
    backbone = random_backbone("test_resnet", seed=6)
    heads = put("projector.", MLP(step.online.feature_width, Head(hidden=(8,), out=4)).state_dict())
    content = release(backbone.state_dict(), backbone.state_dict(), heads, module=False)
    said = init_from(step.online, step.target, tiny_recipe, write(tmp_path / "release.pth", content))
    hidden, out = tiny_recipe.projector.hidden[0], tiny_recipe.projector.out
    width, count = step.online.feature_width, len(backbone.state_dict())
    assert said == (
        f"initial weights from {tmp_path / 'release.pth'} (the reference implementation, online network): loaded: "
        f"backbone ({count} tensors); freshly initialised: projector (it is {width}-8-4 wide in the file and "
        f"{width}-{hidden}-{out} in the recipe), predictors (the file has none); not taken: the target network (a copy "
        "of the online one is used)"
    )
    assert all(torch.equal(value, before[name]) for name, value in step.online.predictors.state_dict().items())


def test_another_architecture_is_named_with_its_option(tiny_recipe: Recipe, tmp_path: Path) -> None:
    step = step_of(tiny_recipe)
    path = write(tmp_path / "other.pth", random_backbone("resnet18", seed=1).state_dict())
    with pytest.raises(InputError, match=r"does not fit test_resnet: .* belong to \(--backbone\.name resnet18\)"):
        init_from(step.online, step.target, tiny_recipe, path)


def predictions(step: TrainStep, tasks: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Predictions from the same embeddings, by task."""
    bank, z = step.online.predictors.eval(), torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    return {task: bank(z[None, :, : bank.in_features], (bank.tasks.index(task),))[0] for task in tasks}


SINGLE = "its only predictor, for each of global, local, cutout"
GIVEN: dict[str, tuple[tuple[str, ...], str, str]] = {  # predictors in the file, how the recipe has them, words
    "single": (("",), "per-view", f"projector, {SINGLE}; not taken"),
    "one of two": (
        ("global.", "extra."),
        "per-view",
        "predictors of global; freshly initialised: predictor of local (the file has those of global, extra), "
        "predictor of cutout (the file has those of global, extra); not taken: predictors of extra (the recipe has "
        "none), the target",
    ),
    "another order": (("cutout.", "global.", "local."), "per-view", "predictors of global, local, cutout; not taken"),
    "one for the shared one": (("global.",), "shared", "its predictor of global, as the shared one; not taken"),
    "several for the shared one": (
        ("global.", "local."),
        "shared",
        "freshly initialised: shared predictor (the file has those of global, local); not taken: predictors of glo",
    ),
    "single for the shared one": (("",), "shared", "projector, shared predictor; not taken"),
}


@pytest.mark.parametrize("module", [True, False])
@pytest.mark.parametrize("case", GIVEN)
def test_what_becomes_of_predictors_is_said(case: str, module: bool, tiny_recipe: Recipe, tmp_path: Path) -> None:
    prefixes, kind, words = GIVEN[case]
    recipe = dataclasses.replace(tiny_recipe, predictors=kind)  # type: ignore[arg-type]
    step = step_of(recipe)
    fresh = predictions(step, step.online.predictors.tasks)
    torch.manual_seed(5)
    projector = MLP(step.online.feature_width, recipe.projector)
    mlps = {prefix: MLP(recipe.projector.out, recipe.predictor).eval() for prefix in prefixes}
    heads = put("projector.", projector.state_dict())
    for prefix, mlp in mlps.items():
        heads |= put(f"predictor{'s' * bool(prefix)}.{prefix}", mlp.state_dict())
    if module:
        heads = put("module.", heads)
    tensors = random_backbone("test_resnet", seed=6).state_dict()
    path = write(tmp_path / "release.pth", release(tensors, tensors, heads, module=module))
    said = init_from(step.online, step.target, recipe, path)
    assert words in str(said)
    z = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))[:, : recipe.projector.out]
    for task, found in predictions(step, step.online.predictors.tasks).items():
        own = mlps.get("") or mlps.get(f"{task}.") or (mlps["global."] if kind == "shared" and len(mlps) == 1 else None)
        torch.testing.assert_close(found, fresh[task] if own is None else own(z))


def test_predictors_of_a_run_are_taken_by_view_type(finished: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    views = tiny_recipe.views
    recipe = dataclasses.replace(tiny_recipe, views=tuple(sorted(views, key=lambda view: view.task != "cutout")))
    step, saved = step_of(recipe), step_of(tiny_recipe)
    saved.online.load_state_dict(
        torch.load(finished / "checkpoints/last/state.pt", weights_only=True)["step"]["online"]
    )
    said = init_from(step.online, step.target, recipe, finished)
    assert step.online.predictors.tasks == ("cutout", "global", "local") != saved.online.predictors.tasks
    for task, found in predictions(step, step.online.predictors.tasks).items():
        torch.testing.assert_close(found, predictions(saved, (task,))[task])
    assert "projector, predictors of cutout, global, local; not taken: the target network" in str(said)


def test_a_shared_predictor_without_bias_is_loaded(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(tiny_recipe, predictors="shared", backbone=Backbone(name="resnet18"))
    step = step_of(recipe)
    backbone = random_backbone("resnet18", seed=6)
    _, predictors = heads_of(recipe, 512)
    mlp = predictors["global"].eval()
    torch.nn.init.zeros_(mlp[-1].bias)  # type: ignore[arg-type]
    content = simsiam(backbone.state_dict())
    state = {name: tensor for name, tensor in content["state_dict"].items() if "predictor" not in name}
    state |= put("module.predictor.", {k: v for k, v in mlp.state_dict().items() if k != "3.bias"})
    init_from(step.online, step.target, recipe, write(tmp_path / "simsiam.pth.tar", content | {"state_dict": state}))
    z = torch.randn(4, recipe.projector.out)
    torch.testing.assert_close(step.online.predictors.eval()(z[None], (0,))[0], mlp(z))


def test_exported_files_are_checked_for_their_architecture(tiny_recipe: Recipe, tmp_path: Path) -> None:
    export_backbone(random_backbone("resnet18", seed=1), "resnet18", tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="holds a resnet18 but the recipe's backbone is test_resnet"):
        init_from(step_of(tiny_recipe).online, None, tiny_recipe, tmp_path / "b.safetensors")
    fitting = random_backbone("test_resnet", seed=1)
    export_backbone(fitting, "test_resnet", tmp_path / "c.safetensors")
    online = step_of(tiny_recipe).online
    init_from(online, None, tiny_recipe, tmp_path / "c.safetensors")
    torch.testing.assert_close(features(online.backbone, size=32), features(fitting, size=32))

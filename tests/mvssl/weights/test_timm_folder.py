"""timm's own loader takes the exported folder; a hub that speaks the hub's protocol takes the upload."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn

from mvssl.cli.export import body
from mvssl.config.recipe import Evaluation, Recipe
from mvssl.models.encoder import build_networks
from mvssl.weights.export import export
from mvssl.weights.init_from import init_from
from mvssl.weights.load import BackboneSource, LoadedBackbone, load_backbone
from mvssl.weights.timm_folder import CardFields, folder_files
from pipelines.files import locked
from pipelines.runtime import InputError
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD
from tests.samples.checkpoint_samples import moco_v3, random_backbone, write


def a_backbone(name: str, **options: bool) -> LoadedBackbone:
    backbone = random_backbone(name, seed=1, **options)
    return LoadedBackbone(
        name="x", backbone=backbone, architecture=name, evaluation=Evaluation(resize=72, crop=64), about="here"
    )


def features(model: nn.Module, size: int) -> torch.Tensor:
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        result: torch.Tensor = model.eval()(images)
    return result


def timms(folder: Path, **options: Any) -> nn.Module:
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "resnet10t"])
def test_timm_computes_the_same_features(name: str, tmp_path: Path) -> None:
    original = a_backbone(name, **({"dynamic_img_size": True} if name.startswith("vit") else {}))
    usage = export(original, "timm-folder", tmp_path / "b")
    assert usage == f'import timm; backbone = timm.create_model("local-dir:{tmp_path / "b"}", pretrained=True)'
    model = timms(tmp_path / "b")
    for size in (64, 96):
        assert torch.equal(features(model, size), features(original.backbone, size))
    config = resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (3, 64, 64)
    assert (tuple(config["mean"]), tuple(config["std"])) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 64 / 72)
    pixels = np.random.default_rng(0).integers(0, 255, (90, 100, 3), dtype=np.uint8)
    assert create_transform(**config)(Image.fromarray(pixels)).shape == (3, 64, 64)


def test_a_classifier_of_ones_own_can_be_put_on_it(tmp_path: Path) -> None:
    original = a_backbone("resnet18")
    export(original, "timm-folder", tmp_path / "b")
    model: Any = timms(tmp_path / "b", num_classes=7)
    assert features(model, 64).shape == (3, 7)
    model.reset_classifier(0)
    assert torch.equal(features(model, 64), features(original.backbone, 64))


def test_normalisation_of_other_weights_comes_along(tmp_path: Path) -> None:
    """Our features of ImageNet-normalised images are timm's of images normalised as the weights expect."""
    name = "vit_tiny_patch16_224.augreg_in21k"  # mean and standard deviation 0.5
    weights = write(tmp_path / "w.pth", dict(random_backbone(name.partition(".")[0], seed=1).state_dict()))
    loaded = load_backbone(BackboneSource(weights=weights, arch=name))
    export(loaded, "timm-folder", tmp_path / "b")
    model = timms(tmp_path / "b")
    config = resolve_model_data_config(model)
    assert (tuple(config["mean"]), tuple(config["std"])) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    raw = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        torch.testing.assert_close(loaded.backbone((raw - mean) / std), model((raw - 0.5) / 0.5), rtol=1e-4, atol=1e-4)
    back = load_backbone(BackboneSource(weights=tmp_path / "b"))
    assert torch.equal(features(back.backbone, 224), features(loaded.backbone, 224))
    with pytest.raises(InputError, match="write a folder"):
        export(loaded, "timm", tmp_path / "b.safetensors")


def test_another_number_of_heads_comes_along(tmp_path: Path) -> None:
    """The tensors of MoCo v3's small transformer, with 12 heads, fit timm's, with 6, and would give other features."""
    online, target = (random_backbone("vit_small_patch16_224", seed=seed).state_dict() for seed in (1, 2))
    loaded = load_backbone(BackboneSource(weights=write(tmp_path / "moco.pth", moco_v3(online, target))))
    expected = features(loaded.backbone, 224)
    export(loaded, "timm-folder", tmp_path / "b")
    usage = export(loaded, "timm", tmp_path / "b.safetensors")
    assert "num_heads=12" in usage
    plain = timm.create_model(
        "vit_small_patch16_224", num_classes=0, num_heads=12, checkpoint_path=str(tmp_path / "b.safetensors")
    )
    found = [plain, timms(tmp_path / "b")]
    found += [load_backbone(BackboneSource(weights=tmp_path / name)).backbone for name in ("b", "b.safetensors")]
    for model in found:
        torch.testing.assert_close(features(model, 224), expected)


def test_the_card_states_licence_and_form(tmp_path: Path) -> None:
    files = folder_files(a_backbone("resnet18"), CardFields(licence="cc-by-nc-4.0"))
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    head = ModelCard(files["README.md"].decode(), ignore_metadata_errors=False).data.to_dict()
    assert (head["license"], head["library_name"]) == ("cc-by-nc-4.0", "timm")
    assert head["pipeline_tag"] == "image-feature-extraction"
    for wrong in ("", "a b", "mit\nx: y"):
        with pytest.raises(InputError, match=r"license is .* must be an identifier"):
            CardFields(licence=wrong)


def test_it_initialises_a_training(tiny_recipe: Recipe, tmp_path: Path) -> None:
    original = a_backbone(tiny_recipe.backbone.name)
    export(original, "timm-folder", tmp_path / "b")
    online, target = build_networks(tiny_recipe)
    said = init_from(online, target, tiny_recipe, tmp_path / "b")
    assert said is not None
    assert "backbone" in said
    ours = online.backbone.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in original.backbone.state_dict().items())


def test_the_folder_appears_whole_and_replaces_only_its_own(tmp_path: Path) -> None:
    original = a_backbone("resnet18")
    out = tmp_path / "b"
    export(original, "timm-folder", out)
    with pytest.raises(InputError, match="exists: add --overwrite"):
        export(original, "timm-folder", out)
    (out / ".model.tmp.safetensors").write_bytes(b"half")  # of an export that was killed
    export(original, "timm-folder", out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other files \(thesis.txt\)"):
        export(original, "timm-folder", out, overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="a file, but format timm-folder writes a folder"):
        export(original, "timm-folder", tmp_path / "file", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "file"]
    (tmp_path / ".c.tmp").mkdir()  # of an export that was killed
    (tmp_path / ".c.tmp/model.safetensors").write_bytes(b"half")
    with locked(tmp_path / ".c.tmp", ""), pytest.raises(InputError, match="Another process is writing"):
        export(original, "timm-folder", tmp_path / "c")
    assert (tmp_path / ".c.tmp/model.safetensors").read_bytes() == b"half"
    export(original, "timm-folder", tmp_path / "c")
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == folder_files(original, CardFields())
    assert not (tmp_path / ".c.tmp").exists()


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    export(a_backbone("resnet18"), "timm-folder", tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())

    def with_config(text: str) -> None:
        (tmp_path / "b/config.json").write_text(text)

    def load() -> None:
        load_backbone(BackboneSource(weights=tmp_path / "b"))

    bombs = [json.dumps(config | {"model_args": {name: 10**6}}) for name in ("layers", "embed_dim")]
    for text in ("{", "[]", "{}", '{"architecture": 3}', json.dumps(config | {"pretrained_cfg": 3}), *bombs):
        with_config(text)
        with pytest.raises(InputError, match=r"whose config.json cannot be read"):
            load()
    with_config(json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | {"std": [0, 1, 1]}}))
    with pytest.raises(InputError, match="does not say how images are prepared"):
        load()
    with_config(json.dumps(config | {"model_args": {"init_values": 1e-5}}))
    with pytest.raises(InputError, match="has the model arguments init_values"):
        load()
    with_config(json.dumps(config))
    (tmp_path / "b/model.safetensors").unlink()
    with pytest.raises(InputError, match=r"without model.safetensors"):
        load()


class Hub(BaseHTTPRequestHandler):
    """The hub's protocol for one account, as huggingface_hub speaks it: repositories, preupload, LFS and commits."""

    server: HubServer

    def answer(self, status: int, content: Any = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_any(self) -> None:
        held, path = self.server, self.path.partition("?")[0]
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        held.seen.append(f"{self.command} {path}")
        if not path.startswith("/upload") and self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer(401, {"error": "Invalid credentials"})
        if held.down:
            return self.answer(503, {"error": "down"})
        if path == "/api/repos/create":
            held.created = json.loads(data)
            return self.answer(200, {"url": f"{held.address}/user/{held.created['name']}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular"}
                for f in json.loads(data)["files"]
            ]
            return self.answer(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{held.address}/upload/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if path.startswith("/upload/"):
            held.lfs[path.rpartition("/")[2]] = data
            return self.answer(200, {})
        if path.endswith("/commit/main"):
            for line in data.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    held.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
                if row["key"] == "lfsFile":
                    held.files[row["value"]["path"]] = held.lfs[row["value"]["oid"]]
            url = f"{held.address}/user/b/commit/{'0' * 40}"
            return self.answer(200, {"commitUrl": url, "commitOid": "0" * 40, "success": True})
        if "/resolve/main/" in path:
            self.send_response(200 if path.rpartition("/")[2] in held.files else 404)
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", "x")
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        return self.answer(404, {"error": path})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815  (names of http.server)

    def log_message(self, *_: object) -> None:
        """Nothing on the console."""


class HubServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.lfs: dict[str, bytes] = {}
        self.created: dict[str, Any] = {}
        self.seen: list[str] = []
        self.down = False


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def push(hub: HubServer, weights: Path, *more: str, token: str = "hf_good") -> subprocess.CompletedProcess[str]:
    """In a process of its own, since huggingface_hub reads its variables when it is imported."""
    variables = {
        "HF_ENDPOINT": hub.address,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(weights.parent),
    }
    command = [sys.executable, "-m", "mvssl.cli.export", "--weights", str(weights), "--push", "user/b", *more]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_a_push_uploads_the_folder_and_keeps_a_card_that_is_there(hub: HubServer, tmp_path: Path) -> None:
    weights = write(tmp_path / "w.pth", dict(random_backbone("resnet18", seed=1).state_dict()))
    done = push(hub, weights, "--private", "--license", "mit", "--out", str(tmp_path / "b"))
    assert done.returncode == 0, done.stderr
    assert f"{hub.address}/user/b: resnet18" in done.stdout
    assert hub.created.get("visibility") == "private" or hub.created["private"] is True  # by its version
    assert hub.created["name"] == "b"
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert list(hub.lfs) == [hashlib.sha256(hub.files["model.safetensors"]).hexdigest()]
    (tmp_path / "again").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "again" / name).write_bytes(content)
    model = timms(tmp_path / "again")
    expected = load_file(tmp_path / "b/model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

    hub.files["README.md"] = b"mine"
    done = push(hub, weights)
    assert done.returncode == 0, done.stderr
    assert "(its README.md is kept)" in done.stdout
    assert hub.files["README.md"] == b"mine"


def test_what_a_push_lacks_is_said_in_one_sentence(hub: HubServer, tmp_path: Path) -> None:
    weights = write(tmp_path / "w.pth", dict(random_backbone("resnet18", seed=1).state_dict()))
    done = push(hub, weights, "--out", str(tmp_path / "b"), token="")
    assert not (tmp_path / "b").exists(), "nothing is written before it is known that it can be uploaded"
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "push needs an account of the hub" in done.stderr
    assert not hub.seen
    done = push(hub, weights, token="hf_bad")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "log in again" in done.stderr
    with pytest.raises(InputError, match="leave --format or --push out"):
        body(["--weights", str(weights), "--push", "user/b", "--format", "onnx"])
    with pytest.raises(InputError, match="out is missing"):
        body(["--weights", str(weights)])

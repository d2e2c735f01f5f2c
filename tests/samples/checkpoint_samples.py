"""Checkpoints in the formats of other projects, with given or random weights."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]


def random_backbone(name: str, *, seed: int, **options: Any) -> nn.Module:
    """A timm backbone with random BatchNorm statistics, in eval mode."""
    torch.manual_seed(seed)
    backbone: nn.Module = timm.create_model(name, num_classes=0, **options)
    for name, tensor in backbone.named_buffers():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            tensor.normal_(std=0.1)
    with torch.no_grad():
        features = backbone.eval()(torch.randn(2, 3, 224, 224))
    assert features.std() > 0.01 * features.abs().max() > 0  # or equal features would prove nothing
    return backbone


def put(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The same tensors with a prefix on their names."""
    return {prefix + name: tensor.clone() for name, tensor in tensors.items()}


def layer(*shape: int) -> Tensor:
    """A random tensor."""
    return torch.randn(*shape)


def release(online: Tensors, target: Tensors, heads: Tensors, *, module: bool) -> dict[str, Any]:
    """The reference implementation: heads as `projector.0.weight`, `predictors.global.0.weight`."""
    wrapper = "module." if module else ""
    return {
        "online_model": put(wrapper, put("backbone.", online) | dict(heads)),
        "target_model": put(wrapper, put("backbone.", target)),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "scaler": {"scale": 65536.0},
        "epoch": 199,
    }


def moco_v3(online: Tensors, target: Tensors) -> dict[str, Any]:
    """MoCo v3: the projector takes the classifier's place."""
    head = "head" if "cls_token" in online else "fc"
    sides = {"base_encoder.": online, "momentum_encoder.": target}
    state = {
        name: tensor
        for side, tensors in sides.items()
        for name, tensor in put(f"module.{side}", dict(tensors) | {f"{head}.0.weight": layer(8, 4)}).items()
    }
    return {
        "epoch": 300,
        "arch": "vit_small" if "cls_token" in online else "resnet18",
        "state_dict": state | {"module.predictor.0.weight": layer(4, 4)},
        "optimizer": {},
    }


def moco_v2(online: Tensors, target: Tensors) -> dict[str, Any]:
    """MoCo v2: a queue lies beside."""
    state = put("module.encoder_q.", dict(online) | {"fc.0.weight": layer(4, 4)})
    state |= put("module.encoder_k.", dict(target) | {"fc.0.weight": layer(4, 4)})
    return {"epoch": 200, "arch": "resnet18", "state_dict": state | {"module.queue": layer(4, 16)}}


def simsiam(online: Tensors) -> dict[str, Any]:
    """SimSiam: one encoder, the projector in the classifier's place."""
    state = put("module.encoder.", dict(online) | {"fc.0.weight": layer(4, 4), "fc.6.bias": layer(4)})
    return {"epoch": 100, "arch": "resnet18", "state_dict": state | {"module.predictor.0.weight": layer(4, 4)}}


def dino(student: Tensors, teacher: Tensors) -> dict[str, Any]:
    """DINO: its arguments are an argparse.Namespace, its loss a tensor, its epoch a number of numpy."""
    return {
        "student": put("module.", put("backbone.", student) | {"head.mlp.0.weight": layer(4, 4)}),
        "teacher": put("backbone.", teacher) | {"head.mlp.0.weight": layer(4, 4)},
        "args": argparse.Namespace(arch="vit_tiny", patch_size=16, output_dir=None),
        "loss": np.float64(0.5),
        "epoch": np.int64(100),
    }


def write(path: Path, held: Any) -> Path:
    """Save as torch.save does."""
    torch.save(held, path)
    return path

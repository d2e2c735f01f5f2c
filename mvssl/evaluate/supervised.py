"""Supervised training of a classifier: of its linear layer on frozen features, or of the whole network.

A classifier, of a backbone and a linear layer, and what it says of the images of a source.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.data.mixup import Mixup
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]  # public, but not marked so
from torch import Tensor, nn

from mvssl.distributed import World
from mvssl.evaluate.features import train_view
from mvssl.evaluate.session import Computing
from mvssl.models.backbones import is_convolutional, to_memory_format
from mvssl.runs import checkpoint
from pipelines.loader import Loader
from pipelines.loading.eval_loader import iterate_center
from pipelines.loading.pixel_cache import Cache, free_memory, with_cache
from pipelines.order import Order
from pipelines.runtime import InputError, invalid
from pipelines.storage.source import Source


class Classifier(nn.Module):
    """A backbone and a linear layer, zero at first, on its features.

    Attributes:
        frozen: the backbone stays as it is, in eval mode, and its features are standardised.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, backbone: nn.Module, width: int, classes: int, *, standardise: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """`standardise` is the mean [D] and 1 / standard deviation [D] for a frozen backbone; None trains it."""
        super().__init__()
        self.frozen = standardise is not None
        mean, scale = standardise or (torch.zeros(width), torch.ones(width))
        self.backbone = backbone
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", scale.clone())
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        for parameter in backbone.parameters():
            parameter.requires_grad_(not self.frozen)
        self.train(False)

    def train(self, mode: bool = True) -> Classifier:
        """As nn.Module, but a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] to logits [B, C]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(images)  # [B, D]
        if self.frozen:
            features = (features.float() - self.mean) * self.scale
        logits: Tensor = self.linear(features)
        return logits

    def learned(self) -> dict[str, Tensor]:
        """What training changes, by name."""
        return {k: v for k, v in self.state_dict().items() if not (self.frozen and k.startswith("backbone."))}


def classify(
    model: Classifier,
    source: Source,
    *,
    resize: int,
    crop: int,
    device: torch.device,
    autocast: torch.dtype | None,
    computing: Computing,
    world: World,
) -> tuple[Tensor, NDArray[np.int64]]:
    """The classes of the centre crops of all images, the best first.

    Returns:
        int64 [M, min(5, C)] on the CPU, and the images' indices, int64 [M], rising; undecodable images are left out.
    """
    share = np.arange(len(source))[world.rank :: world.size]
    model.eval()

    def mine() -> tuple[Tensor, Tensor]:
        best = min(5, model.linear.out_features)
        ranked, index = [torch.empty(0, best, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        batches = iterate_center(
            source,
            resize=resize,
            crop=crop,
            batch_size=computing.extract_batch,
            device=device,
            decode=computing.decode,
            indices=share,
        )
        with closing(batches):
            for images, numbers, _ in batches:
                with (
                    torch.no_grad(),
                    torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None),
                ):
                    logits = model(images)  # [B, C]
                ranked.append(logits.float().topk(best, dim=1).indices.cpu())
                index.append(numbers)
        return torch.cat(ranked), torch.cat(index)

    ranked, index = world.run_on_all(mine)
    parts = world.gather_objects((ranked, index))
    everyone, numbers = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
    order = numbers.argsort()
    return everyone[order], numbers[order].numpy()


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """How a classifier is trained: random resized crop and flip, cross-entropy, learning rate along a cosine.

    Attributes:
        epochs: passes over the labelled images.
        batch_size: images of a step, over all ranks.
        optimizer: sgd or adamw.
        lr: peak learning rate, for the batch as it is.
        momentum: of sgd.
        weight_decay: not on parameters with one dimension.
        layer_decay: each layer of the backbone learns this much slower than the one above it; 1 lets all learn alike.
        warmup_epochs: epochs of linear warm-up from 0.
        mixup: parameter of mixup's Beta distribution; 0 leaves it out.
        label_smoothing: share of the truth that is spread over all classes.
        seed: of the order and the draws.
        cache: where decoded images are kept, as in mvssl-train.
    """

    epochs: int = 100
    batch_size: int = 512
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    warmup_epochs: float = 0.0
    mixup: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0
    cache: Cache = "off"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "at least 1", "give a positive number")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise invalid("lr", self.lr, "a number above 0", "give a positive learning rate")
        for name in ("weight_decay", "warmup_epochs", "mixup"):
            if not getattr(self, name) >= 0:
                raise invalid(name, getattr(self, name), "0 or more", "give a value that is not negative")
        if not 0 < self.layer_decay <= 1:
            raise invalid("layer_decay", self.layer_decay, "above 0 and at most 1", "0.75 is usual for transformers")
        if not 0 <= self.label_smoothing < 1:
            raise invalid("label_smoothing", self.label_smoothing, "at least 0 and below 1", "0.1 is usual")
        if self.warmup_epochs >= self.epochs:
            raise invalid("warmup_epochs", self.warmup_epochs, f"below the {self.epochs} epochs", "shorten it")


def train_classifier(
    model: Classifier,
    source: Source,
    supervision: Supervision,
    *,
    size: int,
    folder: Path,
    identity: Mapping[str, Any],
    device: torch.device,
    autocast: torch.dtype | None,
    computing: Computing,
    world: World,
    say: Callable[[str], None],
) -> None:
    """Train a classifier in place; a run that was stopped goes on behind the last epoch that it finished.

    Args:
        model: on the device.
        source: labelled images.
        supervision: how.
        size: side of the views.
        folder: where the state behind each epoch is kept.
        identity: what the state is of; that of something else is not taken up.
        device: of the model.
        autocast: dtype of the forward; None for float32.
        computing: who decodes.
        world: the ranks.
        say: prints a line.

    Raises:
        InputError: the images cannot be used, the state cannot be written, or the loss is not finite.
    """
    if autocast == torch.float16 and not model.frozen:
        raise InputError("precision is 'fp16' but fine-tuning needs bf16 or fp32, which need no scaling of gradients.")
    views = (train_view(size),)
    order = Order(num_images=len(source), batch_size=supervision.batch_size, seed=supervision.seed)
    memory = free_memory(device, processes=world.local_size)
    kept, said = with_cache(source, supervision.cache, device=device, memory=memory)
    if said:
        say(said)
    groups = _groups(model, supervision)
    optimizer = _optimizer(groups, supervision)
    if is_convolutional(model.backbone):
        to_memory_format(model, torch.channels_last)
    done = _resume(folder, identity, model, optimizer)
    wrapped: nn.Module = model
    if world.size > 1:
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    mixup = None
    if supervision.mixup > 0:
        classes = model.linear.out_features
        mixup = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=supervision.mixup, label_smoothing=supervision.label_smoothing, num_classes=classes
        )
    loader = Loader(
        kept,
        views,
        order,
        device=device,
        ranks=world.ranks,
        decode=computing.decode,
    )
    steps = order.steps_per_epoch
    try:
        for epoch in range(done, supervision.epochs):
            model.train()
            began = time.monotonic()
            np.random.seed((supervision.seed * 1_000_003 + epoch) % 2**32)  # timm's mixup draws from it
            losses = torch.zeros((), device=device)
            for step, batch in enumerate(loader.epoch(epoch, until=supervision.epochs)):
                rate = _rate(supervision, epoch * steps + step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = supervision.lr * group["lr_scale"] * rate
                images, truth = batch.views[0], batch.labels.to(device)
                if mixup is not None:
                    images, truth = mixup(images[: len(images) // 2 * 2], truth[: len(truth) // 2 * 2])
                with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                    logits = wrapped(images)  # [B, C]
                smoothing = 0.0 if mixup is not None else supervision.label_smoothing
                loss = F.cross_entropy(logits.float(), truth, label_smoothing=smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses += loss.detach()
            mean = float(world.mean(losses)) / steps
            if not math.isfinite(mean):
                raise InputError(
                    f"The loss is {mean} in epoch {epoch + 1}: lower the learning rate (--lr {supervision.lr / 10:g})."
                )
            world.run_on_rank0(partial(_save, folder, epoch + 1, identity, model, optimizer))
            speed = steps * supervision.batch_size / (time.monotonic() - began)
            say(f"epoch {epoch + 1}/{supervision.epochs}  loss {mean:.4f}  {speed:,.0f} images/s")
    finally:
        loader.close()


def _rate(supervision: Supervision, step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine to 0."""
    warmup = supervision.warmup_epochs * steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, supervision.epochs * steps - warmup)))


def _groups(model: Classifier, supervision: Supervision) -> list[dict[str, Any]]:
    """Groups of parameters with `lr_scale` and `weight_decay`."""
    decay = supervision.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [model.linear.weight], "weight_decay": decay, "lr_scale": 1.0},
        {"params": [model.linear.bias], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    if model.frozen:
        return groups
    if supervision.layer_decay < 1:
        if not hasattr(model.backbone, "group_matcher"):
            raise invalid("layer_decay", supervision.layer_decay, "1 for this backbone", "timm knows no layers of it")
        groups += param_groups_layer_decay(model.backbone, decay, layer_decay=supervision.layer_decay)
    else:
        parameters = list(model.backbone.parameters())
        groups += [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay, "lr_scale": 1.0},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0},
        ]
    return groups


def _optimizer(groups: list[dict[str, Any]], supervision: Supervision) -> torch.optim.Optimizer:
    if supervision.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=supervision.lr)
    return torch.optim.SGD(groups, lr=supervision.lr, momentum=supervision.momentum)


def _save(
    folder: Path, epoch: int, identity: Mapping[str, Any], model: Classifier, optimizer: torch.optim.Optimizer
) -> None:
    state = {"model": model.learned(), "optimizer": optimizer.state_dict()}
    checkpoint.save(folder, step=epoch, state=state, meta={"identity": dict(identity)}, keep=1)


def _resume(folder: Path, identity: Mapping[str, Any], model: Classifier, optimizer: torch.optim.Optimizer) -> int:
    """Epochs that are done: those of a state of the same evaluation, which is loaded."""
    if not (folder / checkpoint.LAST).exists():
        return 0
    saved = checkpoint.load(folder / checkpoint.LAST)
    if saved.meta.get("identity") != json.loads(json.dumps(dict(identity))):
        return 0
    model.load_state_dict(saved.state["model"], strict=False)  # a frozen backbone is not in it
    optimizer.load_state_dict(saved.state["optimizer"])
    return int(saved.meta["step"])

"""Supervised training of a classifier: of a linear layer on a frozen backbone, or of the whole network."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.data.mixup import Mixup
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]  # public, but not marked so
from torch import Tensor, nn

from mvssl.config.evaluation import Supervision as Supervision
from mvssl.config.recipe import Evaluation
from mvssl.evaluate.accuracy import accuracy_of
from mvssl.evaluate.features import center_crops, train_view
from mvssl.evaluate.session import EvalSession, Session
from mvssl.models.backbones import is_convolutional, to_memory_format
from mvssl.optim.state import check_optimizer_state
from mvssl.runs import checkpoint
from pipelines.loader import Loader
from pipelines.loading.pixel_cache import free_memory, with_cache
from pipelines.order import Order
from pipelines.runtime import InputError, invalid
from pipelines.storage.source import Source


class Classifier(nn.Module):
    """A backbone and a linear layer.

    Attributes:
        frozen: the backbone is not trained and stays in eval mode; its features are standardised.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        classes: int,
        *,
        standardise: tuple[Tensor, Tensor] | None = None,
        head_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        """`standardise` freezes the backbone: mean [D] and 1 / standard deviation [D] of its features.

        The layer starts with zero biases and weights of standard deviation `head_std`, the same for each `seed`.
        """
        super().__init__()
        self.frozen = standardise is not None
        mean, scale = standardise or (torch.zeros(width), torch.ones(width))
        self.backbone = backbone
        self.register_buffer("mean", mean.clone())
        self.register_buffer("scale", scale.clone())
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        if head_std:
            nn.init.normal_(self.linear.weight, std=head_std, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)
        for parameter in backbone.parameters():
            parameter.requires_grad_(not self.frozen)
        self.train(False)

    def train(self, mode: bool = True) -> Classifier:
        """Set the training mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Map images [B, 3, S, S] to logits [B, C]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.backbone(images)  # [B, D]
        if self.frozen:
            features = (features.float() - self.mean) * self.scale
        logits: Tensor = self.linear(features)
        return logits

    def learned(self) -> dict[str, Tensor]:
        """Trained parameters and buffers by name."""
        return {k: v for k, v in self.state_dict().items() if not (self.frozen and k.startswith("backbone."))}


def train_and_measure(
    session: EvalSession,
    model: Classifier,
    source: Source,
    supervision: Supervision,
    *,
    name: str,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Train a classifier on `source` and measure it on val; `name` and `identity` are those of the training state."""
    val, val_labels = session.labelled_val()
    evaluation = session.loaded.evaluation
    state = TrainingState(session.out / f"{name}-state", identity)
    train_classifier(session, model, source, supervision, size=evaluation.crop, state=state)
    ranked, index = classify(session, model, val, evaluation)
    accuracy = accuracy_of(ranked, torch.from_numpy(val_labels[index]), session.train.classes)
    return {**accuracy.to_dict(), "train_images": len(source)}


def train_classifier(
    session: EvalSession,
    model: Classifier,
    source: Source,
    supervision: Supervision,
    *,
    size: int,
    state: TrainingState,
) -> None:
    """Train a classifier in place; a stopped training resumes after the last completed epoch.

    Args:
        session: device, precision, decoder and ranks.
        model: on the device.
        source: labelled images.
        supervision: how to train.
        size: side of the views in pixels.
        state: where the state after each epoch is saved.

    Raises:
        InputError: the images cannot be used, the state cannot be written, or the loss is not finite.
    """
    if session.autocast == torch.float16 and not model.frozen:
        raise InputError("precision is 'fp16' but must be bf16 or fp32 for fine-tuning, which has no gradient scaler.")
    device, world, epochs = session.device, session.world, supervision.epochs
    order = Order(num_images=len(source), batch_size=supervision.batch_size, seed=supervision.seed)
    memory = free_memory(device, processes=world.local_size)
    cached, message = with_cache(source, supervision.cache, device=device, memory=memory)
    if message:
        session.say(message)
    optimizer = _optimizer(_groups(model, supervision), supervision)
    if is_convolutional(model.backbone):
        to_memory_format(model, torch.channels_last)
    epochs_done = state.load(model, optimizer)
    wrapped: nn.Module = model
    if world.size > 1:
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    mixup, smoothing = None, supervision.label_smoothing
    if supervision.mixup > 0:
        mixup = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=supervision.mixup, label_smoothing=smoothing, num_classes=model.linear.out_features
        )
        smoothing = 0.0  # mixup's targets are smoothed
    loader = Loader(
        cached,
        (train_view(size, session.loaded.evaluation.interpolation),),
        order,
        device=device,
        ranks=world.ranks,
        decode=session.decode,
    )
    steps = order.steps_per_epoch
    with closing(loader):
        for epoch in range(epochs_done, epochs):
            model.train()
            began = time.monotonic()
            np.random.seed((supervision.seed * 1_000_003 + epoch) % 2**32)  # timm's mixup samples from it
            losses = torch.zeros((), device=device)
            for step, batch in enumerate(loader.epoch(epoch, until=epochs)):
                rate = _rate(supervision, epoch * steps + step, steps)
                for group in optimizer.param_groups:
                    group["lr"] = supervision.lr * group["lr_scale"] * rate
                images, truth = batch.views[0], batch.labels.to(device)
                if mixup is not None:
                    images, truth = mixup(images[: len(images) // 2 * 2], truth[: len(truth) // 2 * 2])
                with session.autocasting():
                    logits = wrapped(images)  # [B, C]
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
            world.run_on_rank0(partial(state.save, epoch + 1, model, optimizer))
            speed = steps * supervision.batch_size / (time.monotonic() - began)
            session.say(f"epoch {epoch + 1}/{epochs}  loss {mean:.4f}  {speed:,.0f} images/s")


def classify(
    session: Session, model: Classifier, source: Source, evaluation: Evaluation
) -> tuple[Tensor, NDArray[np.int64]]:
    """Classify the centre crops of all images, a part of them on each rank.

    Returns:
        Classes int64 [M, min(5, C)] on the CPU, best first, and dataset indices int64 [M], ascending; undecodable
        images are left out.
    """
    world = session.world
    part = np.arange(len(source))[world.rank :: world.size]
    best = min(5, model.linear.out_features)
    model.eval()

    def classify_part() -> tuple[Tensor, Tensor]:
        ranked, index = [torch.empty(0, best, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
        with closing(center_crops(session, source, evaluation, part)) as batches:
            for images, indices, _ in batches:
                with torch.no_grad(), session.autocasting():
                    logits = model(images)  # [B, C]
                ranked.append(logits.float().topk(best, dim=1).indices.cpu())
                index.append(indices)
        return torch.cat(ranked), torch.cat(index)

    parts = world.gather_objects(world.run_on_all(classify_part))
    ranked, index = torch.cat([ranked for ranked, _ in parts]), torch.cat([index for _, index in parts])
    order = index.argsort()
    return ranked[order], index[order].numpy()


@dataclass(frozen=True)
class TrainingState:
    """Checkpoints of a classifier's training.

    Attributes:
        folder: of the checkpoints.
        identity: what the training depends on; a state of another identity is ignored.
    """

    folder: Path
    identity: Mapping[str, Any]

    def save(self, epoch: int, model: Classifier, optimizer: torch.optim.Optimizer) -> None:
        """Replace the state by that after `epoch` epochs."""
        state = {"model": model.learned(), "optimizer": optimizer.state_dict()}
        checkpoint.save(self.folder, step=epoch, state=state, meta={"identity": dict(self.identity)}, keep=1)

    def load(self, model: Classifier, optimizer: torch.optim.Optimizer) -> int:
        """Load the state, if there is one; returns the number of epochs done."""
        if not (self.folder / checkpoint.LAST).exists():
            return 0
        saved = checkpoint.load(self.folder / checkpoint.LAST)
        if saved.meta.get("identity") != json.loads(json.dumps(dict(self.identity))):
            return 0
        try:
            check_optimizer_state(optimizer, saved.state["optimizer"])
            model.load_state_dict(saved.state["model"], strict=False)  # lacks a frozen backbone
            optimizer.load_state_dict(saved.state["optimizer"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise saved.damaged(f"state.pt: {str(error).splitlines()[0]}") from error
        return int(saved.meta["step"])


def _rate(supervision: Supervision, step: int, steps: int) -> float:
    """Fraction of the peak learning rate at a step: linear warm-up, then cosine decay to 0."""
    warmup = supervision.warmup_epochs * steps
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, supervision.epochs * steps - warmup)))


def _groups(model: Classifier, supervision: Supervision) -> list[dict[str, Any]]:
    """Parameter groups with `lr_scale` and `weight_decay`."""
    decay = supervision.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [model.linear.weight], "weight_decay": decay, "lr_scale": 1.0},
        {"params": [model.linear.bias], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    if model.frozen:
        return groups
    if supervision.layer_decay < 1:
        if not hasattr(model.backbone, "group_matcher"):
            raise invalid(
                "layer_decay", supervision.layer_decay, "1 for this backbone", "timm defines no layers for it"
            )
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

"""A classifier, of a backbone and a linear layer, and what it says of the images of a source."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvssl.distributed import World
from mvssl.evaluate.computing import Computing
from pipelines.evaluation import iterate_center
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

    ranked, index = world.together(mine)
    parts = world.gather_objects((ranked, index))
    everyone, numbers = torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
    order = numbers.argsort()
    return everyone[order], numbers[order].numpy()

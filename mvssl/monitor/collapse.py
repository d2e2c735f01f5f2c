"""Label-free measures of representational collapse from a batch of embeddings, and whether it lasts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.runtime import InputError

MIN_STD = 0.1
MIN_RANK = 2.0
_FEWEST_POINTS = 3  # log points at which a collapse is seen before it counts as lasting


def embedding_std(embedding: Tensor) -> Tensor:
    """Mean standard deviation over the batch of each dimension of the l2-normalised embeddings, times sqrt(D).

    1 for directions spread evenly over the sphere, 0 when all embeddings point the same way (Chen and He,
    arXiv 2011.10566, section 4.1); about sqrt(1 - c) for a mean cosine c between different images. Takes [B, D] with B
    of 2 or more; returns a scalar on the device, float32 or better.
    """
    unit = F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)  # [B, D]
    return unit.std(dim=0).mean() * math.sqrt(unit.shape[1])


def effective_rank(embedding: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of [B, D] (Roy and Vetterli 2007; RankMe, arXiv 2210.02885).

    Between 1 (all embeddings on one line through 0) and min(B, D). Not centred, so that a constant counts as 1. Returns
    a scalar on the device, float32 or better.
    """
    values = torch.linalg.svdvals(embedding.to(torch.promote_types(embedding.dtype, torch.float32)))  # [min(B, D)]
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """A measure of collapsed embeddings.

    Attributes:
        measure: its name, with its verb.
        value: in words, with what is possible.
        least: the value below which embeddings count as collapsed.
        meaning: what that says of the embeddings.
    """

    measure: str
    value: str
    least: float
    meaning: str

    def warning(self) -> str:
        """The sentence for the first log point at which it is seen."""
        return (
            f"The embeddings are collapsing: their {self.measure} is {self.value} (below {self.least:g}), so "
            f"{self.meaning}: lower the learning rate or lengthen the warm-up."
        )


def find_collapse(*, std: float, rank: float, batch_size: int, dim: int) -> Collapse | None:
    """Whether embeddings [batch_size, dim] with this `embedding_std` and `effective_rank` have collapsed; None if not.

    A `std` below 0.1 means a mean cosine above 0.99 between different images: the representation hardly depends on the
    image. A `rank` below 2 means that one direction carries nearly everything. Healthy networks have a std of 0.5 and
    more and a rank of tens, so this is rarely wrong, except in the first steps. With fewer than 8 images or dimensions
    the rank says nothing and is ignored.
    """
    if math.isfinite(std) and std < MIN_STD:
        return Collapse(
            measure="standard deviation",
            value=f"{std:.3f} of the even spread",
            least=MIN_STD,
            meaning="nearly all images get the same embedding",
        )
    most = min(batch_size, dim)
    if most >= 8 and math.isfinite(rank) and rank < MIN_RANK:
        return Collapse(
            measure="effective rank",
            value=f"{rank:.2f} of {most}",
            least=MIN_RANK,
            meaning="they lie along one direction",
        )
    return None


class Collapsed(InputError):
    """The embeddings stayed collapsed; everything is saved."""

    stopped_by = "collapse"


class CollapseWatch:
    """Whether embeddings stay collapsed: at all log points of `patience` steps after the warm-up, three or more.

    The count begins again at a log point without collapse, and when an evaluation is better than all before.

    Attributes:
        since: first step of the collapse that is counted; None without one.
        lasting: the last log point's collapse, if it has lasted so long; else None.
    """

    def __init__(self, *, patience: int, warmup: int) -> None:
        """`warmup` is the number of warm-up steps, which do not count."""
        self.since: int | None = None
        self.lasting: Collapse | None = None
        self._patience = patience
        self._warmup = warmup
        self._points = 0

    def see(self, step: int, collapse: Collapse | None) -> bool:
        """Note a log point; whether a collapse begins there."""
        begins = collapse is not None and self.since is None
        if collapse is None:
            self.since, self._points = None, 0
        elif self.since is None:
            self.since = step
        self._points += collapse is not None
        lasts = self.since is not None and step - max(self.since, self._warmup) >= self._patience
        self.lasting = collapse if lasts and self._points >= _FEWEST_POINTS else None
        return begins

    def improved(self, step: int) -> None:
        """Note that the evaluation after this step is better than all before: the network still learns."""
        if self.since is not None:
            self.since, self._points, self.lasting = step, 0, None

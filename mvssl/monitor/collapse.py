"""Label-free measures of representational collapse, from a batch of embeddings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_STD = 0.1
MIN_RANK = 2.0


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


def collapse_warning(*, std: float, rank: float, batch_size: int, dim: int) -> str | None:
    """A warning if embeddings [batch_size, dim] with this `embedding_std` and `effective_rank` have collapsed, or None.

    A `std` below 0.1 means a mean cosine above 0.99 between different images: the representation hardly depends on the
    image. A `rank` below 2 means that one direction carries nearly everything. Healthy networks have a std of 0.5 and
    more and a rank of tens, so a warning is rarely false, except in the first steps. With fewer than 8 images or
    dimensions the rank says nothing and is ignored.
    """
    if math.isfinite(std) and std < MIN_STD:
        return (
            f"The embeddings are collapsing: their standard deviation is {std:.3f} of the even spread (below "
            f"{MIN_STD}), so nearly all images get the same embedding: lower the learning rate or lengthen the warm-up."
        )
    if min(batch_size, dim) >= 8 and math.isfinite(rank) and rank < MIN_RANK:
        return (
            f"The embeddings are collapsing: their effective rank is {rank:.2f} of {min(batch_size, dim)} (below "
            f"{MIN_RANK:g}), so they lie along one direction: lower the learning rate or lengthen the warm-up."
        )
    return None

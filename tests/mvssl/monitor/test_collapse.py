"""Collapse measures of embeddings with known standard deviation and rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mvssl.monitor.collapse import CollapseWatch, effective_rank, embedding_std, find_collapse


def warning(**measured: float) -> str:
    collapse = find_collapse(**measured)  # type: ignore[arg-type]
    assert collapse is not None
    return collapse.warning()


def test_even_spread_has_std_one_and_full_rank() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(4000, 16)
    assert embedding_std(embedding).item() == pytest.approx(1.0, abs=0.01)
    assert effective_rank(embedding).item() == pytest.approx(16, abs=0.1)


def test_std_follows_the_mean_cosine() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(2000, 64) + 1.5 * torch.ones(64)
    unit = embedding.numpy() / np.linalg.norm(embedding.numpy(), axis=1, keepdims=True)
    gram = unit @ unit.T
    mean_cosine = (gram.sum() - len(unit)) / (len(unit) * (len(unit) - 1))
    assert embedding_std(embedding).item() == pytest.approx(math.sqrt(1 - mean_cosine), rel=0.02)


def test_rank_is_exp_entropy_of_singular_values() -> None:
    q, _ = torch.linalg.qr(torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    embedding = q * torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)  # singular values 5, 3, 2
    shares = np.array([0.5, 0.3, 0.2])
    assert effective_rank(embedding).item() == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_constant_embedding_is_collapsed(dtype: torch.dtype) -> None:
    embedding = torch.ones(32, 8, dtype=dtype) * 3
    std, rank = embedding_std(embedding).item(), effective_rank(embedding).item()
    assert std == pytest.approx(0, abs=1e-6)
    assert rank == pytest.approx(1, abs=1e-4)
    assert "standard deviation is 0.000" in warning(std=std, rank=rank, batch_size=32, dim=8)


def test_zero_embedding_gives_no_nan() -> None:
    assert embedding_std(torch.zeros(4, 8)).item() == 0
    assert math.isfinite(effective_rank(torch.zeros(4, 8)).item())


def test_one_line_through_zero_is_collapsed_by_rank_only() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(32, 1) * torch.randn(1, 8)  # both directions of one line: a large std
    std, rank = embedding_std(embedding).item(), effective_rank(embedding).item()
    assert std > 0.5
    assert "effective rank is 1.00 of 8" in warning(std=std, rank=rank, batch_size=32, dim=8)
    assert find_collapse(std=std, rank=rank, batch_size=4, dim=8) is None


def test_a_healthy_embedding_gives_no_warning() -> None:
    assert find_collapse(std=0.6, rank=40.0, batch_size=256, dim=256) is None
    assert find_collapse(std=math.nan, rank=math.nan, batch_size=256, dim=256) is None


def stopped_at(watch: CollapseWatch, stds: list[float], *, every: int = 10, first: int = 10) -> int | None:
    """The first log point at which a collapse has lasted; log points are `every` steps apart."""
    for step, std in enumerate(stds):
        watch.see(first + every * step, find_collapse(std=std, rank=40.0, batch_size=64, dim=64))
        if watch.lasting is not None:
            return first + every * step
    return None


def test_a_collapse_lasts_after_the_patience_without_a_healthy_log_point() -> None:
    assert stopped_at(CollapseWatch(patience=50, warmup=0), [0.05] * 20) == 60
    assert stopped_at(CollapseWatch(patience=50, warmup=0), ([0.05] * 5 + [0.5]) * 9) is None
    assert stopped_at(CollapseWatch(patience=50, warmup=0), [0.8] * 7 + [0.05] * 20) == 130


def test_the_warm_up_does_not_count() -> None:
    assert stopped_at(CollapseWatch(patience=50, warmup=100), [0.05] * 20) == 150
    assert stopped_at(CollapseWatch(patience=50, warmup=100), [0.05] * 14 + [0.5] * 6) is None


def test_rare_log_points_do_not_make_a_lasting_collapse() -> None:
    assert stopped_at(CollapseWatch(patience=50, warmup=0), [0.05] * 5, every=1000, first=1000) == 3000


def test_a_network_that_still_learns_is_not_stopped() -> None:
    watch = CollapseWatch(patience=50, warmup=0)
    for step in range(10, 300, 10):
        watch.see(step, find_collapse(std=0.05, rank=40.0, batch_size=64, dim=64))
        assert watch.lasting is None
        if step % 40 == 0:
            watch.improved(step)

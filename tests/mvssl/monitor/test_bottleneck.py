"""The sentence that names a run's bottleneck and the remedy."""

from __future__ import annotations

import pytest
import torch

from mvssl.monitor.bottleneck import describe_bottleneck
from mvssl.monitor.idle_sampler import IdleFractions
from pipelines.loader import StageSeconds

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def idle_fractions(in_step: float, between: float) -> IdleFractions:
    return IdleFractions(in_step=in_step, between=between, samples=100)


@pytest.mark.parametrize(
    ("wait", "stages", "device", "words"),
    [
        (
            0.004,
            StageSeconds(storage=1, decode=2, views=1),
            CPU,
            "the bottleneck is the step: it waited for data 0.4 %",
        ),
        (0.3, StageSeconds(storage=5, decode=2, views=1), CPU, "the bottleneck is reading images: convert them"),
        (0.3, StageSeconds(storage=1, decode=5, views=2), CPU, "the bottleneck is decoding: use more --threads"),
        (0.3, StageSeconds(storage=1, decode=2, views=5), CPU, "the bottleneck is making views: train on a GPU"),
        (0.3, StageSeconds(storage=1, decode=2, views=5), CUDA, "the bottleneck is making views: give the process"),
    ],
)
def test_the_sentence_names_the_stage_and_the_remedy(
    wait: float, stages: StageSeconds, device: torch.device, words: str
) -> None:
    seconds = max(stages.storage, stages.decode, stages.views)
    sentence = describe_bottleneck(wait, stages, 800, device=device, images_per_second=0.9 * 800 / seconds)
    assert sentence.startswith(words)
    assert f"the loader alone would prepare {800 / seconds:,.0f} images/s" in sentence
    if wait == 0.3:
        assert "62 % of the work on a batch; the step waited 30.0 % of the time" in sentence


@pytest.mark.parametrize(
    ("wait", "idle", "words"),
    [
        (
            0.004,
            idle_fractions(0.42, 0.01),
            "the bottleneck is launching: the GPU had nothing queued 42.6 % of the time while the",
        ),
        (0.01, idle_fractions(0.0, 0.07), "the bottleneck is launching: the GPU had nothing queued 6.0 %"),
        (
            0.004,
            idle_fractions(0.02, 0.01),
            "the bottleneck is the step: it waited for data 0.4 % of the time and kept the GPU busy",
        ),
        (0.3, idle_fractions(0.2, 0.3), "the bottleneck is decoding"),  # the data wait explains the time between steps
        (0.3, idle_fractions(0.4, 0.3), "the bottleneck is launching: the GPU had nothing queued 40.0 %"),
        (0.03, idle_fractions(0.04, 0.03), "the bottleneck is decoding"),  # 4 % are not worth a remedy
        (0.004, None, "the bottleneck is the step: it waited for data 0.4 % of the time (the loader"),
    ],
)
def test_the_sentence_names_launching_and_the_remedy(wait: float, idle: IdleFractions | None, words: str) -> None:
    stages = StageSeconds(storage=1, decode=2, views=1)
    sentence = describe_bottleneck(wait, stages, 800, device=CUDA, images_per_second=350.0, idle=idle)
    assert sentence.startswith(words)
    assert "the loader alone would prepare 400 images/s" in sentence
    assert f"{100 * wait:.1f} % of the time" in sentence
    if "launching" in words:
        for remedy in ("--cuda-graph auto", "--compile on", "--step-mode joint", "--batch-size", "--threads"):
            assert remedy in sentence
    if words.endswith("GPU busy"):
        assert "kept the GPU busy 97.0 %" in sentence


def test_a_loader_that_is_far_ahead_is_no_bottleneck() -> None:
    """A short run that waited now and then, with a loader six times as fast as the step."""
    stages = StageSeconds(storage=1, decode=2, views=1)
    sentence = describe_bottleneck(0.013, stages, 300, device=CPU, images_per_second=23.0)
    assert sentence == (
        "the bottleneck is the step: it waited for data 1.3 % of the time, in single moments (the loader alone would "
        "prepare 150 images/s)"
    )
    assert describe_bottleneck(0.013, stages, 300, device=CPU, images_per_second=140.0).startswith(
        "the bottleneck is decoding"
    )

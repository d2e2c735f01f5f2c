"""torch.compile of the step on the CPU: number of graphs, no recompilation, same numbers, loud fallback."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models import register_model
from torch import Tensor, nn

from mvssl.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.training.compiled.compiling import Compiler, wants_compile
from mvssl.training.step import TrainStep
from pipelines.errors import InputError
from pipelines.views.presets import paper_views


@register_model
def mvssl_test_conv(pretrained: bool = False, num_classes: int = 0, **options: Any) -> nn.Module:
    """Two convolutions with BatchNorm: as little as shows everything, since compiling takes its time."""
    if "dynamic_img_size" in options:
        raise TypeError(f"unexpected {options}")
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


RECIPE = Recipe(
    name="compiled",
    views=paper_views(size=32, local_size=16, blur_kernel=5),
    backbone=Backbone(name="mvssl_test_conv"),
    projector=Head(hidden=(24,), out=12),
    predictor=Head(hidden=(20,), out=12),
    optimizer=Optimizer(base_lr=3.0, warmup_epochs=1),
    epochs=5,
    batch_size=8,
    evaluation=Evaluation(resize=32, crop=32),
)
compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile on the CPU needs a C++ compiler",
)


def make(**changes: Any) -> TrainStep:
    return TrainStep(replace(RECIPE, **changes), device="cpu", total_steps=10, steps_per_epoch=2)


def batch(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, spec.size, spec.size, generator=generator) for spec in RECIPE.views]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@compiler
@pytest.mark.parametrize("step_mode", ["joint", "per-view"])
def test_compiled_step_is_the_eager_step(step_mode: str) -> None:
    compiled, eager = make(compile="on", step_mode=step_mode), make(compile="off", step_mode=step_mode)
    assert compiled.compiled
    torch._dynamo.utils.counters.clear()
    for k in range(5):
        ours, expected = compiled(batch(k), k), eager(batch(k), k)
        torch.testing.assert_close(ours.losses, expected.losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.grad_norm, expected.grad_norm, rtol=1e-3, atol=1e-5)
        if k == 0:
            # The target network's pass and the whole online pass; view by view the latter is one graph per size.
            assert graphs() == {"joint": 2, "per-view": 3}[step_mode]
    assert graphs() == {"joint": 2, "per-view": 3}[step_mode]  # nothing was compiled again
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled.compiled
    for name, value in eager.online.state_dict().items():
        torch.testing.assert_close(compiled.online.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    for name, value in eager.target.named_buffers():
        torch.testing.assert_close(dict(compiled.target.named_buffers())[name], value, rtol=1e-3, atol=1e-4)


def test_failure_to_compile_is_loud_and_leaves_no_trace(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        # The first size goes through, so that the failed attempt has already moved BatchNorm buffers.
        if inputs and any(getattr(x, "shape", ())[-1:] == (16,) and x.dim() == 4 for x in inputs):
            raise RuntimeError("no such compiler")
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: real(module, backend=broken, **options))
    compiled, eager = make(compile="on"), make(compile="off")
    with caplog.at_level(logging.WARNING, logger="mvssl"):
        ours = compiled(batch(0), 1)
    assert "torch.compile FAILED" in caplog.text
    assert "no such compiler" in caplog.text
    assert not compiled.compiled
    expected = eager(batch(0), 1)
    assert torch.equal(ours.losses, expected.losses)
    for k in (2, 3):
        compiled(batch(k), k)
        eager(batch(k), k)
    assert caplog.text.count("FAILED") == 1
    for name, value in eager.online.state_dict().items():
        assert torch.equal(compiled.online.state_dict()[name], value)
    for name, value in eager.target.state_dict().items():
        assert torch.equal(compiled.target.state_dict()[name], value)


def test_a_process_may_train_many_networks_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives up at the ninth version of a function unless it is told otherwise."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: real(module, backend="eager", **options))
    with torch._dynamo.config.patch(recompile_limit=8):  # torch.export leaves another number behind
        for width in range(20, 31):
            step = make(compile="on", predictor=Head(hidden=(width,), out=12))
            step(batch(0), 0)
            assert step.compiled
        assert torch._dynamo.config.recompile_limit == 8, "it is raised for our own compiling alone"


def test_failure_to_compile_on_several_ranks_is_an_error() -> None:
    compiler = Compiler([nn.Linear(2, 2)], enabled=True, ranks=2)

    def work() -> None:
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no such compiler"), None)

    with pytest.raises(InputError, match=r"no such compiler.*set Recipe.compile to 'off'"):
        compiler.run(work)


def test_other_errors_are_passed_on() -> None:
    compiler = Compiler([nn.Linear(2, 2)], enabled=True)

    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compiler.run(work)
    assert compiler.compiled


def test_auto_compiles_on_cuda_only() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert wants_compile(RECIPE, cuda, ranks=1)
    assert not wants_compile(RECIPE, cpu, ranks=1)
    assert wants_compile(replace(RECIPE, compile="on"), cpu, ranks=1)
    assert not wants_compile(replace(RECIPE, compile="off"), cuda, ranks=1)


def test_batchnorm_over_several_ranks_is_not_compiled() -> None:
    synchronised = replace(RECIPE, sync_batchnorm="online")
    assert not wants_compile(synchronised, torch.device("cuda"), ranks=2)
    assert wants_compile(synchronised, torch.device("cuda"), ranks=1)
    with pytest.raises(InputError, match="sync_batchnorm 'online' on 2 ranks"):
        wants_compile(replace(synchronised, compile="on"), torch.device("cpu"), ranks=2)

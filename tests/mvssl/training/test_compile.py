"""torch.compile of the step on the CPU: number of graphs, no recompilation, same numbers, loud fallback."""

from __future__ import annotations

import ast
import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models import register_model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.exc import CppCompileError, InductorError, TritonMissing

from mvssl.config.options import Execution
from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.training.compile import Compiler, wants_compile
from mvssl.training.compile_errors import describe
from mvssl.training.step import TrainStep
from pipelines.runtime import InputError
from pipelines.views.presets import paper_views
from tests.samples.tiny_runs import make_step


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


@register_model
def mvssl_test_drop(pretrained: bool = False, num_classes: int = 0, **options: Any) -> nn.Module:
    """The same with dropout, which draws random numbers in the forward."""
    network: nn.Module = mvssl_test_conv(pretrained, num_classes, **options)
    network.add_module("drop", nn.Dropout(0.3))
    return network


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
    return make_step(RECIPE, total=10, **changes)


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


@pytest.mark.slow
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


def without_a_backward(raised: Callable[[], Exception], *, kind: str = "convolution_backward") -> Any:
    """A backend that compiles all forwards, and fails at an operation of the first backward as real ones do."""

    def forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return make_boxed_func(graph.forward)

    def backward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if kind in str(node.target):
                raise raised()
        return forward(graph, inputs)

    return aot_autograd(fw_compiler=forward, bw_compiler=backward)


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: real(module, backend=backend, **options))


RAISED: dict[str, Callable[[], Exception]] = {
    "as it is": lambda: AssertionError("64 v.s. 2048"),
    "wrapped": lambda: InductorError(AssertionError("64 v.s. 2048"), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("raised", RAISED.values(), ids=RAISED.keys())
@pytest.mark.parametrize("step_mode", ["joint", "per-view"])
def test_failure_to_compile_the_backward_leaves_no_trace(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    step_mode: str,
    raised: Callable[[], Exception],
) -> None:
    """It is compiled when it first runs: the forward has moved buffers and drawn random numbers by then."""
    compile_with(monkeypatch, without_a_backward(raised))
    changes = {"step_mode": step_mode, "backbone": Backbone(name="mvssl_test_drop"), "accumulate": 2}
    compiled, eager = make(compile="on", **changes), make(compile="off", **changes)
    for step in (compiled, eager):  # so that a second average would show
        assert step.target is not None
        with torch.no_grad():
            torch._foreach_add_(list(step.target.parameters()), 0.1)
    with caplog.at_level(logging.WARNING, logger="mvssl"):
        for k in range(1, 4):
            ours, random_state = compiled(batch(k), k), torch.get_rng_state()
            expected = eager(batch(k), k)
            assert torch.equal(ours.losses, expected.losses)
            assert torch.equal(ours.grad_norm, expected.grad_norm)
            assert torch.equal(random_state, torch.get_rng_state())
            assert not compiled.compiled
            assert all(parameter.grad is None for parameter in compiled.online.parameters())
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "torch.compile FAILED in the backward of backbone.3 (Conv2d) (" in message
    assert "AssertionError: 64 v.s. 2048) and the step runs uncompiled" in message
    for ours_, theirs in ((compiled.online, eager.online), (compiled.target, eager.target)):
        assert ours_ is not None
        assert theirs is not None
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours_.state_dict()[name], value), name


def test_failure_in_the_backward_on_several_ranks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_with(monkeypatch, without_a_backward(RAISED["as it is"], kind="mm"))
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    compiler = Compiler([network], enabled=True, ranks=2)
    work = compiler(lambda x: network(x).square().sum())
    told = r"^compile is .* but must be 'off' on 2 ranks .* in the backward of 2 \(Linear\) \(AssertionError"
    with pytest.raises(InputError, match=told):
        compiler.guard(lambda: work(torch.ones(2, 3)).backward())()


class Interrupted(torch.autograd.Function):
    """A backward that no graph can hold."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        torch._dynamo.graph_break()
        return gradient * x.cos()


class Odd(nn.Module):
    """A user's layer with it."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Interrupted.apply(x)
        return result


def test_a_backward_that_cannot_be_traced_is_named_by_its_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with(monkeypatch, "aot_eager")
    network = nn.Sequential(nn.Linear(3, 3), Odd())
    compiler = Compiler([network], enabled=True)
    work = compiler(lambda x: network(x).sum())
    with caplog.at_level(logging.WARNING, logger="mvssl"):
        compiler.guard(lambda: work(torch.ones(2, 3)).backward())()
    assert not compiler.compiled
    assert re.search(r"torch.compile FAILED in \w+, test_compile.py line \d+ \(", caplog.text)
    assert network[0].weight.grad is not None


def test_full_memory_is_no_failure_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled the step would take more of it."""

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        return run

    compile_with(monkeypatch, backend)
    compiler = Compiler([nn.Linear(2, 2)], enabled=True)
    work = compiler(lambda x: x + 1)
    with pytest.raises(torch.OutOfMemoryError):
        compiler.guard(lambda: work(torch.ones(2)))()
    assert compiler.compiled


def test_a_missing_compiler_has_its_remedy(caplog: pytest.LogCaptureFixture) -> None:
    """And no layer, since none is to blame."""
    network = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    compiler = Compiler([network], enabled=True)
    work = compiler(lambda x: network(x).sum())
    options = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with torch._inductor.config.patch(options), caplog.at_level(logging.WARNING, logger="mvssl"):
        compiler.guard(lambda: work(torch.ones(2, 3)).backward())()
    message = caplog.records[-1].getMessage()
    assert message.startswith("torch.compile FAILED (InductorError: InvalidCxxCompiler: No working C++ compiler")
    assert "('no-such-compiler',)) and the step runs uncompiled" in message
    assert "Install a C++ compiler (g++), or name one in the variable CXX; --compile off trains so" in message


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "install gcc"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "Python's headers"),
        (TritonMissing(None), "Install the triton package"),
        (CppCompileError(["g++", "a.cpp"], "error: no match"), "install a newer g++"),
    ],
    ids=["no gcc", "gcc fails", "no Triton", "g++ fails"],
)
def test_a_missing_tool_has_its_remedy(error: Exception, remedy: str) -> None:
    told, said = describe(InductorError(error, None), [])
    assert told.startswith("(InductorError: ")
    assert remedy in said


def kernel_of_triton() -> Exception:
    """Triton's own error about a kernel's source, as it is shown."""
    from triton.compiler.errors import CompilationError

    node = ast.parse("def kernel(x):\n    y = x + nowhere\n").body[0]
    error: Exception = CompilationError(
        "def kernel(x):\n    y = x + nowhere\n", node, "NameError('nowhere is not defined')"
    )
    return error


GCC = "In file included from a.h:1:\na.cpp: In function 'kernel':\na.cpp:12:3: error: 'omp' was not declared\nexiting"
PTXAS = (
    "PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas /tmp/a.ptx, line 5; fatal   : Unknown\n\n"
    "Repro command: ptxas -v"
)
IN_A_WORKER = (
    "An exception occurred in a subprocess:\n\nTraceback (most recent call last):\n  File 'x', line 1, in f\n    f()\n"
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CppCompileError(["g++", "a.cpp"], GCC), "C++ compile error: a.cpp:12:3: error: 'omp' was not declared)"),
        (
            CppCompileError(["g++"], "a.cpp: In Funktion »f«:\na.cpp:3:4: Fehler: »x«\n    3 | x"),
            "a.cpp:3:4: Fehler: »x«)",
        ),
        (RuntimeError(PTXAS), "Internal Triton PTX codegen error: ptxas /tmp/a.ptx, line 5; fatal   : Unknown)"),
        (RuntimeError(f"{IN_A_WORKER}ValueError: no such layout"), "in a subprocess: ValueError: no such layout)"),
        (RuntimeError(f"{IN_A_WORKER}triton.PTXASError: {PTXAS}"), "ptxas /tmp/a.ptx, line 5; fatal   : Unknown)"),
        (
            subprocess.CalledProcessError(1, ["gcc"], stderr=b"a.c:1: warning: odd\na.c:2: error: Python.h: none\n"),
            "exit status 1.: a.c:2: error: Python.h: none)",
        ),
        (RuntimeError("first\n  Explanation: second\n  third"), "RuntimeError: first Explanation: second)"),
        (RuntimeError(""), "(InductorError: RuntimeError:)"),
    ],
    ids=["g++", "g++ in German", "ptxas", "worker", "ptxas in a worker", "Triton's gcc", "Dynamo", "silent"],
)
def test_the_reason_is_the_line_with_the_error(error: Exception, reason: str) -> None:
    told, _ = describe(InductorError(error, None), [])
    assert told.endswith(reason), told
    assert "\n" not in told


def test_the_reason_of_tritons_compiler_is_below_the_kernel() -> None:
    pytest.importorskip("triton")
    for error in (kernel_of_triton(), RuntimeError(f"{IN_A_WORKER}triton.CompilationError: {kernel_of_triton()}")):
        told, _ = describe(InductorError(error, None), [])
        assert told.endswith("NameError('nowhere is not defined'))"), told


@compiler
@pytest.mark.slow
def test_inductors_own_failure_in_the_backward_is_named(caplog: pytest.LogCaptureFixture) -> None:
    import torch._inductor.lowering as lowering

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    compiler = Compiler([network], enabled=True)
    work = compiler(lambda x: network(x).sum())

    def fails(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("64 v.s. 2048")

    operation = torch.ops.aten.convolution_backward.default
    real = lowering.lowerings[operation]
    lowering.lowerings[operation] = fails
    try:
        with (
            torch._inductor.config.patch({"force_disable_caches": True}),
            caplog.at_level(logging.WARNING, logger="mvssl"),
        ):
            compiler.guard(lambda: work(torch.ones(2, 3, 8, 8)).backward())()
    finally:
        lowering.lowerings[operation] = real
    message = caplog.records[-1].getMessage()
    assert "torch.compile FAILED in the backward of 0 (Conv2d) (InductorError: " in message
    assert network[0].weight.grad is not None


@pytest.mark.slow
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

    with pytest.raises(InputError, match=r"no such compiler"):
        compiler.guard(work)()


def test_other_errors_are_passed_on() -> None:
    compiler = Compiler([nn.Linear(2, 2)], enabled=True)

    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compiler.guard(work)()
    assert compiler.compiled


def test_auto_compiles_on_cuda_only() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert wants_compile(RECIPE, Execution(), cuda, ranks=1)
    assert not wants_compile(RECIPE, Execution(), cpu, ranks=1)
    assert wants_compile(RECIPE, Execution(compile="on"), cpu, ranks=1)
    assert not wants_compile(RECIPE, Execution(compile="off"), cuda, ranks=1)


def test_batchnorm_over_several_ranks_is_not_compiled() -> None:
    synchronised = replace(RECIPE, sync_batchnorm="online")
    assert not wants_compile(synchronised, Execution(), torch.device("cuda"), ranks=2)
    assert wants_compile(synchronised, Execution(), torch.device("cuda"), ranks=1)
    with pytest.raises(InputError, match="sync_batchnorm 'online' on 2 ranks"):
        wants_compile(synchronised, Execution(compile="on"), torch.device("cpu"), ranks=2)

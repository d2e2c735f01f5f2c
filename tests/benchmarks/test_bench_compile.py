"""bench_compile: bytes, FLOP and launches against formulas worked out by hand; what it refuses; its tables."""

from __future__ import annotations

import builtins
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import torch
from torch import Tensor, nn

from benchmarks import bench_compile
from benchmarks.bench_compile import Arguments, chosen, measure, show, summary
from benchmarks.bench_step import prediction_of
from benchmarks.compiled.eager_ops import Account, foreach_launches
from benchmarks.compiled.fake_gpu import capability, check_torch, resources
from benchmarks.compiled.floor import floor
from benchmarks.compiled.gpu_code import Graph, gpu_graphs
from benchmarks.compiled.roofline import MEASURED, milliseconds
from benchmarks.compiled.step_code import StepCode, compile_step, view_engine
from benchmarks.compiled.view_kernels import mean_bytes
from benchmarks.implementations.steps import flops_per_image
from mvssl.config.recipe import Recipe
from mvssl.recipes.files import resolve_recipe
from pipelines.runtime import InputError


@pytest.fixture(autouse=True)
def _no_trace_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest collects log records of every level, so torch would write its own trace: half of the time."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])


def graphs_of(function: Any, *inputs: Tensor, backward: bool = False) -> list[Graph]:
    def work() -> None:
        result = torch.compile(function)(*inputs)
        if backward:
            result.sum().backward()

    return gpu_graphs(work, target="sm_90")


def test_bytes_and_arithmetic_of_a_matrix_product() -> None:
    m, k, n = 256, 512, 128
    (graph,) = graphs_of(lambda a, b: a @ b, torch.zeros(m, k), torch.zeros(k, n))
    (kernel,) = graph.kernels
    assert kernel.library
    assert (graph.triton_launches, graph.library_calls, graph.calls) == (0, 1, 1)
    assert kernel.megabytes == pytest.approx(4 * (m * k + k * n + m * n) / 1e6)
    assert kernel.gflops == pytest.approx(2 * m * k * n / 1e9)


def test_bytes_and_arithmetic_of_a_convolution_forward_and_backward() -> None:
    convolution = nn.Conv2d(16, 32, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    x = torch.zeros(8, 16, 10, 10).contiguous(memory_format=torch.channels_last).requires_grad_()
    forward, backward = graphs_of(convolution, x, backward=True)
    image_in, image_out, weight = 8 * 16 * 100, 8 * 32 * 100, 32 * 16 * 9
    (one,) = [kernel for kernel in forward.kernels if kernel.library]
    assert one.megabytes == pytest.approx(4 * (image_in + image_out + weight) / 1e6)
    assert one.gflops == pytest.approx(2 * image_out * 16 * 9 / 1e9)
    (two,) = [kernel for kernel in backward.kernels if kernel.library]
    # dy, x and w are read, dx and dw written: what Inductor counts of one call, though cuDNN reads dy for both.
    assert two.megabytes == pytest.approx(4 * (image_out + 2 * image_in + 2 * weight) / 1e6)
    assert two.gflops == pytest.approx(2 * one.gflops)
    assert forward.kind == "forward"
    assert backward.kind == "backward"


def test_elementwise_operations_are_one_kernel_with_registers_and_no_spilling() -> None:
    (graph,) = graphs_of(lambda x: (x * 2 + 1).relu(), torch.zeros(1000, 1000))
    (kernel,) = graph.kernels
    assert not kernel.library
    assert kernel.megabytes == pytest.approx(2 * 4 * 1.0)
    found = resources(graph.sources[kernel.source], target="sm_90")
    assert 8 <= found.registers <= 64
    assert found.spilled == 0


@pytest.mark.parametrize(
    ("sizes", "lists", "launches"),
    [
        ([], 1, 0),
        ([1], 1, 1),
        ([0, 0], 1, 0),
        ([1] * 110, 1, 1),
        ([1] * 111, 1, 2),
        ([1] * 49, 3, 2),  # 48 tensors fit where there are three lists
        ([320 * 65_536], 2, 1),
        ([320 * 65_536 + 1], 2, 2),
        ([65_536 * 200, 65_536 * 200], 1, 2),  # 400 blocks; the second tensor is cut
        ([65_537] * 161, 1, 2),  # 2 blocks each: 110 tensors are 220 blocks; then 51
    ],
)
def test_launches_of_foreach_kernels(sizes: list[int], lists: int, launches: int) -> None:
    assert foreach_launches(sizes, lists) == launches


def test_account_of_operations() -> None:
    a, b = torch.zeros(1000), torch.zeros(1000)
    many = [torch.zeros(10) for _ in range(5)]
    scalars = [torch.zeros(()) for _ in range(5)]
    cases: list[tuple[Any, int, int]] = [
        (lambda: a.view(10, 100)[3], 0, 0),
        (lambda: torch.empty(1000), 0, 0),
        (lambda: a + b, 1, 12_000),
        (lambda: a.add_(b), 1, 12_000),
        (lambda: a.copy_(b), 1, 8_000),
        (lambda: a.zero_(), 1, 4_000),
        (lambda: torch.zeros_like(a), 1, 4_000),
        (lambda: a * a, 1, 8_000),
        (lambda: torch.zeros(1).expand(1000) + a, 2, 8_008),  # zeros(1) is a launch, too
        (lambda: torch._foreach_add_(many, many), 1, 5 * 40 * 2),
        (lambda: torch._foreach_mul(many, 2.0), 1, 5 * 40 * 2),
        (lambda: torch._foreach_mul_(many, scalars), 5, 5 * (40 * 2 + 4)),  # other shapes: a launch each
        (lambda: torch._foreach_norm(many), 3, 5 * 40 + 5 * 4),
        (lambda: torch.stack(scalars), 1, 5 * 4 * 2),
    ]
    for number, (work, launches, moved) in enumerate(cases):
        account = Account("all")
        with account:
            work()
        total = account.work.get("all")
        assert (total.launches if total else 0) == launches, number
        assert (total.megabytes if total else 0.0) == pytest.approx(moved / 1e6), number


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[StepCode, Recipe]:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    text = 'base = "demo"\nbatch_size = 4\nbackbone = {name = "test_resnet"}\n'
    path.write_text(text + "projector = {hidden = [32], out = 16}\npredictor = {hidden = [32], out = 16}\n")
    recipe = resolve_recipe(str(path))
    return compile_step(recipe, target="sm_90"), recipe


@pytest.mark.slow
def test_arithmetic_of_a_step_is_what_torch_counts_on_a_real_one(built: tuple[StepCode, Recipe]) -> None:
    code, recipe = built
    counted = sum(graph.calls * graph.gflops for graph in code.graphs) / recipe.batch_size
    assert counted == pytest.approx(flops_per_image(recipe) / 1e9, rel=1e-6)


@pytest.mark.slow
def test_result_of_a_step(built: tuple[StepCode, Recipe]) -> None:
    code, recipe = built
    result = json.loads(json.dumps(summary(code, recipe, Arguments(recipe="tiny", resources="all"))))
    parts = result["parts"]
    assert {"target forward", "online forward", "backward", "EMA", "optimiser", "stacking of views"} <= set(parts)
    assert result["launches"] == sum(part["launches"] for part in parts.values())
    assert result["compiled"]["launches"] < result["launches"]
    assert result["predicted_milliseconds"] == pytest.approx(sum(part["milliseconds"] for part in parts.values()))
    assert parts["stacking of views"]["launches"] == len(recipe.views)
    sizes = sum(3 * view.size**2 for view in recipe.views)
    assert parts["stacking of views"]["megabytes_per_image"] == pytest.approx(2 * 2 * sizes / 1e6)
    assert len(result["largest"]) == bench_compile.LARGEST
    assert all(own["registers"] > 0 for own in result["largest"] if "registers" in own)
    assert result["resources"]["kernels"] == sum(len(graph.sources) for graph in code.graphs)
    assert set(prediction_of(result)) == {"batch_size", "megabytes_per_image", "launches", "predicted_milliseconds"}
    for name, least in result["floor"]["megabytes_per_image"].items():
        assert least < parts[name]["megabytes_per_image"]
    layers = {layer for own in result["largest"] for layer in own["layers"]}
    assert not any("__self__" in layer or "[" in layer for layer in layers)
    assert any(line.startswith("| target forward |") for line in show(result))
    other = summary(code, recipe, Arguments(recipe="tiny", target="sm_80", resources="none"))
    assert other["predicted_milliseconds"] is None  # not measured on such a GPU
    assert any(line.startswith("| target forward |") and line.endswith(" | |") for line in show(other))


def test_floor_of_a_resnet50_is_that_of_its_layers() -> None:
    """53 convolutions and norms; 220 and 371 MB are from another script, which counted hooks of timm's model."""
    recipe = resolve_recipe("byol_resnet50_200ep")
    least = floor(recipe)
    assert least is not None
    assert least.launches == {"target forward": 159, "online forward": 318, "backward": 318}
    assert least.megabytes_per_image["target forward"] == pytest.approx(220, abs=0.5)
    assert least.megabytes_per_image["online forward"] == pytest.approx(371, abs=0.5)
    assert floor(resolve_recipe("byol_vits16_200ep")) is None


def test_view_engine_moves_what_its_own_page_says() -> None:
    recipe = resolve_recipe("byol_resnet50_200ep")
    work = view_engine(recipe)
    page = sum(mean_bytes(height=375, width=500, value_bytes=2).values())
    assert work.megabytes / recipe.batch_size == pytest.approx(page / 1e6, rel=0.02)
    assert work.launches == 6 * -(-recipe.batch_size // 256)


def test_constants_give_back_the_trace_that_they_are_from() -> None:
    rates = MEASURED["sm_90"]
    assert milliseconds(rates, megabytes=132_117) == pytest.approx(54.489)
    assert milliseconds(rates, gflops=12_602) == pytest.approx(41.503)


@pytest.mark.parametrize("version", ["2.10.0", "2.16.1+cu130", "3.0"])
def test_unknown_torch_is_refused(version: str) -> None:
    with pytest.raises(InputError, match=r"^torch is .* but must be 2\.11 to 2\.15: .*install such a torch.*\.$"):
        check_torch(version)


def test_unknown_target_is_refused() -> None:
    with pytest.raises(InputError, match=r"^target is 'sm_70' but must be one of sm_80, sm_90, sm_100: .*\.$"):
        measure(Arguments(recipe="demo", target="sm_70"), command="")
    assert capability("sm_100") == 100


def test_unknown_recipe_and_values_are_refused() -> None:
    with pytest.raises(InputError, match="there is no recipe of that name: choose one of"):
        chosen(Arguments(recipe="no_such_recipe"))
    with pytest.raises(InputError, match=r"Recipe\.accumulate"):
        chosen(Arguments(recipe="demo", batch_size=6, accumulate=4))


def test_recipe_that_cannot_be_built_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('base = "demo"\nbackbone = {name = "resnet51"}\n')
    with pytest.raises(InputError, match=r"^Backbone\.name is 'resnet51' but must be the name of a timm model"):
        measure(Arguments(recipe=str(path)), command="")


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("triton"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"^triton is missing but must be installed.*: pip install triton\.$"):
        gpu_graphs(lambda: None, target="sm_90")


def test_failure_to_compile_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("2048 v.s. 4096")

    monkeypatch.setattr("torch._inductor.graph.GraphLowering.run", fail)
    path = tmp_path / "tiny.toml"
    path.write_text('base = "demo"\nbackbone = {name = "test_resnet"}\nbatch_size = 4\n')
    with pytest.raises(InputError, match=r"^The step of .* does not compile for sm_90 .*2048 v\.s\. 4096.*\.$"):
        compile_step(resolve_recipe(str(path)), target="sm_90")


def test_command_writes_no_result_when_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["bench_compile", "demo", "--target", "sm_70", "--out", str(out)])
    with pytest.raises(InputError):
        bench_compile.body()
    assert not out.exists()

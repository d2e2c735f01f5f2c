"""Every kind of step compiles for a GPU, on a machine that has none; the main recipe's bytes and launches stay.

A case that fails here would train uncompiled on a GPU, behind a warning. The exception names the layers; the first
commit that breaks it is usually a change of a layer's forward or another torch.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import Literal

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from benchmarks.bench_compile import Arguments, chosen, summary
from benchmarks.compiled.fake_gpu import resources
from benchmarks.compiled.step_code import StepCode, compile_step
from benchmarks.harness.results import RESULTS, read_results
from mvssl.config.recipe import Backbone, Head, Optimizer, Recipe
from mvssl.recipes.files import resolve_recipe
from pipelines.views.presets import paper_views
from pipelines.views.spec import ViewSpec

BEFORE = next(
    row
    for row in read_results(RESULTS / "compile.jsonl")
    if (row["recipe"], row["target"]) == ("byol_resnet50_200ep", "sm_90")
)
"""The committed result of the main recipe."""

GROWTH = 1.02
"""How much larger bytes and launches may be than the committed result."""

FIVE = paper_views(num_local=2, num_cutout=1, size=32, local_size=16, blur_kernel=5)
TWO = paper_views(num_local=0, size=32, local_size=16, blur_kernel=5)
SMALL = Recipe(
    name="small",
    views=FIVE,
    backbone=Backbone(name="resnet10_tiny"),
    projector=Head(hidden=(32,), out=16),
    predictor=Head(hidden=(32,), out=16),
    batch_size=8,
    precision="bf16",
)
SGD = Optimizer(kind="sgd", base_lr=0.05, weight_decay=1e-4, warmup_epochs=0)
ADAMW = Optimizer(kind="adamw", base_lr=1e-3, weight_decay=0.1, clip_grad_norm=3.0, warmup_epochs=0)


@pytest.fixture(autouse=True)
def _no_trace_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest collects log records of every level, so torch would write its own trace: half of the time."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])


def small(backbone: str, *, views: Sequence[ViewSpec] = FIVE, **changes: object) -> Recipe:
    drop_path = 0.1 if "vit" in backbone else 0.0
    own = {"backbone": Backbone(name=backbone, drop_path=drop_path), "views": tuple(views)}
    if changes.get("method") == "mocov3":
        own |= {"temperature": 1.0}
    if changes.get("method") == "simsiam":
        own |= {"projector": Head(hidden=(32,), out=16, output_norm=True), "optimizer": SGD}
    return dataclasses.replace(SMALL, **own | changes)  # type: ignore[arg-type]


CASES = {  # joint byol in bf16 is the main recipe below
    "byol, five views, accumulate, fp16, resnet": small("test_resnet", accumulate=2, precision="fp16"),
    "byol, five views, per-view, fp16, efficientnet": small("test_efficientnet", precision="fp16", optimizer=SGD),
    "mocov3, five views, accumulate, bf16, vit": small("test_vit", method="mocov3", accumulate=2, optimizer=ADAMW),
    "simsiam, two views, bf16, efficientnet": small("test_efficientnet", views=TWO, method="simsiam"),
    "simsiam, five views, per-view, bf16, resnet": small("resnet10_tiny", method="simsiam"),
}


def check(code: StepCode, recipe: Recipe, step_mode: str) -> None:
    """Everything is compiled, and each part runs as often as in the step."""
    calls = {
        kind: sum(graph.calls for graph in code.graphs if graph.kind == kind) for kind in ("inference", "backward")
    }
    online = sum(view.task is not None for view in recipe.views) if step_mode == "per-view" else 1
    if recipe.method == "simsiam" and step_mode == "per-view":
        online -= sum(view.is_target for view in recipe.views) - 1  # targets share the first graph
    assert calls["backward"] == online * recipe.accumulate
    assert calls["inference"] == (0 if recipe.method == "simsiam" else recipe.accumulate)
    for graph in code.graphs:
        assert graph.triton_launches == sum(not kernel.library for kernel in graph.kernels)
        assert graph.library_calls == sum(kernel.library for kernel in graph.kernels)
        for kernel in graph.kernels:
            assert kernel.library or kernel.source in graph.sources
    # BatchNorms are our kernels: a backbone's, and those of a ViT's projector.
    assert {"sums_kernel", "forward_kernel"} <= {kernel.name for graph in code.graphs for kernel in graph.kernels}


@pytest.fixture(scope="module")
def compiled() -> set[str]:
    """Kernels that Triton has compiled, their numbers blanked out but those of dtypes."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_step_compiles_for_a_gpu(case: str, compiled: set[str]) -> None:
    """Triton compiles every kernel, too; of those that differ in nothing but sizes, one."""
    recipe = CASES[case]
    step_mode: Literal["joint", "per-view"] = "per-view" if "per-view" in case else "joint"
    code = compile_step(recipe, target="sm_90", step_mode=step_mode)
    check(code, recipe, step_mode)
    for source in (source for graph in code.graphs for source in graph.sources.values()):
        kind = re.sub(r"(?<!fp)(?<!float)(?<!int)\d+", "N", source)
        if kind not in compiled:
            assert resources(source, target="sm_90").registers > 0
            compiled.add(kind)
    result = summary(code, recipe, Arguments(recipe=case, step_mode=step_mode, resources="none"))
    assert result["launches"] == sum(part["launches"] for part in result["parts"].values()) > 0
    assert result["parts"]["optimiser"]["eager_launches"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_main_recipe_moves_and_launches_no_more_than_before() -> None:
    """If this fails: find the commit that added bytes or launches, by `bench_compile` before and after. Where the
    growth is intended, or another torch fuses differently, write the result again and commit it with the reason:

    python -m benchmarks.bench_compile byol_resnet50_200ep --batch-size 128 --target sm_90 \\
        --out benchmarks/results/compile.jsonl
    """
    arguments = Arguments(recipe=BEFORE["recipe"], batch_size=BEFORE["batch_size"], resources="none")
    recipe = chosen(arguments)
    code = compile_step(recipe, target=arguments.target)
    check(code, recipe, arguments.step_mode)
    now = summary(code, recipe, arguments)
    for name in ("megabytes_per_image", "launches"):
        assert now[name] <= GROWTH * BEFORE[name], f"{name} was {BEFORE[name]} and is {now[name]}"
        assert now["compiled"][name] <= GROWTH * BEFORE["compiled"][name]


def test_main_recipe_is_the_committed_one() -> None:
    recipe = resolve_recipe(BEFORE["recipe"])
    assert (BEFORE["batch_size"], BEFORE["target"]) == (128, "sm_90")
    assert BEFORE["settings"]["backbone"]["name"] == recipe.backbone.name
    assert BEFORE["views_per_image"] == len(recipe.views)

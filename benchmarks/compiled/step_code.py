"""Launches and bytes of a recipe's whole step on a GPU: compiled graphs, optimiser, EMA, copies of views."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import mvssl.models.encoder as target_module
import mvssl.optim.lars as lars_module
import mvssl.training.step as step_module
from benchmarks.compiled.eager_ops import Account, Work
from benchmarks.compiled.fake_gpu import foreach_as_on_gpu, uncounted
from benchmarks.compiled.gpu_code import Graph, gpu_graphs
from benchmarks.compiled.view_kernels import kernel_bytes
from mvssl.config.options import Execution
from mvssl.config.recipe import Recipe
from mvssl.models.foreach_ops import foreach_lerp_, foreach_subtract_
from mvssl.models.view_batching import stack_views
from mvssl.training.compile import Compiler
from mvssl.training.compile_errors import describe, is_compile_error
from pipelines.runtime import InputError
from pipelines.views.sampling import draw

PHOTO = (375, 500)
"""Height and width of the photos that views are made of, about ImageNet's mean."""

OBJECTIVE = "between the graphs"
_SAMPLED = 1024  # images whose augmentation parameters the view engine's bytes are a mean over


@dataclass(frozen=True, kw_only=True)
class StepCode:
    """Launches of one step.

    Attributes:
        graphs: compiled, each with the number of its calls.
        eager: launches outside the graphs, by purpose.
        views: launches of the view engine, once for each batch.
    """

    graphs: list[Graph]
    eager: dict[str, Work]
    views: Work


def compile_step(
    recipe: Recipe,
    *,
    target: str,
    step_mode: Literal["joint", "per-view"] = "joint",
    group_views: bool = True,
    checkpointing: bool = False,
) -> StepCode:
    """Compile a recipe's step for a GPU that need not be there, and count its launches.

    Args:
        recipe: with its batch size; precision auto is bf16, as on a GPU.
        target: a key of `TARGETS`.
        step_mode: as of `Execution`.
        group_views: whether views of one size are batched.
        checkpointing: as of `Execution`.

    Raises:
        InputError: torch or the target is unknown, Triton is missing, the step cannot be built, or does not compile.
    """
    recipe = replace(recipe, precision="bf16" if recipe.precision == "auto" else recipe.precision)
    execution = Execution(compile="on", step_mode=step_mode, checkpointing=checkpointing)
    graphs: list[Graph] = []
    account = Account(OBJECTIVE)
    built: list[step_module.TrainStep] = []

    def work() -> None:
        step = step_module.TrainStep(
            recipe, execution=execution, device="cpu", total_steps=10, steps_per_epoch=5, group_views=group_views
        )
        built.append(step)
        views = _views(recipe, step)
        step(views, 0)
        for graph in graphs:
            graph.calls = 0
        with account, _regions(step, account):
            step(views, 1)

    with _as_on_gpu(), torch.random.fork_rng(devices=[]):
        try:
            gpu_graphs(work, target=target, graphs=graphs)
        except Exception as error:
            if not built or not is_compile_error(error):
                raise
            modules = [module for module in (built[0].online, built[0].target) if module is not None]
            told, remedy = describe(error, modules)
            raise InputError(f"The step of {recipe.name!r} does not compile for {target} {told}: {remedy}.") from error
    return StepCode(graphs=graphs, eager=account.work, views=view_engine(recipe))


def view_engine(recipe: Recipe) -> Work:
    """Launches and traffic of the fused view engine for one batch of photos."""
    from pipelines.views.fused.engine import _IMAGES

    sizes = torch.tensor([PHOTO]).expand(_SAMPLED, 2)
    params = draw(recipe.views, sizes, seed=0, epoch=0, index=torch.arange(_SAMPLED))
    value_bytes = 4 if recipe.precision == "fp32" else 2
    moved = kernel_bytes(recipe.views, params, value_bytes=value_bytes)
    per_image = sum(float(each.sum(dim=0).double().mean()) for each in moved.values())
    used = sum(bool((each > 0).any()) for each in moved.values())
    rotated = [spec.size for spec in recipe.views if spec.rotate is not None]  # one more kernel, uint8 in and out
    per_image += sum(6.0 * size**2 for size in rotated)
    launches = (used + bool(rotated)) * -(-recipe.batch_size // _IMAGES)
    return Work(launches=launches, megabytes=per_image * recipe.batch_size / 1e6)


def _views(recipe: Recipe, step: step_module.TrainStep) -> list[Tensor]:
    """A batch of zeros in the view engine's layout."""
    return [
        torch.zeros(recipe.batch_size, view.size, view.size, 3, dtype=step.input_dtype).permute(0, 3, 1, 2)
        for view in recipe.views
    ]


@contextlib.contextmanager
def _as_on_gpu() -> Iterator[None]:
    """Let a step on the CPU make the choices of a GPU."""
    layer_norm = F.layer_norm

    def dtype_on_gpu(precision: Literal["auto", "fp32", "bf16", "fp16"], _: torch.device) -> torch.dtype | None:
        return {"fp32": None, "fp16": torch.float16}.get(precision, torch.bfloat16)

    def stack_into_graph_inputs(*arguments: Any, **options: Any) -> list[Tensor]:
        """Views are always copied: a CUDA graph reads its inputs at fixed addresses."""
        with uncounted():
            static = [torch.empty_like(stack) for stack in stack_views(*arguments, **options | {"out": None})]
        return stack_views(*arguments, **options | {"out": static})

    def layer_norm_on_gpu(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        """CUDA's autocast runs layer norms in float32, the CPU's in the dtype of their input."""
        return layer_norm(x.float() if torch.is_autocast_enabled("cpu") else x, shape, weight, bias, eps)

    def give_up(_: Compiler, error: Exception) -> None:
        raise error

    with (
        foreach_as_on_gpu(),
        mock.patch.object(step_module, "autocast_dtype", dtype_on_gpu),
        mock.patch.object(step_module, "check_bf16_on_cpu"),
        mock.patch.object(step_module, "stack_views", stack_into_graph_inputs),
        mock.patch.object(target_module, "lerp_", torch.no_grad()(foreach_lerp_)),
        mock.patch.object(lars_module, "subtract_", torch.no_grad()(foreach_subtract_)),
        mock.patch.object(Compiler, "_give_up", give_up),
        mock.patch.object(F, "layer_norm", layer_norm_on_gpu),
    ):
        yield


@contextlib.contextmanager
def _regions(step: Any, account: Account) -> Iterator[None]:
    """Count each part of a step in a region of its own."""

    def within(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with account.region(name):
                return function(*arguments, **options)

        return call

    stacking: Callable[..., Any] = vars(step_module)["stack_views"]

    def stack(*arguments: Any, **options: Any) -> Any:
        with account.region("stacking of views"):
            return stacking(*arguments, **options)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(step_module, "stack_views", stack))
        for owner, method, name in (
            (step, "_update_target", "EMA"),
            (step, "_clip_and_update", "optimiser"),
            (step, "_set_rates", "optimiser"),
        ):
            if owner is not None:
                patches.enter_context(mock.patch.object(owner, method, within(name, getattr(owner, method))))
        yield

"""The BatchNorm kernels: interpreted, against torch in float64, and compiled ahead of time for GPUs."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvssl.config.recipe import Backbone, Evaluation, Head, Recipe
from mvssl.models import batchnorm
from mvssl.models.backbones import to_memory_format
from mvssl.models.encoder import Encoder
from mvssl.models.fused import batchnorm as batchnorm_function
from mvssl.models.view_batching import make_plan
from pipelines.views.presets import paper_views

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")
kernels = pytest.importorskip("mvssl.models.fused.kernels")
ops = pytest.importorskip("mvssl.models.fused.ops")

interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs a run with TRITON_INTERPRET=1, which tools/test.sh makes"
)
built = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 compiles nothing")
OPERATIONS = {"statistics": "batchnorm_statistics", "forward": "batchnorm_forward"} | {
    "forward_pool": "batchnorm_forward_pool",
    "backward": "batchnorm_backward",
}


@pytest.fixture(autouse=True)
def _unwrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch interpreted kernels directly, as `wrap_triton` refuses them."""
    if triton.knobs.runtime.interpret:
        monkeypatch.setattr(ops, "wrap_triton", lambda kernel: kernel)


@pytest.fixture
def _use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms take the compiled path with its kernels, without a compiler and on the CPU."""
    taken = {op: getattr(ops, name) for name, op in OPERATIONS.items()}
    forward = taken["batchnorm_forward"]
    taken["batchnorm_forward"] = lambda *arguments: forward(*arguments).clone()  # operators return no views
    monkeypatch.setattr(batchnorm_function, "operations", lambda: SimpleNamespace(**taken))
    monkeypatch.setattr(batchnorm, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, views: int) -> Tensor:
    """torch's BatchNorm, view by view."""
    return torch.cat([F.batch_norm(each, None, None, weight, bias, True, 0.1, 1e-5) for each in x.chunk(views)])


def numbers(shape: tuple[int, ...], seed: int, *, shift: float = 0.0) -> Tensor:
    """Random numbers [V * B, C, ...] with a different scale per channel and view."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 2, shape[0] * shape[1]).view(*shape[:2], *[1] * (len(shape) - 2))
    return torch.randn(shape, generator=generator) * scale + shift


SHAPES = [((6, 5, 4, 3), 3), ((4, 70, 3, 3), 2), ((6, 24), 3), ((8, 3, 9, 11), 1)]


@interpreted
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("users", [1, 2])
@pytest.mark.parametrize("shortcut", ["none", "added", "normed"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize(("shape", "views"), SHAPES, ids=str)
def test_a_norm_equals_torchs(
    shape: tuple[int, ...], views: int, relu: bool, shortcut: str, users: int, affine: bool
) -> None:
    """Output and all gradients, also when the output has two users."""
    x, other = numbers(shape, 0, shift=3.0), numbers(shape, 1)
    weight, bias, other_weight, other_bias = (numbers((1, shape[1]), seed)[0] if affine else None for seed in range(4))
    exact: list[Any] = [None if t is None else t.double().requires_grad_() for t in (x, other, weight, bias)]
    exact += [None if t is None else t.double().requires_grad_() for t in (other_weight, other_bias)]
    y = normed(exact[0], exact[2], exact[3], views)
    if shortcut == "added":
        y = y + exact[1]
    if shortcut == "normed":
        y = y + normed(exact[1], exact[4], exact[5], views)
    y = y.relu() if relu else y
    gradients = [numbers(shape, 10 + user) for user in range(users)]
    y.backward(torch.stack(gradients).sum(0).double())

    positions = list(range(views))
    take = partial(ops.statistics, running_mean=None, running_var=None, tracked=None, views=views, positions=positions)
    take = partial(take, step_views=views, first=True, momentum=0.1, eps=1e-5)
    mean, rstd = take(x)
    has, has_norm = shortcut != "none", shortcut == "normed"
    others = (other, *take(other), other_weight) if has_norm else (None, None, None, None)
    out = ops.forward(
        x,
        mean,
        rstd,
        weight,
        bias,
        other if has else None,
        *others[1:],
        other_bias if has_norm else None,
        relu,
    )
    dx, dweight, dbias, dother, dother_weight = ops.backward(
        gradients[0],
        gradients[1] if users == 2 else None,
        x,
        mean,
        rstd,
        weight,
        bias,
        out if has and relu else None,
        *others,
        relu,
        has,
        False,
    )
    close = partial(torch.testing.assert_close, check_dtype=False, rtol=1e-4, atol=2e-4)
    close(out, y.detach())
    close(dx, exact[0].grad)
    if affine:
        close(dweight, exact[2].grad, atol=1e-3)
        close(dbias, exact[3].grad, atol=1e-3)
    if has:
        close(dother, exact[1].grad)
    if has_norm and affine:
        close(dother_weight, exact[4].grad, atol=1e-3)


@interpreted
@pytest.mark.parametrize("users", [1, 2])
@pytest.mark.parametrize(("shape", "views"), [((6, 5, 8, 6), 3), ((3, 70, 7, 9), 1), ((4, 16, 1, 5), 2)], ids=str)
def test_max_pooling_equals_torchs(shape: tuple[int, ...], views: int, users: int) -> None:
    """Ties go to torch's choice: many values are 0 after ReLU, and rounding creates equal maxima."""
    x = numbers(shape, 0).round(decimals=0)
    weight, bias = torch.full((shape[1],), 1.5), torch.full((shape[1],), -0.3)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.max_pool2d(normed(exact[0], exact[1], exact[2], views).relu(), 3, 2, 1)
    gradients = [numbers(tuple(y.shape), 10 + user) for user in range(users)]
    y.backward(torch.stack(gradients).sum(0).double())
    mean, rstd = ops.statistics(x, None, None, None, views, list(range(views)), views, True, 0.1, 1e-5)
    out, taps = ops.forward_pool(x, mean, rstd, weight, bias)
    second = gradients[1] if users == 2 else None
    found = ops.backward(gradients[0], second, x, mean, rstd, weight, bias, taps, *[None] * 4, True, False, True)
    close = partial(torch.testing.assert_close, check_dtype=False, rtol=1e-4, atol=5e-4)
    close(out, y.detach())
    for ours, theirs in zip(found[:3], exact, strict=True):
        close(ours, theirs.grad, atol=1e-3)


@interpreted
def test_statistics_are_accurate_far_from_zero_and_over_many_chunks() -> None:
    """Plain sums of squares would lose the variance in float32; many programs sum the 40,000 rows."""
    x = torch.randn(40_000, 16, generator=torch.Generator().manual_seed(0)) * 0.01 + 100
    assert ops._shape(x, 2).chunks > 100
    mean, rstd = ops.statistics(x, None, None, None, 2, [0, 1], 2, True, 0.1, 0.0)
    exact = x.double().view(2, -1, 16)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(1 / rstd.double(), exact.std(1, correction=0), rtol=1e-4, atol=0)


@interpreted
@pytest.mark.usefixtures("_use_kernels")
def test_running_statistics_do_not_depend_on_the_order_of_the_forwards() -> None:
    """Views 2 and 3 come first, then 0, 1 and 4; the result is that of one layer called view by view."""
    plain = nn.BatchNorm2d(5, momentum=0.3)
    ours, current = copy.deepcopy(plain), batchnorm.ForwardViews()
    batchnorm.use_view_batchnorms(ours, current)
    views = [numbers((4, 5, 3, 2), v, shift=v) for v in range(5)]
    for positions, first in (((2, 3), True), ((0, 1, 4), False)):
        current.set(positions, 5, first=first)
        ours(torch.cat([views[v] for v in positions]))
    for view in views:
        plain(view)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], value, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate(value: float) -> None:
    """A plain maximum in ReLU and max-pooling would turn NaN into 0."""
    x = numbers((2, 3, 4, 4), 0)
    x[0, 0, 0, 0] = value
    mean, rstd = ops.statistics(x, None, None, None, 1, [0], 1, True, 0.1, 1e-5)
    args = (x, mean, rstd, torch.ones(3), torch.zeros(3))
    assert not ops.forward(*args, *[None] * 5, True)[:, 0].isfinite().any()
    assert not ops.forward_pool(*args)[0][:, 0].isfinite().any()


RECIPE = Recipe(
    name="kernels",
    views=paper_views(size=32, local_size=16, blur_kernel=5),
    backbone=Backbone(name="resnet10_tiny"),
    projector=Head(hidden=(24,), out=12),
    predictor=Head(hidden=(20,), out=12),
    epochs=20,
    batch_size=4,
    evaluation=Evaluation(resize=32, crop=32),
)


def embedded(backbone: str) -> tuple[Tensor, Encoder]:
    """Embeddings of all views by a new encoder, after the backward."""
    torch.manual_seed(0)
    encoder = Encoder(replace(RECIPE, backbone=Backbone(name=backbone)), drop_path=False)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)  # timm initialises the last norm of a block with 0
    plan = make_plan(RECIPE.views, joint=True, grouped=True, targets_first=False)
    group = plan.online[0]
    generator = torch.Generator().manual_seed(1)
    batches = [
        torch.randn(len(batch.positions) * 4, 3, size, size, generator=generator).contiguous(
            memory_format=torch.channels_last
        )
        for batch, size in zip(group.batches, (32, 16), strict=True)
    ]
    z = encoder.embed(batches, group)
    z.square().mul(torch.linspace(0.1, 1, z.shape[-1])).sum().backward()
    return z.detach(), encoder


def named(name: str) -> Callable[[str], str]:
    """A message for `assert_close` that begins with the tensor's name."""
    return lambda message: f"{name}: {message}"


@interpreted
@pytest.mark.parametrize("backbone", ["resnet10_tiny", "test_resnet"])
def test_a_network_equals_its_plain_modules(backbone: str, request: pytest.FixtureRequest) -> None:
    """Residual blocks with and without projected shortcut, the pooled stem and the head, forward and backward."""
    expected, plain = embedded(backbone)
    request.getfixturevalue("_use_kernels")
    z, ours = embedded(backbone)
    torch.testing.assert_close(z, expected, rtol=1e-3, atol=1e-4)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        scale = float(q.grad.abs().max())
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-3, atol=2e-3 * scale + 1e-6, msg=named(name))
    for (name, value), other in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4, msg=named(name))


@built
def test_compile_cache_depends_on_the_kernels() -> None:
    """Otherwise the cache would return code with an earlier version of a kernel."""
    from torch._library.triton import get_triton_kernels_for_op

    def kernels_of(operation: str) -> list[Any]:
        return get_triton_kernels_for_op(f"mvssl::{operation}")

    found = {name: {kernel.__name__ for kernel in kernels_of(name)} for name in OPERATIONS.values()}
    assert found == {
        "batchnorm_statistics": {"sums_kernel", "statistics_kernel"},
        "batchnorm_forward": {"forward_kernel"},
        "batchnorm_forward_pool": {"pool_kernel"},
        "batchnorm_backward": {"gradient_sums_kernel", "coefficients_kernel", "backward_kernel"},
    }


TYPES = {"tracked": "*i64", "taps": "*i8", "positions": "i64"}
ACTIVATIONS = ("x", "other", "first", "second", "y", "masked", "dx", "other_dx")
COUNTS = ("rows", "channels", "chunks", "views", "step_views", "height", "width", "out_height", "out_width")
FLAGS = {"affine": True, "relu": True, "size": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sums": ("sums_kernel", {"size": 64}),
    "statistics": ("statistics_kernel", {"size": 16, "track": True, "first": True, "momentum": 0.1, "eps": 1e-5}),
    **{f"forward {kind}": ("forward_kernel", FLAGS | {"kind": kind}) for kind in (0, 1, 2)},
    "pool": ("pool_kernel", {"affine": True, "size": 64}),
    **{
        f"{name} {kind}{', pooled' if pool else ''}": (
            f"{name}_kernel",
            FLAGS | {"kind": kind, "two": True, "pool": pool},
        )
        for name in ("gradient_sums", "backward")
        for kind, pool in ((0, False), (1, False), (2, False), (0, True))
    },
    **{f"coefficients {kind}": ("coefficients_kernel", {"affine": True, "size": 16, "kind": kind}) for kind in (0, 2)},
}


@built
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_build_without_spilling_and_load_16_bytes(variant: str, capability: int, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, constants = VARIANTS[variant]
    kernel = getattr(kernels, name)

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument == "y" and constants.get("pool"):
            return "*i8"
        if argument in ACTIVATIONS:
            return "*bf16"
        return TYPES.get(argument, "i32" if argument in COUNTS else "*fp32")

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    aligned = [n for n, (a, k) in enumerate(signature.items()) if k.startswith("*") or a == "channels"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(n,): [["tt.divisibility", 16]] for n in aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    path = tmp_path / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    report = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    assert usage["LOCAL"] == 0
    assert usage["STACK"] == 0
    # With 128 threads of 128 registers four programs fit on a multiprocessor; the pooled backward needs more.
    assert 0 < usage["REG"] <= (224 if "pool" in variant else 128)
    assert re.search(r"ld\.global\S*\.v4", binary.asm["ptx"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_compiled_networks_on_a_gpu_equal_plain_ones(dtype: torch.dtype) -> None:
    """The kernels in a whole compiled network, forward and backward, against float64."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    plain = Encoder(replace(RECIPE, backbone=Backbone(name="resnet18")), drop_path=False).cuda()
    plain = to_memory_format(plain, torch.channels_last)
    ours, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    group = make_plan(RECIPE.views, joint=True, grouped=True, targets_first=False).online[0]
    batches = [
        torch.randn(len(batch.positions) * 16, 3, size, size, device="cuda").contiguous(
            memory_format=torch.channels_last
        )
        for batch, size in zip(group.batches, (64, 32), strict=True)
    ]
    weights = torch.randn(12, device="cuda")
    losses = []
    for encoder, embed in ((plain, plain.embed), (ours, torch.compile(ours.embed, dynamic=False, fullgraph=True))):
        with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
            z = embed(batches, group)
        losses.append((z.float() * weights).sum())
        losses[-1].backward()
        del encoder
    expected = (exact.embed([batch.double() for batch in batches], group) * weights.double()).sum()
    expected.backward()
    p: Any
    q: Any
    r: Any
    for (name, p), q, r in zip(ours.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
        scale = float(r.grad.norm())
        ours_error, plain_error = (float((each.grad.double() - r.grad).norm()) for each in (p, q))
        assert ours_error <= 1.5 * plain_error + 1e-3 * scale, name  # only the rounding differs
    for (name, value), other in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=2e-2, atol=2e-2, msg=name)

"""The device of a run, and the precision it computes in."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from mvssl.config.recipe import Precision
from pipelines.runtime import InputError, invalid


def resolve_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """The device of auto (CUDA if available, else the CPU), cpu, cuda or cuda:N.

    With a local rank it is the GPU of that number.

    Raises:
        InputError: the device is unknown or does not exist, or has a number although there is a local rank.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    unknown = invalid("device", name, "auto, cpu, cuda or cuda:N", "choose one of these")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown from error
    if device.type not in ("cpu", "cuda"):
        raise unknown
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise InputError(
            f"device is {name!r} but PyTorch sees no CUDA device here: use --device cpu or fix the driver."
        )
    gpus = torch.cuda.device_count()
    if (device.index or 0) >= gpus:
        raise invalid("device", name, f"one of the {gpus} CUDA devices", "numbers start at cuda:0")
    if local_rank is None:
        return device
    if device.index is not None:
        raise invalid("device", name, "auto, cpu or cuda with torchrun", "each rank uses the GPU of its local rank")
    if local_rank >= gpus:
        raise InputError(
            f"Local rank {local_rank} has no GPU: torchrun started more processes (--nproc-per-node) than the {gpus} "
            "GPUs here; start fewer, or use --device cpu."
        )
    return torch.device("cuda", local_rank)


def computed_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """The precision on a device: auto is bf16 on CUDA and fp32 elsewhere."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return precision


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The autocast dtype of `computed_precision`, None for float32.

    Raises:
        InputError: fp16 without a CUDA device.
    """
    if precision == "fp16" and device.type != "cuda":
        raise InputError(
            f"Recipe.precision is 'fp16' but must be fp32 or bf16 on a {device.type} device, where fp16 is slow and "
            "has no gradient scaler: set precision to fp32, or train on a GPU.",
            field="Recipe.precision",
        )
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[computed_precision(precision, device)]


def check_bf16_on_cpu(backbone: nn.Module, sizes: Iterable[int]) -> None:
    """Refuse bf16 training on the CPU if a strided convolution (kernel above 1) is applied to a 1x1 feature map.

    Its weight gradient is uninitialised memory (seen with torch 2.15 and oneDNN on AMX; float32, stride 1 and larger
    maps are correct), so training would fail at random.

    Raises:
        InputError: a view size leads to such a map.
    """
    meta = copy.deepcopy(backbone).to("meta").eval()
    kernels: list[str] = []

    def find_strided(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not isinstance(module, nn.Conv2d) or tuple(inputs[0].shape[2:]) != (1, 1):
            return
        if max(module.kernel_size) > 1 and max(module.stride) > 1:
            kernels.append(f"{module.kernel_size[0]} x {module.kernel_size[1]}")

    for module in meta.modules():
        module.register_forward_pre_hook(find_strided)
    for size in sorted(set(sizes)):
        with torch.no_grad():
            meta(torch.zeros(2, 3, size, size, device="meta"))
        if kernels:
            raise InputError(
                f"Recipe.precision is 'bf16' but must be fp32 on the CPU for views of {size} pixels, which shrink to "
                f"one pixel before a strided {kernels[0]} convolution, where torch's bf16 gradients are wrong: set "
                "precision to fp32 or enlarge the view.",
                field="Recipe.precision",
            )

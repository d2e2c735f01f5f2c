"""The view engine: decoded pixels and augmentation parameters to views, by one of three backends."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipelines.batch import DecodedBatch, as_device, check_batch
from pipelines.checks import typed
from pipelines.runtime import InputError, invalid
from pipelines.views.native import engine as native
from pipelines.views.params import ViewParams
from pipelines.views.reference import engine as reference
from pipelines.views.reference.device import triton
from pipelines.views.sampling import check_params
from pipelines.views.spec import ViewSpec

MakeViews = Callable[..., list[Tensor]]
"""A backend: (batch, specs, params, *, dtype) -> one [N, 3, S, S] per spec (`reference.engine.make_views`)."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # compute capability the kernels are built and measured for: A100 and newer
_log = logging.getLogger("mvssl.data")


class ViewEngine:
    """Makes the views of a batch from its pixels and augmentation parameters.

    Args:
        specs: V views.
        device: where the views are made.
        backend: "fused" (Triton, on CUDA), "native" (C, on the CPU), "reference" (plain torch, anywhere) or "auto":
            the fastest available one; views that are not resized bicubically need reference.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: no specs, an unknown dtype, or a backend that is unknown or unavailable here.
    """

    @typed
    def __init__(
        self,
        specs: Sequence[ViewSpec],
        *,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not specs:
            raise InputError("specs is empty but must hold at least one view: use paper_views().")
        if dtype not in _DTYPES:
            raise invalid("dtype", dtype, "float32, bfloat16 or float16", "choose one of these")
        self.specs = tuple(specs)
        self.device = as_device(device)
        other = next((spec for spec in self.specs if spec.interpolation != "bicubic"), None)
        if other is not None and backend in ("fused", "native"):
            raise InputError(
                f"backend is {backend!r} but view {other.name!r} is resized {other.interpolation}, which only the "
                "reference engine does: take backend 'auto' or 'reference'."
            )
        self.backend = choose_backend(backend if other is None else "reference", self.device)
        self._make_views = BACKENDS[self.backend]()
        self.dtype = dtype

    @typed
    def __call__(self, batch: DecodedBatch, params: ViewParams) -> list[Tensor]:
        """Make the views.

        Args:
            batch: N decoded images; moved to the engine's device if needed.
            params: augmentation parameters of the same specs and images, from `draw`.

        Returns:
            One tensor [N, 3, S, S] per spec: channels-last, normalised, in the engine's dtype and on its device.

        Raises:
            InputError: the parameters do not fit the specs or images, or the images do not fit the buffer; nothing has
                been launched then.
        """
        params = params.to("cpu")  # the host decides which images an operation touches
        check_batch(batch)
        check_params(params, self.specs, batch.sizes)
        if batch.device != self.device:
            batch = batch.to(self.device)
        return self._make_views(batch, self.specs, params, dtype=self.dtype)


def _fused() -> MakeViews:
    from pipelines.views.fused.engine import make_views  # Triton may be missing

    return make_views


BACKENDS: dict[str, Callable[[], MakeViews]] = {
    "fused": _fused,
    "native": lambda: functools.partial(native.make_views, memory=native.ViewMemory()),
    "reference": lambda: reference.make_views,
}
"""Backends by name; imported when first used."""


def choose_backend(name: str, device: torch.device) -> str:
    """Resolve a backend name on a device; "auto" is fused on CUDA and native on the CPU, else reference with a warning.

    Raises:
        InputError: the backend is unknown, or not available on this device; the message says why.
    """
    if name != "auto" and name not in BACKENDS:
        raise invalid("backend", name, f"one of auto, {', '.join(BACKENDS)}", "choose one of these")
    if name == "reference":
        return name
    wanted = name if name != "auto" else "fused" if device.type == "cuda" else "native"
    obstacle = fused_obstacle(device) if wanted == "fused" else _native_obstacle(device)
    if obstacle is None:
        return wanted
    if name != "auto":
        raise InputError(
            f"backend is {name!r} but cannot be used on device {str(device)!r}: {obstacle}; take backend 'auto' or "
            "'reference'."
        )
    _announce(wanted, obstacle)
    return "reference"


def _native_obstacle(device: torch.device) -> str | None:
    """Why the native backend is unavailable on a device, or None."""
    return native.native_obstacle() if device.type == "cpu" else "it runs on the CPU only"


def fused_obstacle(device: torch.device) -> str | None:
    """Why the fused backend is unavailable on a device, or None. With TRITON_INTERPRET=1 it runs on the CPU, slowly."""
    if triton is None:
        return "Triton is not installed (it comes with torch for CUDA on Linux)"
    if device.type != "cuda":
        return None if triton.knobs.runtime.interpret else "its kernels run on CUDA devices only"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        have, need = (".".join(map(str, numbers)) for numbers in (capability, _OLDEST))
        return f"{torch.cuda.get_device_name(device)} has compute capability {have}, the kernels need {need} or newer"
    return None


@functools.cache
def _announce(backend: str, obstacle: str) -> None:
    """Warn once that the slower reference backend is used."""
    _log.warning(
        "The %s view engine is unavailable (%s): using the reference engine, which is slower.", backend, obstacle
    )

"""From decoded images and drawn decisions to views, by one of the backends.

The backends of the view engine, and which one a device gets.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipelines.batch import DecodedBatch, check_batch
from pipelines.runtime import InputError, invalid
from pipelines.views.native import engine as native
from pipelines.views.params import ViewParams
from pipelines.views.reference import engine as reference
from pipelines.views.reference.device import triton
from pipelines.views.sampling import check_params
from pipelines.views.spec import ViewSpec

MakeViews = Callable[..., list[Tensor]]
"""(batch, specs, params, *, dtype) to one [N, 3, S, S] per spec; see `pipelines.views.reference.engine.make_views`."""

_OLDEST = (8, 0)  # compute capability the kernels are built and measured for: A100 and newer
_log = logging.getLogger("mvssl.data")


def _fused() -> MakeViews:
    from pipelines.views.fused.engine import make_views  # here, because Triton may be missing

    return make_views


BACKENDS: dict[str, Callable[[], MakeViews]] = {
    "fused": _fused,
    "native": lambda: native.make_views,
    "reference": lambda: reference.make_views,
}
"""Name of each backend, and how to get its function."""


def choose_backend(name: str, device: torch.device) -> str:
    """The backend of a name on a device; "auto" is the fastest that runs: fused on CUDA, native on the CPU.

    Raises:
        InputError: there is no such backend, or it does not run on this device; the message says why.
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
    """Why the native backend does not run on a device, or None."""
    return native.native_obstacle() if device.type == "cpu" else "it runs on the CPU only"


def fused_obstacle(device: torch.device) -> str | None:
    """Why the fused backend does not run on a device, or None. Under TRITON_INTERPRET=1 it runs on the CPU, slowly."""
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
    """Say once that views are made the slower way."""
    _log.warning("The %s view engine cannot be used (%s): the reference engine is, which is slower.", backend, obstacle)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ViewEngine:
    """Makes the views of a batch; call it with the batch and its decisions.

    Args:
        specs: V views.
        device: where the views are made.
        backend: "fused" (Triton, on CUDA), "native" (C, on the CPU), "reference" (plain torch, anywhere) or "auto":
            the fastest that runs.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: no specs, a dtype that does not exist, or a backend that does not exist or not run here.
    """

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
        self.device = torch.device(device)
        self.backend = choose_backend(backend, self.device)
        self._make_views = BACKENDS[self.backend]()
        self.dtype = dtype

    def __call__(self, batch: DecodedBatch, params: ViewParams) -> list[Tensor]:
        """Make the views.

        Args:
            batch: N decoded images, moved to the engine's device if they are elsewhere.
            params: decisions for the same specs and images, from `draw`.

        Returns:
            One tensor [N, 3, S, S] per spec: channels-last, normalised, in the engine's dtype and on its device.

        Raises:
            InputError: the decisions do not fit the specs or the images, or the images do not fit the buffer. Nothing
                has been launched then.
        """
        params = params.to("cpu")  # decisions steer the host: which images an operation touches
        check_batch(batch)
        check_params(params, self.specs, batch.sizes)
        if batch.device != self.device:
            batch = batch.to(self.device)
        return self._make_views(batch, self.specs, params, dtype=self.dtype)

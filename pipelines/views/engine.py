"""From decoded images and drawn decisions to views, by one of the backends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.batch import DecodedBatch, check_batch
from pipelines.errors import InputError, invalid
from pipelines.views.backends import BACKENDS, choose_backend
from pipelines.views.check_params import check_params
from pipelines.views.params import ViewParams
from pipelines.views.spec import ViewSpec

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

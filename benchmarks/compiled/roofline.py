"""A roofline: predicted time of a step from its traffic and arithmetic and the measured rates of a GPU.

Both constants are from a trace of two steps of byol_resnet50_200ep (bf16, batch 128, view by view, torch 2.11) on an
H100 80GB HBM3, of commit 0eff062. This instrument counted the same step, compiled by the same torch for sm_90: 216 of
the 218 Triton kernels have the names of the trace and as many launches.

    Triton kernels      132,117 MB in 54.489 ms: 2.42 TB/s
    library calls       12,602 GFLOP in 41.503 ms (cuDNN 23.230, cuBLAS and CUTLASS 18.273): 304 TFLOP/s
    fused view engine   8.885 MB an image in 14.335 us (256 photos of ImageNet's size): 0.620 TB/s
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates that a GPU reached.

    Attributes:
        bandwidth: bytes per second of Triton kernels, and of the optimiser's foreach kernels.
        flops: FLOP per second of library calls.
        views: bytes per second of the view engine, whose bottleneck is latency.
    """

    bandwidth: float
    flops: float
    views: float


MEASURED: dict[str, Rates] = {
    "sm_90": Rates(bandwidth=132_117e6 / 54.489e-3, flops=12_602e9 / 41.503e-3, views=8.885e6 / 14.335e-6)
}
"""By target; there is no prediction for other targets."""


def milliseconds(rates: Rates, *, megabytes: float = 0.0, gflops: float = 0.0) -> float:
    """Time of Triton (or foreach) kernels with so much traffic plus library calls with so much arithmetic."""
    return 1e9 * megabytes / rates.bandwidth + 1e12 * gflops / rates.flops

"""Versions, machine and command line that a run is recorded with."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # lists of runs need no torch, which takes a second
    import torch

PACKAGES = (
    "mvssl",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "ffcv",
)


def environment() -> dict[str, Any]:
    """Versions, machine and command line as plain JSON values."""
    import torch

    versions: dict[str, str] = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "packages": versions,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": sys.argv,
    }


def processor() -> str | None:
    """The processor's name; None if the system does not report one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the CUDA device's allocator, or of this process on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, KiB elsewhere


def return_free_memory() -> None:
    """Give freed memory back to the system: a large figure drawn at every save fragments glibc's heap, which grows."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)

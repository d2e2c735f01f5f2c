"""mvssl-train doctor: checks GPU, decoders, compiler and disk, and prints a fix for each problem."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from mvssl.monitor.cpu_use import CpuMeter
from pipelines.decode import default_threads
from pipelines.decode.ffcv import missing_ffcv
from pipelines.files import cache_folder, cache_obstacle
from pipelines.names import cell, say_table
from pipelines.runtime import InputError, parse_arguments
from pipelines.storage import open_source, split_paths
from pipelines.views.native import native_obstacle

State = Literal["ok", "slower", "missing"]

_DISK_READS = 200  # images read to time the disk
_SHARED_BYTES = 1 << 30  # shared memory that NCCL and others may need
_CORES_PER_GPU = 8  # to decode and launch for one GPU without starving it
_WATCHED = 0.5  # seconds in which the use of the cores is measured
_CODE_BYTES = 2 << 30  # free space for compiled code
_OTHER_CACHE = "set XDG_CACHE_HOME to a folder on a disk that can be written and executed from"
_COLOURS = {"ok": "green", "slower": "yellow", "missing": "red"}


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Check this machine: what works, what is missing, and how to fix it.

    Attributes:
        data: images whose disk is timed.
        json: print the findings as JSON.
    """

    data: Path | None = None
    json: bool = False


def doctor(arguments: Sequence[str], console: Console) -> int:
    """Run the command; the exit code is 1 if something is missing."""
    asked = parse_arguments(DoctorArguments, prog="mvssl-train doctor", args=arguments)
    findings = examine(asked.data)
    if asked.json:
        print(json.dumps([{"name": name, **finding._asdict()} for name, finding in findings.items()], indent=2))
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("", "state", "found", "fix"):
            table.add_column(column, overflow="fold")
        for name, finding in findings.items():
            state = cell(finding.state, style=_COLOURS[finding.state])
            table.add_row(name, state, cell(finding.found), cell(finding.remedy))
        say_table(console, table)
    return int(any(finding.state == "missing" for finding in findings.values()))


class Finding(NamedTuple):
    """Result of one check.

    Attributes:
        state: ok; slower (works, but slower than possible); missing (what needs it does not work).
        found: in a few words.
        remedy: command or change that fixes it; "" if there is nothing to fix.
    """

    state: State
    found: str
    remedy: str = ""


def examine(data: Path | None = None) -> dict[str, Finding]:
    """Run all checks, without changing or raising anything; `data` are images whose disk is timed, if any."""
    checks: dict[str, Callable[[], Finding]] = {
        "torch": _torch,
        "GPU": _gpu,
        "DALI": _dali,
        "JPEG hardware": _hardware_decoder,
        "FFCV": _ffcv,
        "HEIC": _heic,
        "Triton": _triton,
        "C compiler": _compiler,
        "compiled code": _compiled_code,
        "NCCL": _nccl,
        "shared memory": _shared_memory,
        "cores": _cores,
    }
    if data is not None:
        checks["disk"] = lambda: _disk(data)
    return {name: _safely(check) for name, check in checks.items()}


def _safely(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a broken driver or library may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return Finding("missing", f"could not be checked: {reason}", "fix what the message names")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_build() -> dict[str, Any]:
    """What torch's own file says of its build (`__version__`, `cuda`, `hip`), without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torch is not installed")
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))


def _torch() -> Finding:
    build = _torch_build()
    return Finding("ok", f"{build['__version__']}, built for CUDA {build['cuda'] or 'none'}")


def _driver_loads() -> bool:
    """Whether a GPU may be here: CUDA's driver can be loaded, or this torch or system has another one."""
    if sys.platform != "linux" or _torch_build().get("hip"):
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _gpus() -> int:
    """Number of GPUs that torch sees. Importing torch takes seconds, so without a driver it is not asked."""
    if not _driver_loads():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu() -> Finding:
    if gpus := _gpus():
        import torch

        name = torch.cuda.get_device_name(0)
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Finding("ok", f"{gpus} x {name}, {memory:.0f} GiB, driver {_driver() or 'unknown'}")
    if shutil.which("nvidia-smi") is None:
        return Finding(
            "slower",
            "no NVIDIA driver: training runs on the CPU",
            "on a machine with a GPU install NVIDIA's driver (580 or newer for CUDA 13)",
        )
    return Finding(
        "missing",
        f"driver {_driver() or 'unknown'} is installed, but torch sees no GPU (CUDA {_torch_build()['cuda']})",
        "update the driver, or install a torch built for its CUDA (see pytorch.org)",
    )


def _driver() -> str | None:
    """Version of NVIDIA's driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, check=False, capture_output=True, text=True, timeout=20)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _dali() -> Finding:
    version = _version("nvidia-dali-cuda120") or _version("nvidia-dali-cuda130")
    if version is None:
        return Finding("slower", "not installed: decoding with Pillow on the CPU", "pip install nvidia-dali-cuda120")
    where = "CUDA and hardware decoders of the GPU" if _gpus() else "on the CPU (no GPU here)"
    return Finding("ok", f"{version}: decodes {where}")


def _hardware_decoder() -> Finding:
    """A100, H100 and later data-centre GPUs have a JPEG hardware decoder (NVIDIA's nvJPEG documentation)."""
    if not _gpus():
        return Finding("ok", "not checked: there is no GPU")
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    if (major, minor) in ((8, 0), (9, 0)) or major == 10:
        return Finding("ok", "available; --dali.hw-decoder-load uses it")
    return Finding("ok", "none on this GPU: its CUDA cores decode")


def _ffcv() -> Finding:
    obstacle = missing_ffcv()
    if obstacle is None:
        return Finding("ok", f"{_version('ffcv')}: --decoder ffcv works")
    found = f"not used ({obstacle}); .beton files are read and written without it"
    return Finding("ok", found, "tools/install_ffcv.sh, for --decoder ffcv")


def _heic() -> Finding:
    version = _version("pillow-heif")
    if importlib.util.find_spec("pillow_heif") is None:
        return Finding("ok", "pillow_heif is not installed: .heic files are ignored", "pip install pillow-heif")
    importlib.import_module("pillow_heif")
    return Finding("ok", f"pillow_heif {version or 'of unknown version'}: .heic files are read")


def _triton() -> Finding:
    version = _version("triton")
    if version is not None:
        return Finding("ok", f"{version}: views by six kernels on a GPU")
    if _gpus():
        return Finding("slower", "not installed", "pip install triton")
    return Finding("ok", "not installed")


def _compiler() -> Finding:
    obstacle = native_obstacle()
    if obstacle is None:
        return Finding("ok", "views on the CPU, sampling and reading are compiled C")
    found = f"{obstacle}: views on the CPU and sampling run in Python"
    folder = cache_obstacle(cache_folder(), execute=True)
    if folder is not None and folder in obstacle:
        return Finding("slower", found, _OTHER_CACHE)
    return Finding("slower", found, "apt-get install gcc libc6-dev (or set CC)")


def _compiled_code() -> Finding:
    folder = cache_folder()
    obstacle = cache_obstacle(folder, execute=True)
    if obstacle is not None:
        found = f"{obstacle}: what is compiled is cached among the temporary files, which may not last"
        return Finding("slower", found, _OTHER_CACHE)
    free = shutil.disk_usage(folder).free
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    if free < _CODE_BYTES:
        found = f"{folder} has {free / 2**30:.1f} GiB free: compiled steps may not be cached"
        return Finding("slower", found, "free space there, or set XDG_CACHE_HOME to another disk")
    return Finding("ok", f"cached in {folder} ({size:,.0f} MiB so far)")


def _nccl() -> Finding:
    if not _gpus():
        return Finding("ok", "not needed without GPUs: gloo connects processes on CPUs")
    import torch

    if not torch.distributed.is_nccl_available():
        return Finding("missing", "not in this build of torch: one GPU only", "install torch from pytorch.org")
    return Finding("ok", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("ok", "this system has no /dev/shm")
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:.1f} GiB free in /dev/shm"
    if free < _SHARED_BYTES and _gpus() > 1:
        return Finding("missing", found, "start the container with --shm-size 8g or --ipc=host")
    return Finding("ok", f"{found}; the loader uses threads and needs none")


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _gpus()
    found = f"{cores}" + (f", {cores / gpus:.0f} per GPU" if gpus else "") + f"; {default_threads()} decoding threads"
    meter = CpuMeter()
    if meter.quota is not None and meter.quota < cores:
        found = f"{found}; the container's CPU quota is {meter.quota:.3g} cores"
        remedy = f"raise the quota, or set OMP_NUM_THREADS and --threads to {max(1, round(meter.quota))}"
        return Finding("slower", found, remedy)
    time.sleep(_WATCHED)
    use = meter.recent()
    if use is not None and use.crowded:
        remedy = "stop other processes, or train when the cores are free"
        return Finding("slower", f"{found}; {use.describe_others()} now", remedy)
    if gpus and cores / gpus < _CORES_PER_GPU:
        remedy = f"request {_CORES_PER_GPU} or more per GPU, or cache decoded images with --cache"
        return Finding("slower", found, remedy)
    return Finding("ok", found)


def _disk(data: Path) -> Finding:
    try:
        source = open_source(split_paths(data)[0])
    except InputError as error:
        return Finding("missing", str(error), "give a path to images with --data")
    indices = range(0, len(source), max(1, len(source) // _DISK_READS))
    began = time.perf_counter()
    size = sum(source.read(index).nbytes for index in indices)
    seconds = time.perf_counter() - began
    source.close()
    found = (
        f"{len(indices) / seconds:,.0f} images/s and {size / seconds / 1e6:,.0f} MB/s one by one from {data} "
        "(including what is in memory already)"
    )
    if len(indices) / seconds < 1000:
        remedy = "convert the images (mvssl-convert) and add --order-chunk 16, or put them on a faster disk"
        return Finding("slower", found, remedy)
    return Finding("ok", found)

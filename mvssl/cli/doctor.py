"""mvssl-train doctor: checks GPU, decoders, compiler and disk, and prints a fix for each problem."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mvssl.training.compile import keep_compiled_code
from pipelines.decode import default_threads
from pipelines.decode.ffcv import missing_ffcv
from pipelines.files import cache_folder
from pipelines.runtime import InputError
from pipelines.storage import open_source, split_paths
from pipelines.views.native.sampling import native_obstacle

State = Literal["ok", "slower", "missing"]

_SAMPLE = 200  # images read to time the disk
_SHARED = 1 << 30  # bytes of shared memory that NCCL and others may need
_CORES_PER_GPU = 8  # to decode and launch for one GPU without starving it
_CODE_BYTES = 2 << 30  # free space for compiled code


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Result of one check.

    Attributes:
        name: of the checked part.
        state: ok; slower (works, but slower than possible); missing (what needs it does not work).
        found: in a few words.
        remedy: command or change that fixes it; "" if there is nothing to fix.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def examine(data: Path | None = None) -> list[Finding]:
    """Run all checks, without changing or raising anything; `data` are images whose disk is timed, if any."""
    checks: list[Callable[[], Finding]] = [
        _torch,
        _cuda,
        _dali,
        _hardware_decoder,
        _ffcv,
        _triton,
        _compiler,
        _compile_cache,
        _nccl,
        _shared_memory,
        _cores,
    ]
    if data is not None:
        checks.append(lambda: _disk(data))
    return [_safely(check) for check in checks]


def _safely(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # a broken driver or library may raise anything
        name = getattr(check, "__name__", "").strip("_").replace("_", " ")
        return Finding(
            name=name if "lambda" not in name else "disk",
            state="missing",
            found=f"could not be checked: {(str(error) or type(error).__name__).splitlines()[0]}",
            remedy="fix what the message names",
        )


def _ok(name: str, found: str) -> Finding:
    return Finding(name=name, state="ok", found=found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Finding:
    return _ok("torch", f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}")


def _cuda() -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Finding(
            name="GPU",
            state="ok",
            found=f"{len(names)} x {names[0]}, {memory:.0f} GiB, driver {_driver() or 'unknown'}",
        )
    if shutil.which("nvidia-smi") is None:
        return Finding(
            name="GPU",
            state="slower",
            found="no NVIDIA driver: training runs on the CPU",
            remedy="on a machine with a GPU install NVIDIA's driver (580 or newer for CUDA 13)",
        )
    return Finding(
        name="GPU",
        state="missing",
        found=f"driver {_driver() or 'unknown'} is installed, but torch sees no GPU (CUDA {torch.version.cuda})",
        remedy="update the driver, or install a torch built for its CUDA (see pytorch.org)",
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
        return Finding(
            name="DALI",
            state="slower",
            found="not installed: decoding with Pillow on the CPU",
            remedy="pip install nvidia-dali-cuda120",
        )
    where = "CUDA and hardware decoders of the GPU" if torch.cuda.is_available() else "on the CPU (no GPU here)"
    return _ok("DALI", f"{version}: decodes {where}")


def _hardware_decoder() -> Finding:
    """A100, H100 and later data-centre GPUs have a JPEG hardware decoder (NVIDIA's nvJPEG documentation)."""
    if not torch.cuda.is_available():
        return _ok("JPEG hardware", "not checked: there is no GPU")
    major, minor = torch.cuda.get_device_capability(0)
    if (major, minor) in ((8, 0), (9, 0)) or major == 10:
        return _ok("JPEG hardware", "available; --dali.hw-decoder-load uses it")
    return _ok("JPEG hardware", "none on this GPU: its CUDA cores decode")


def _ffcv() -> Finding:
    obstacle = missing_ffcv()
    if obstacle is None:
        return _ok("FFCV", f"{_version('ffcv')}: --decoder ffcv works")
    return Finding(
        name="FFCV",
        state="ok",
        found=f"not used ({obstacle}); .beton files are read and written without it",
        remedy="tools/install_ffcv.sh, for --decoder ffcv",
    )


def _triton() -> Finding:
    version = _version("triton")
    if version is not None:
        return _ok("Triton", f"{version}: views by six kernels on a GPU")
    state: State = "slower" if torch.cuda.is_available() else "ok"
    return Finding(
        name="Triton", state=state, found="not installed", remedy="pip install triton" if state != "ok" else ""
    )


def _compiler() -> Finding:
    obstacle = native_obstacle()
    if obstacle is None:
        return _ok("C compiler", "views on the CPU, sampling and reading are compiled C")
    return Finding(
        name="C compiler",
        state="slower",
        found=f"{obstacle}: views on the CPU and sampling run in Python",
        remedy="apt-get install gcc libc6-dev (or set CC)",
    )


def _compile_cache() -> Finding:
    keep_compiled_code()
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    free = shutil.disk_usage(folder).free
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    if free < _CODE_BYTES:
        return Finding(
            name="compiled code",
            state="slower",
            found=f"{folder} has {free / 2**30:.1f} GiB free: compiled steps may not be cached",
            remedy="free space there, or set XDG_CACHE_HOME to another disk",
        )
    return _ok("compiled code", f"cached in {folder} ({size:,.0f} MiB so far)")


def _nccl() -> Finding:
    if not torch.cuda.is_available():
        return _ok("NCCL", "not needed without GPUs: gloo connects processes on CPUs")
    if not torch.distributed.is_nccl_available():
        return Finding(
            name="NCCL",
            state="missing",
            found="not in this build of torch: one GPU only",
            remedy="install torch from pytorch.org",
        )
    return _ok("NCCL", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]


def _shared_memory() -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return _ok("shared memory", "this system has no /dev/shm")
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.1f} GiB free in /dev/shm"
    if free < _SHARED and torch.cuda.device_count() > 1:
        return Finding(
            name="shared memory",
            state="missing",
            found=found,
            remedy="start the container with --shm-size 8g or --ipc=host",
        )
    return _ok("shared memory", f"{found}; the loader uses threads and needs none")


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count()
    found = f"{cores}" + (f", {cores / gpus:.0f} per GPU" if gpus else "") + f"; {default_threads()} decoding threads"
    if gpus and cores / gpus < _CORES_PER_GPU:
        return Finding(
            name="cores",
            state="slower",
            found=found,
            remedy=f"request {_CORES_PER_GPU} or more per GPU, or cache decoded images with --cache",
        )
    return _ok("cores", found)


def _disk(data: Path) -> Finding:
    try:
        source = open_source(split_paths(data)[0])
    except InputError as error:
        return Finding(name="disk", state="missing", found=str(error), remedy="give a path to images with --data")
    step = max(1, len(source) // _SAMPLE)
    began, size = time.perf_counter(), 0
    indices = range(0, len(source), step)
    for index in indices:
        size += source.read(index).nbytes
    seconds = time.perf_counter() - began
    source.close()
    found = (
        f"{len(indices) / seconds:,.0f} images/s and {size / seconds / 1e6:,.0f} MB/s one by one from {data} "
        "(including what is in memory already)"
    )
    if len(indices) / seconds < 1000:
        return Finding(
            name="disk",
            state="slower",
            found=found,
            remedy="convert the images (mvssl-convert) and add --order-chunk 16, or put them on a faster disk",
        )
    return _ok("disk", found)


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
    """Run the command; the exit code is 1 if something is missing that a run here needs."""
    asked = tyro.cli(DoctorArguments, prog="mvssl-train doctor", args=list(arguments))
    findings = examine(asked.data)
    if asked.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("", "state", "found", "fix"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            state = f"[{_COLOURS[finding.state]}]{finding.state}[/]"
            table.add_row(finding.name, state, finding.found, finding.remedy)
        console.print(table)
    return int(any(finding.state == "missing" for finding in findings))

"""Options of a run that do not determine its numbers: folders, devices, logging, saving. They may change on resume."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from pipelines.checks import at_least, at_least_zero, check_fields
from pipelines.decode import DaliOptions, DecodeOptions, DecoderName
from pipelines.loading.pixel_cache import Cache
from pipelines.runtime import InputError, invalid

_FORM = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")  # as SLURM writes it
_SECONDS = (86_400, 3_600, 60, 1)

LogTarget = Literal["tensorboard", "csv", "wandb", "none"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run reads, where it writes, how it logs and saves.

    Attributes:
        data: folder of images, list of files, or converted data; its train/ and val/ are used if they exist.
        out: run folder; created, and refused if it exists, without resume or overwrite.
        val: labelled images for the online kNN; by default DATA/val if it exists.
        device: auto takes CUDA if available.
        decoder: auto takes DALI if it is installed.
        threads: CPU threads for decoding; by default chosen by the number of cores.
        dali: options of DALI on a GPU.
        cache: pixel cache, so that later epochs neither read nor decode images: in host or device (GPU) memory, or off;
            auto: device if the pixels of all images take at most 40 % of its free memory and steps fit next to them,
            else host if at most 50 %. Every process caches all images.
        cuda_graph: record a step once and replay it with a single launch; auto: on CUDA, in a run of one process. Its
            memory (the activations of a step) stays reserved.
        prefetch: finished batches that wait for the step.
        log: loggers besides metrics.jsonl and throughput.jsonl: tensorboard (if installed), csv (tables in csv/), wandb
            (Weights & Biases; without an account into wandb/, for wandb sync), or none.
        run_name: name of the run in wandb; by default that of `out`.
        notes: a remark, saved in config.json and wandb.
        tags: words, saved in config.json and wandb.
        log_every: steps between two log points, the only host syncs.
        save_every_epochs: epochs between two checkpoints; 0 saves only at the end of the run and on a signal.
        save_every_steps: steps between two checkpoints, in addition to those by epoch.
        keep_checkpoints: checkpoints kept on disk, including the last one.
        time: save and stop before this much time is over, such as 7h30m or 12:00:00.
        resume: resume the run in `out` from its last checkpoint.
        extend: with resume: train for more epochs than planned. Learning rate, weight decay and EMA momentum follow the
            schedule of the longer run, so the learning rate rises again at first.
        overwrite: delete the run in `out` first.
        init_from: checkpoint or exported backbone to initialise from (weights only).
    """

    data: Path | None = None
    out: Path | None = None
    val: Path | None = None
    device: str = "auto"
    decoder: DecoderName = "auto"
    threads: int | None = at_least(1, None, "give a positive number")
    dali: DaliOptions = field(default_factory=DaliOptions)
    cache: Cache = "off"
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    prefetch: int = at_least(1, 2, "give a positive number")
    log: tuple[LogTarget, ...] = ("tensorboard",)
    run_name: str | None = None
    notes: str | None = None
    tags: tuple[str, ...] = ()
    log_every: int = at_least(1, 10, "give a positive number")
    save_every_epochs: int = at_least_zero(1)
    save_every_steps: int | None = at_least(1, None, "give a positive number")
    keep_checkpoints: int = at_least(1, 2, "give a positive number")
    time: str | None = None
    resume: bool = False
    extend: bool = False
    overwrite: bool = False
    init_from: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        unknown = [name for name in self.log if name not in get_args(LogTarget)]
        if unknown or not self.log or ("none" in self.log and len(self.log) > 1):
            raise invalid("RunOptions.log", self.log, "`none`, or any of tensorboard, csv, wandb", "choose from these")
        if "wandb" in self.log and importlib.util.find_spec("wandb") is None:
            raise InputError("log names wandb, which is not installed: pip install wandb, or leave it out.")
        if self.time is not None:
            parse_time(self.time)
        if self.extend and not self.resume:
            raise InputError("extend needs resume: add --resume, and the number of all epochs with --epochs.")
        if self.resume and self.overwrite:
            raise InputError("resume and overwrite exclude each other: give one of --resume and --overwrite.")
        if self.resume and self.init_from is not None:
            raise InputError("resume and init_from exclude each other: a resumed run has its weights; leave one out.")

    @property
    def decode(self) -> DecodeOptions:
        """Decoder options."""
        return DecodeOptions(decoder=self.decoder, threads=self.threads, dali=self.dali)


def resolve_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """The device of an option: auto is CUDA where there is one, else the CPU.

    Args:
        name: auto, cpu, cuda or cuda:N.
        local_rank: number of this process on its machine where several train together: each takes the GPU of its
            number.

    Raises:
        InputError: the device is unknown or not there, or one GPU is named for several processes.
    """
    device = _named_device(name)
    if local_rank is None or device.type != "cuda":
        return device
    if device.index is not None:
        raise invalid("device", name, "auto, cpu or cuda with torchrun", "each process takes the GPU of its number")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"Process {local_rank} of this machine has no GPU: torchrun was told to start more processes than the "
            f"{torch.cuda.device_count()} GPUs here (--nproc-per-node); start fewer, or use --device cpu."
        )
    return torch.device("cuda", local_rank)


def _named_device(name: str) -> torch.device:
    """The device of a name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise invalid("device", name, "auto, cpu, cuda or cuda:N", "choose one of these") from error
    if device.type not in ("cpu", "cuda"):
        raise invalid("device", name, "auto, cpu, cuda or cuda:N", "choose one of these")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device is {name!r} but PyTorch sees no CUDA device here: use --device cpu or fix the driver."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise invalid("device", name, f"one of the {torch.cuda.device_count()} CUDA devices", "they count from cuda:0")
    return device


def autocast_dtype(precision: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> torch.dtype | None:
    """The autocast dtype on a device, None for float32; auto is bf16 on CUDA and fp32 elsewhere.

    Raises:
        InputError: fp16 without a CUDA device.
    """
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    if precision == "fp16" and device.type != "cuda":
        raise InputError(
            f"Recipe.precision is 'fp16' but must be fp32 or bf16 on a {device.type} device, where fp16 is slow and "
            "has no gradient scaler: set precision to fp32, or train on a GPU."
        )
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def check_bf16_on_cpu(backbone: nn.Module, sizes: Iterable[int]) -> None:
    """Refuse bf16 training on the CPU if a strided convolution (kernel above 1) is applied to a 1x1 feature map.

    Its weight gradient is uninitialised memory (seen with torch 2.15 and oneDNN on AMX; float32, stride 1 and larger
    maps are correct), so training would fail at random.

    Raises:
        InputError: a view size leads to such a map.
    """
    shadow = copy.deepcopy(backbone).to("meta").eval()
    met: list[str] = []

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not isinstance(module, nn.Conv2d) or tuple(inputs[0].shape[2:]) != (1, 1):
            return
        if max(module.kernel_size) > 1 and max(module.stride) > 1:
            met.append(f"{module.kernel_size[0]} x {module.kernel_size[1]}")

    for module in shadow.modules():
        module.register_forward_pre_hook(look)
    for size in sorted(set(sizes)):
        with torch.no_grad():
            shadow(torch.zeros(2, 3, size, size, device="meta"))
        if met:
            raise InputError(
                f"Recipe.precision is 'bf16' but must be fp32 on the CPU for views of {size} pixels, which shrink to "
                f"one pixel before a strided {met[0]} convolution, where torch's bf16 gradients are wrong: set "
                "precision to fp32 or enlarge the view."
            )


def parse_time(text: str) -> int:
    """Seconds of a duration such as 7h30m, 90m, 1d12h, 45s, 12:00:00 or 1-12:00:00."""
    found = _CLOCK.fullmatch(text) or _FORM.fullmatch(text)
    seconds = (
        0 if found is None else sum(int(part or 0) * of for part, of in zip(found.groups(), _SECONDS, strict=True))
    )
    if not seconds:
        raise invalid("RunOptions.time", text, "a duration such as 7h30m or 12:00:00", "write hours, minutes, seconds")
    return seconds

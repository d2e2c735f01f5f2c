"""Options of a run that do not determine its numbers: folders, devices, logging, saving. They may change on resume."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from mvssl.ranks import asked_devices
from pipelines.checks import at_least, at_least_zero, between, check_fields
from pipelines.decode import DaliOptions, DecodeOptions, DecoderName, ImageLimits
from pipelines.decode.base import MOST_THREADS
from pipelines.loading import Cache
from pipelines.names import Url, located
from pipelines.runtime import InputError, invalid
from pipelines.storage.remote_files import RemoteOptions
from pipelines.value_range import parse_value_range

LogTarget = Literal["tensorboard", "csv", "wandb", "mlflow", "none"]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a step is executed; changes no numbers except by rounding.

    Attributes:
        step_mode: joint: all views in one forward and backward; per-view: one after another, with the least memory.
        compile: torch.compile the step; auto compiles on CUDA only.
        channels_last: memory format of convolutional networks.
        cuda_graph: record a step once and replay it with a single launch; auto: on CUDA, in a run of one process. Its
            memory (the activations of a step) stays reserved.
        checkpointing: keep only the inputs of the backbone's blocks; the backward computes their activations again:
            less memory, for large ViTs and batches, and about a third more time.
    """

    step_mode: Literal["joint", "per-view"] = "joint"
    compile: Literal["auto", "on", "off"] = "auto"
    channels_last: bool = True
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class RunOptions(Execution):
    """What a run reads, where it writes, how it logs and saves, and how its steps are executed.

    Attributes:
        data: folder of images, list of files, tars, zips, Parquet or Arrow files (a file, a folder, or a pattern in
            quotes), or converted data; its train/ and val/ are used if they exist. Converted data, tars, zips
            and Parquet may be at s3://, gs://, hf:// or http(s)://.
        out: run folder; created, and refused if it exists, without resume or overwrite.
        val: labelled images for the online kNN; by default DATA/val if it exists.
        device: auto takes CUDA if available.
        devices: train in a process for each of several devices of this machine: a number of GPUs, their numbers with
            commas (0,1,3), or all; with device cpu a number of processes. None trains in this process. Instead of
            torchrun, which is needed for several machines.
        decoder: auto takes DALI if it is installed.
        threads: CPU threads for decoding; by default chosen by the number of cores.
        dali: options of DALI on a GPU.
        value_range: MIN..MAX of the values of images with more than 8 bits, such as 0..4095 for 12 bits in files of 16;
            values outside are clamped. Converted data have their own; else needed unless 16 bits are used.
        limits: images beyond these limits are bad images and are replaced.
        remote: how data at a URL are read and cached.
        cache: pixel cache, so that later epochs neither read nor decode images: in host or device (GPU) memory, or off;
            auto: device if the pixels of all images take at most 40 % of its free memory and steps fit next to them,
            else host if at most 50 %. Every process caches all images.
        prefetch: finished batches that wait for the step.
        log: one or more loggers, separated by spaces, besides metrics.jsonl and throughput.jsonl, which are always
            written: tensorboard (if installed), csv (tables in csv/), wandb (Weights & Biases; without an account into
            wandb/, for wandb sync), mlflow (to MLFLOW_TRACKING_URI, else into mlruns/); none alone turns them off.
        run_name: name of the run in wandb and mlflow; by default that of `out`.
        notes: a remark, saved in config.json, wandb and mlflow.
        tags: words, saved in config.json, wandb and mlflow.
        log_every: steps between two log points, the only host syncs.
        save_every_epochs: epochs between two checkpoints; 0 saves only at the end of the run, on a signal, and what
            keep_best keeps.
        save_every_steps: steps between two checkpoints, in addition to those by epoch.
        keep_checkpoints: checkpoints kept on disk, including the last one; the best one is kept in addition.
        keep_best: keep the checkpoint of the evaluation with the highest kNN or linear-probe accuracy, as
            checkpoints/best; of equal ones the first. none keeps the newest ones only.
        on_collapse: stop: save and stop (exit code 1) if the embeddings stay collapsed; warn: train on.
        collapse_patience: steps after the warm-up at whose log points (three or more) the embeddings are collapsed
            before the run stops; by default an epoch, and 500 if that is more. They count again after an evaluation
            that is better than all before.
        time: save and stop before this much time is over, such as 7h30m or 12:00:00.
        resume: resume the run in `out` from its last checkpoint.
        extend: with resume and a larger number of all epochs (--resume --extend --epochs 200): train on beyond the
            planned end. Learning rate, weight decay and EMA momentum follow the schedule of the longer run, so the
            learning rate rises again at first.
        overwrite: delete the run in `out` first.
        init_from: checkpoint, exported backbone or timm's folder to initialise from (weights only).
    """

    data: Path | None = None
    out: Path | None = None
    val: Path | None = None
    device: str = "auto"
    devices: str | None = None
    decoder: DecoderName = "auto"
    threads: int | None = between(1, MOST_THREADS, None, "give a positive number")
    dali: DaliOptions = field(default_factory=DaliOptions)
    value_range: str | None = None
    limits: ImageLimits = field(default_factory=ImageLimits)
    remote: RemoteOptions = field(default_factory=RemoteOptions)
    cache: Cache = "off"
    prefetch: int = between(1, 1000, 2, "give a small number")
    log: tuple[LogTarget, ...] = ("tensorboard",)
    run_name: str | None = None
    notes: str | None = None
    tags: tuple[str, ...] = ()
    log_every: int = at_least(1, 10, "give a positive number")
    save_every_epochs: int = at_least_zero(1)
    save_every_steps: int | None = at_least(1, None, "give a positive number")
    keep_checkpoints: int = between(1, 10**9, 2, "give a positive number")
    keep_best: Literal["knn", "probe", "none"] = "knn"
    on_collapse: Literal["stop", "warn"] = "stop"
    collapse_patience: int | None = at_least(1, None, "give a number of steps")
    time: str | None = None
    resume: bool = False
    extend: bool = False
    overwrite: bool = False
    init_from: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "val"):
            path = getattr(self, name)
            if path is not None:
                object.__setattr__(self, name, located(path))
        if self.out is not None and isinstance(located(self.out), Url):
            raise invalid("out", str(located(self.out)), "a folder of this machine", "give a path, and copy it later")
        unknown = [name for name in self.log if name not in get_args(LogTarget)]
        if unknown or not self.log or ("none" in self.log and len(self.log) > 1):
            raise invalid(
                "RunOptions.log", self.log, "`none`, or any of tensorboard, csv, wandb, mlflow", "choose from these"
            )
        if "wandb" in self.log and importlib.util.find_spec("wandb") is None:
            raise InputError("log names wandb, which is not installed: pip install wandb, or leave it out.")
        if "mlflow" in self.log and importlib.util.find_spec("mlflow") is None:
            raise InputError("log names mlflow, which is not installed: pip install 'mvssl[log]', or leave it out.")
        if self.devices is not None:
            asked_devices(self.devices)
        if self.time is not None:
            parse_time(self.time)
        if self.value_range is not None:
            parse_value_range(self.value_range)
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


_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")  # as SLURM writes it
_SECONDS = (86_400, 3_600, 60, 1)


def parse_time(text: str) -> int:
    """Seconds of a duration such as 7h30m, 90m, 1d12h, 45s, 12:00:00 or 1-12:00:00; more than 0."""
    found = _CLOCK.fullmatch(text) or _UNITS.fullmatch(text)
    numbers = found.groups() if found is not None else ()
    seconds = sum(int(number or 0) * unit for number, unit in zip(numbers, _SECONDS, strict=False))
    if not seconds:
        raise invalid("RunOptions.time", text, "a duration such as 7h30m or 12:00:00", "write hours, minutes, seconds")
    return seconds

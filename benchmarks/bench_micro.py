"""Micro-benchmarks: sampling of parameters, GIL contention, the fused engine's kernels, the linear probe.

python -m benchmarks.bench_micro sampling [--images 256 1024]     parameters and job tables, C against torch
python -m benchmarks.bench_micro gil photos [--other CHECKOUT]    what the loader costs a thread of pure Python
python -m benchmarks.bench_micro fused [--num-images 256]         block sizes and warps of the kernels on this GPU
python -m benchmarks.bench_micro bytes                            bytes that each of these kernels must move
python -m benchmarks.bench_micro linear TRAIN.npy VAL.npy         the fast linear probe against scikit-learn
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.compiled import view_kernels
from benchmarks.harness.command import check_positive, command_of, finish
from benchmarks.harness.results import measured_by, write_result
from benchmarks.harness.trials import Budget, interleaved_seconds, say, spread
from mvssl.evaluate.linear import ROUNDS, FastLinear
from mvssl.evaluate.linear_fit import Setting, fit, race, stratified
from pipelines.batch import DecodedBatch
from pipelines.runtime import InputError, parse_arguments, run_cli
from pipelines.views.engine import fused_obstacle
from pipelines.views.fused.jobs import make_jobs, make_jobs_reference
from pipelines.views.native import native_obstacle
from pipelines.views.params import ViewParams
from pipelines.views.presets import paper_views
from pipelines.views.sampling import check_params, draw, sample_reference

PROG = "python -m benchmarks.bench_micro"
ROOT = Path(__file__).resolve().parent.parent
cuda: Any = torch.cuda  # Any: torch ships its events without types


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Time the paper's augmentation parameters and job tables of a batch in C against torch, which give the same bits.

    Both are interleaved in this process with one thread of torch; no pixels are touched.

    Attributes:
        images: of a batch, for each measurement.
        repeats: trials of each; the median counts.
        out: JSON file to write.
    """

    images: tuple[int, ...] = (256, 1024)
    repeats: int = 15
    out: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "images", "repeats")

    def measure(self, command: str) -> dict[str, Any]:
        """Run the benchmark; the result as plain JSON values."""
        if (obstacle := native_obstacle()) is not None:
            raise InputError(f"The C library cannot be used ({obstacle}): there is nothing to compare.")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        rows = {}
        try:
            for images in self.images:
                seconds = interleaved_seconds(sampling_works(images), repeats=self.repeats, warm_up=1)
                row = {name: 1e3 * statistics.median(each) for name, each in seconds.items()}
                ratio = (row["draw, torch"] + row["jobs, torch"]) / (row["draw"] + row["jobs"])
                rows[str(images)] = {"milliseconds": row, "times_faster": ratio}
        finally:
            torch.set_num_threads(threads)
        return {
            "benchmark": "draw",
            "device": "cpu",
            "repeats": self.repeats,
            "images": rows,
            **measured_by(command),
        }


def sampling_works(images: int) -> dict[str, Callable[[], object]]:
    """What `Sampling` times, by name, for photos of about 500 x 375 pixels."""
    sizes = torch.randint(300, 600, (images, 2), generator=torch.Generator().manual_seed(0))
    index = torch.arange(images)
    bytes_each = sizes.prod(dim=1) * 3
    batch = DecodedBatch(
        pixels=torch.empty(0, dtype=torch.uint8),
        offset=bytes_each.cumsum(0) - bytes_each,
        sizes=sizes,
        row_stride=sizes[:, 1] * 3,
        index=index,
        labels=index,
    )
    specs = paper_views()
    params = draw(specs, sizes, seed=0, epoch=0, index=index)
    return {
        "draw": lambda: draw(specs, sizes, seed=0, epoch=0, index=index),
        "draw, torch": lambda: sample_reference(specs, sizes, seed=0, epoch=0, index=index),
        "jobs": lambda: make_jobs(batch, specs, params, images=slice(0, images)),
        "jobs, torch": lambda: make_jobs_reference(batch, specs, params, images=slice(0, images)),
        "check": lambda: check_params(params, specs, sizes),
    }


@dataclass(frozen=True, kw_only=True)
class Gil:
    """Measure what the loader costs a thread that never leaves Python: milliseconds a batch, and images/s meanwhile.

    The thread stands in for the training thread, which launches kernels from Python: it waits whenever a loader thread
    holds the GIL or requests it. Needs two cores.

    Attributes:
        data: images in any form that --data of mvssl-train takes.
        other: checkout of another version of this project, whose loader is interleaved with this one's.
        batch_size: images of a batch.
        size, local_size: pixels of the views.
        batches: of a trial.
        seconds: of a trial at most.
        repeats: trials of each; the median counts.
        out: JSON file to write.
    """

    data: tyro.conf.Positional[Path]
    other: Path | None = None
    batch_size: int = 64
    size: int = 224
    local_size: int = 96
    batches: int = 8
    seconds: float = 120.0
    repeats: int = 3
    out: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "batches", "seconds", "repeats")
        if self.other is not None and not (self.other / "pipelines" / "loader.py").exists():
            raise InputError(f"other is {str(self.other)!r} but must be a checkout of this project: give its folder.")

    def measure(self, command: str) -> dict[str, Any]:
        """Run the benchmark; the result as plain JSON values."""
        if len(os.sched_getaffinity(0)) < 2:
            raise InputError("This process may use one core only: the loop and the loader need one each.")
        checkouts = {"this": ROOT} | ({} if self.other is None else {"other": self.other.resolve()})
        lost: dict[str, list[float]] = {name: [] for name in checkouts}
        rates: dict[str, list[float]] = {name: [] for name in checkouts}
        for number in range(self.repeats):
            for name, checkout in checkouts.items():
                report = self.trial(checkout)
                lost[name].append(report["lost_milliseconds"])
                rates[name].append(report["batches"] * self.batch_size / report["wall"])
                said = f"{lost[name][-1]:.2f} ms lost a batch, {rates[name][-1]:.0f} images/s"
                say(f"trial {number + 1} of {name}: {said}")
        return {
            "benchmark": "lock",
            "device": "cpu",
            "batch_size": self.batch_size,
            "size": self.size,
            "contenders": {
                name: {
                    "lost_milliseconds": statistics.median(lost[name]),
                    "spread": spread(lost[name]),
                    "images_per_second": statistics.median(rates[name]),
                }
                for name in checkouts
            },
            **measured_by(command),
        }

    def trial(self, checkout: Path) -> dict[str, float]:
        """One trial of the loader of a checkout, in a process of its own.

        Raises:
            InputError: it failed, or loaded fewer than two batches in time.
        """
        names = ("batch_size", "size", "local_size", "batches", "seconds")
        asked = {"data": str(self.data), "blur_kernel": 23 if self.size >= 224 else 5}
        done = subprocess.run(
            [
                sys.executable,
                str(ROOT / "benchmarks" / "harness" / "gil_probe.py"),
                json.dumps(asked | {name: getattr(self, name) for name in names}),
            ],
            env={**os.environ, "PYTHONPATH": str(checkout)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise InputError(f"The loader of {checkout} failed: {last}")
        report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        if report["batches"] < 1:
            raise InputError(
                f"The loader of {checkout} loaded fewer than two batches within {self.seconds:g} s: raise --seconds or "
                "lower --batch-size."
            )
        return report


# The kernels of upright views; those of turned ones are not tuned.
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "weights": {"block": (64, 128, 256)},
    "columns": {"block": (32, 64, 128), "block_rows": (4, 8, 16)},
    "rows": {"block": (256, 512, 1024)},
    "color": {"block": (256, 512, 1024)},
    "down": {"block": (512, 1024, 2048)},
    "along": {"block": (256, 512, 1024)},
}
WARPS = (2, 4, 8)
Launching = tuple[str, dict[str, int], int]
"""Kernel, block sizes and warps."""


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Tune the fused engine's kernels on this GPU: time every candidate and name the best.

    For the paper's five views of random 500 x 375 images, one kernel changed at a time. The best ones go into
    `LAUNCHES` of pipelines/views/fused/engine.py, the JSON into results/, which also fills the table of kernel times.

    Attributes:
        num_images: images of a batch.
        repeats: timed batches of each candidate; the median counts.
        seconds: try no other candidate after so many; by default all are. The current launches come first.
        out: JSON file, rewritten after every candidate.
    """

    num_images: int = 256
    repeats: int = 10
    seconds: float | None = None
    out: Path | None = None

    def measure(self, command: str) -> dict[str, Any]:
        """Time all candidates; the result as plain JSON values."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        obstacle = "there is no CUDA device here" if device.type != "cuda" else fused_obstacle(device)
        if obstacle is not None:
            raise InputError(f"The fused kernels cannot be tuned: {obstacle}; run this on a machine with a GPU.")
        from pipelines.views.fused import engine

        budget = Budget(self.seconds)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (self.num_images, 375, 500, 3), generator=generator, dtype=torch.uint8)
        batch = DecodedBatch.from_images(list(images), index=range(self.num_images), device=device)
        params = draw(paper_views(), batch.sizes, seed=0, epoch=0, index=batch.index)
        rows: dict[str, list[dict[str, Any]]] = {}

        def result(*, unfinished: bool) -> dict[str, Any]:
            return {
                "benchmark": "tune_fused",
                "partial": unfinished,
                "device": "cuda",
                "images": self.num_images,
                "kernels": {
                    name: {"best": _best(tried), "now": tried[0], "all": tried} for name, tried in rows.items()
                },
                **measured_by(command),
            }

        for name, constants, num_warps in launchings(engine.LAUNCHES):
            if name in rows and budget.spent:
                break
            with launched_with(name, constants, num_warps):
                milliseconds = kernel_milliseconds(name, batch, params, self.repeats)
            rows.setdefault(name, []).append({**constants, "num_warps": num_warps, "milliseconds": milliseconds})
            write_result(self.out, result(unfinished=True))
        for name, tried in rows.items():
            now = 1000 * tried[0]["milliseconds"] / self.num_images
            say(f"{name:8} now {now:.2f} us per image, best of {len(tried)}: {_best(tried)}")
        return result(unfinished=False)


def _best(tried: list[dict[str, Any]]) -> dict[str, Any]:
    return min(tried, key=lambda row: float(row["milliseconds"]))


def launchings(launches: Mapping[str, Any]) -> Iterator[Launching]:
    """All that is timed: the current launch of each kernel, then the other candidates."""
    timed = {name: launches[name] for name in CANDIDATES}
    for name, launch in timed.items():
        yield name, dict(launch.constants), launch.num_warps
    for name, launch in timed.items():
        for constants, num_warps in candidates(name):
            if (constants, num_warps) != (launch.constants, launch.num_warps):
                yield name, constants, num_warps


def candidates(name: str) -> Iterator[tuple[dict[str, int], int]]:
    """Every combination of block sizes and warps of a kernel."""
    sizes = CANDIDATES[name]
    for values in itertools.product(*sizes.values(), WARPS):
        yield dict(zip(sizes, values, strict=False)), values[-1]


@contextmanager
def launched_with(name: str, constants: dict[str, int], num_warps: int) -> Iterator[None]:
    """Launch a kernel with other block sizes and warps in the body."""
    from pipelines.views.fused import engine

    changed = dataclasses.replace(engine.LAUNCHES[name], constants=constants, num_warps=num_warps)
    with mock.patch.dict(engine.LAUNCHES, {name: changed}):
        yield


def kernel_milliseconds(name: str, batch: DecodedBatch, params: ViewParams, repeats: int) -> float:
    """Median device time of one kernel over several batches."""
    from pipelines.views.fused import engine

    times: list[tuple[Any, Any]] = []
    launch = engine.Launch.__call__
    kernel = engine.LAUNCHES[name].kernel

    def timed(self: engine.Launch, grid: tuple[int, ...], *arguments: Any) -> None:
        if self.kernel is not kernel:
            return launch(self, grid, *arguments)
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch(self, grid, *arguments)
        end.record()
        times.append((begin, end))
        return None

    with mock.patch.object(engine.Launch, "__call__", timed):
        for _ in range(repeats + 2):  # the first ones build the kernel
            engine.make_views(batch, paper_views(), params, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in times[2:])


ONE, GRID, ALL, SKLEARN = "one setting", "the grid, raced", "the grid, all epochs", "scikit-learn, best C"


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Time and accuracy of the fast linear probe: one setting, a grid, and scikit-learn's logistic regression.

    The files are those of mvssl-features, each with its .csv of labels.

    Attributes:
        train: features to learn from.
        val: features to measure on.
        epochs: of one setting, and of the grid's best.
        strengths: the regularisations C that scikit-learn is tried with; the fit of the most accurate one is timed.
        whole: also train all settings for all epochs.
        repeats: trials of each; the median counts.
        out: JSON file to write.
    """

    train: tyro.conf.Positional[Path]
    val: tyro.conf.Positional[Path]
    epochs: int = 100
    strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    whole: bool = False
    repeats: int = 3
    out: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "epochs", "repeats")

    def measure(self, command: str) -> dict[str, Any]:
        """Seconds and accuracy of each, and how many times as long as one setting it takes."""
        top1: dict[str, float] = {}

        def noting(name: str, work: Callable[[], float]) -> Callable[[], object]:
            return lambda: top1.update({name: work()})

        works = {name: noting(name, work) for name, work in self.classifiers().items()}
        seconds = interleaved_seconds(works, repeats=self.repeats)
        for name, own in seconds.items():
            say(f"{name}: {', '.join(f'{each:.2f}' for each in own)} s, top-1 {100 * top1[name]:.2f} %")
        return {
            "benchmark": "linear",
            "settings": len(FastLinear().grid()),
            "epochs": self.epochs,
            "contenders": {
                name: {
                    "seconds": statistics.median(own),
                    "spread": spread(own),
                    "top1": top1[name],
                    "times_one_setting": statistics.median(a / b for a, b in zip(own, seconds[ONE], strict=True)),
                }
                for name, own in seconds.items()
            },
            **measured_by(command),
        }

    def classifiers(self) -> dict[str, Callable[[], float]]:
        """Each trains and returns its top-1 on val."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        (x, y), (x_val, y_val) = load_features(self.train), load_features(self.val)
        classes = int(y.max()) + 1
        fast = FastLinear(epochs=self.epochs)
        grid, batch_size = fast.grid(), fast.batch_for(len(x))
        held_out = stratified(y, fast.held_out, seed=0)

        def raced() -> tuple[int, float]:
            rounds = [(max(1.0, share * self.epochs), part) for share, part in ROUNDS]
            raced = race(x, y, grid, classes=classes, held_out=held_out, rounds=rounds, batch_size=batch_size)
            return raced.order[0], trained([grid[raced.order[0]]])

        def trained(settings: list[Setting]) -> float:
            final = fit(x, y, settings, classes=classes, epochs=self.epochs, batch_size=batch_size)
            return float(final.right(x_val, y_val).max())

        chosen = grid[raced()[0]]
        scaler = StandardScaler().fit(x.numpy())

        def sklearn(strength: float) -> float:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of iterations that do not suffice
                model = LogisticRegression(C=strength, max_iter=200).fit(scaler.transform(x.numpy()), y.numpy())
            return float(model.score(scaler.transform(x_val.numpy()), y_val.numpy()))

        strength = max(self.strengths, key=sklearn)
        classifiers: dict[str, Callable[[], float]] = {
            ONE: lambda: trained([chosen]),
            GRID: lambda: raced()[1],
            SKLEARN: lambda: sklearn(strength),
        }
        return classifiers | ({ALL: lambda: trained(grid)} if self.whole else {})


def load_features(path: Path) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] as written by mvssl-features.

    Raises:
        InputError: a file is missing, or images have no labels.
    """
    try:
        features = torch.from_numpy(np.load(path)).float()
        with path.with_suffix(".csv").open() as file:
            labels = torch.tensor([int(row["label"]) for row in csv.DictReader(file)])
    except OSError as error:
        raise InputError(f"{path} or its .csv cannot be read ({error}): write them with mvssl-features.") from error
    if len(labels) != len(features) or bool((labels < 0).any()):
        raise InputError(f"{path} has images without a label: give labelled images to mvssl-features.")
    return features, labels


Command = (
    Annotated[Sampling, tyro.conf.subcommand("sampling")]
    | Annotated[Gil, tyro.conf.subcommand("gil")]
    | Annotated[Fused, tyro.conf.subcommand("fused")]
    | Annotated[view_kernels.Arguments, tyro.conf.subcommand("bytes")]
    | Annotated[Linear, tyro.conf.subcommand("linear")]
)


def parse(words: list[str]) -> Sampling | Gil | Fused | view_kernels.Arguments | Linear:
    """Parse the command line."""
    command: Any = Command
    parsed: Sampling | Gil | Fused | view_kernels.Arguments | Linear = parse_arguments(command, prog=PROG, args=words)
    return parsed


def body() -> int:
    """Run the command; returns the exit code."""
    words = sys.argv[1:]
    asked = parse(words)
    if isinstance(asked, view_kernels.Arguments):
        print("\n".join(view_kernels.table(asked)))
        return 0
    return finish(asked.measure(command_of(PROG, words)), asked.out)


if __name__ == "__main__":
    run_cli(body)

"""Images per second of the view engine against other ways to make views: same images, one run, interleaved trials.

python -m benchmarks.bench_views DATA [--device cuda] [--dtype bfloat16] [--num-images 256] [--out results.json]

Decoding is not timed; the decoded images lie on the device. Implementations that take augmentation parameters get the
same ones, and their views are compared with torchvision's on the CPU; DALI and kornia sample their own. One that is
missing on this machine is left out with a line that says so. --out is rewritten after every round of trials, and after
--seconds nothing more begins.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.harness.command import check_device, check_positive, command_of, finish
from benchmarks.harness.processes import Trial
from benchmarks.harness.results import measured_by, write_result
from benchmarks.harness.trials import Budget, Outcome, exhaust, rates, ratios, say, timed_on_device
from benchmarks.implementations.views import IMPLEMENTATIONS, MakeViews, Setup, sample, version
from pipelines.batch import DecodedBatch
from pipelines.decode import make_decoder
from pipelines.order import Order
from pipelines.runtime import InputError, parse_arguments, run_cli
from pipelines.storage import open_source
from pipelines.views.presets import adapt_views, paper_views
from pipelines.views.spec import IMAGENET_STD

PROG = "python -m benchmarks.bench_views"
Name = Literal["fused", "native", "reference", "compiled", "torchvision", "dali", "kornia"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPARED = 16  # images whose views are compared with torchvision's


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time view making.

    Attributes:
        data: folder of images or converted data set.
        device: of the decoded images and the views.
        dtype: type of the views.
        contenders: implementations that take part; by default all that can.
        num_images: images of a batch.
        batches: batches of a trial, so that the next one is never in a cache already.
        threads: threads that torch may use on the CPU, and those of DALI.
        repeats: trials of each after a warm-up; the median counts.
        size: side of the global and cutout views in pixels.
        local_size: side of the local views in pixels.
        blur_kernel: taps of the blur.
        view_preset: adapts the views, such as microscopy (`pipelines.adapt_views`).
        seconds: begin nothing more after so many; by default there is no limit.
        out: JSON file, rewritten after every round of trials.
    """

    data: tyro.conf.Positional[Path]
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    contenders: tuple[Name, ...] = ()
    num_images: int = 64
    batches: int = 2
    threads: int = 1
    repeats: int = 5
    size: int = 224
    local_size: int = 96
    blur_kernel: int = 23
    view_preset: str | None = None
    seconds: float | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "num_images", "batches", "threads", "repeats")


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values."""
    check_device(arguments.device)
    budget = Budget(arguments.seconds)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    batches = load(arguments)
    specs = paper_views(size=arguments.size, local_size=arguments.local_size, blur_kernel=arguments.blur_kernel)
    setup = Setup(
        specs=specs if arguments.view_preset is None else adapt_views(specs, arguments.view_preset),
        device=device,
        dtype=DTYPES[arguments.dtype],
        batch_size=arguments.num_images,
        threads=arguments.threads,
    )
    views = len(setup.specs)
    pixels = torch.cat([batch.sizes for batch in batches]).prod(dim=1).double().mean()
    outcome = Outcome()
    gaps: dict[str, dict[str, float]] = {}

    def result(*, unfinished: bool) -> dict[str, Any]:
        faster = ratios(outcome.trials, "torchvision")
        return {
            "benchmark": "views",
            "partial": unfinished,
            "device": arguments.device,
            "dtype": arguments.dtype,
            "images": arguments.num_images,
            "batches": len(batches),
            "mean_megapixels": float(pixels) / 1e6,
            "views_per_image": views,
            "view_preset": arguments.view_preset,
            "sizes": [spec.size for spec in setup.specs],
            "threads": arguments.threads,
            "contenders": {
                name: {
                    "what": IMPLEMENTATIONS[name].what,
                    "shares_decisions": IMPLEMENTATIONS[name].shares_decisions,
                    **summary(trials, views=views),
                    "times_torchvision": faster.get(name),
                    "difference_from_torchvision_cpu": gaps.get(name),
                }
                for name, trials in outcome.trials.items()
            },
            "left_out": outcome.left_out,
            "failed": outcome.failed,
            "environment": measured_by(command)["environment"] | {"kornia": version("kornia")},
        }

    with torch.inference_mode():
        on_device = [batch.to(device) for batch in batches]
        functions = build(arguments.contenders or tuple(IMPLEMENTATIONS), setup, on_device, outcome, budget)
        gaps |= differences(functions, setup, batches[0])
        for done in range(arguments.repeats):
            if done > 0 and budget.spent:
                break
            for name, function in functions.items():
                seconds, host_seconds = timed_on_device(partial(function, on_device), device)
                images = arguments.num_images * len(batches)
                report = {"images": images, "seconds": seconds, "host_seconds": host_seconds}
                outcome.trials.setdefault(name, []).append(Trial(report=report))
            unfinished = done + 1 < arguments.repeats and not budget.spent
            write_result(arguments.out, result(unfinished=unfinished))
    return result(unfinished=False)


def load(arguments: Arguments) -> list[DecodedBatch]:
    """Decode random batches of the data set, on the CPU, each of the same number of images.

    Raises:
        InputError: the data set is too small or has images that cannot be decoded.
    """
    source = open_source(arguments.data)
    if arguments.num_images > len(source):
        raise InputError(
            f"num_images is {arguments.num_images} but {arguments.data} has only {len(source)} images: lower "
            "--num-images."
        )
    order = Order(num_images=len(source), batch_size=arguments.num_images, seed=0)
    decoder = make_decoder("auto", device="cpu", batch_size=arguments.num_images, threads=1)
    batches = []
    for epoch in range(arguments.batches):
        index = torch.from_numpy(order.batch(epoch, 0))
        decoded = decoder([source.read(i) for i in index.tolist()])
        if decoded.failures:
            position, reason = next(iter(decoded.failures.items()))
            raise InputError(f"{source.key(int(index[position]))} cannot be decoded ({reason}): remove it.")
        batches.append(DecodedBatch.packed(decoded.pixels, sizes=decoded.sizes, index=index))
    decoder.close()
    source.close()
    return batches


def build(
    names: Sequence[str], setup: Setup, batches: Sequence[DecodedBatch], outcome: Outcome, budget: Budget
) -> dict[str, MakeViews]:
    """Build the implementations and warm each up with all batches; those that cannot or fail go into `outcome`.

    The one that compiles is built last, as it takes longest.
    """
    functions: dict[str, MakeViews] = {}
    for name in sorted(names, key=lambda name: name == "compiled"):
        if budget.spent:
            outcome.leave_out(name, budget.reason)
            continue
        try:
            function = IMPLEMENTATIONS[name].build(setup)
        except (InputError, ImportError) as error:
            outcome.leave_out(name, str(error))
            continue
        try:
            exhaust(function(batches))
            if setup.device.type == "cuda":
                torch.cuda.synchronize(setup.device)
        except Exception as error:  # whatever a baseline raises must not cost the others' numbers
            outcome.fail(name, f"{type(error).__name__}: {error}")
            continue
        functions[name] = function
    return functions


def differences(functions: Mapping[str, MakeViews], setup: Setup, batch: DecodedBatch) -> dict[str, dict[str, float]]:
    """How far the views of implementations with shared parameters are from torchvision's on the CPU in float32.

    Args:
        functions: name and function of each implementation.
        setup: what they share.
        batch: images on the CPU; the first `COMPARED` are compared, in a batch of the full size.

    Returns:
        For each name `normalised`, the largest difference of a normalised value, and `levels` and `mean_levels`, the
        largest and the mean difference in units of 1/255. Empty without torchvision.
    """
    if version("torchvision") is None:
        say("left out the comparison of views: torchvision is not installed")
        return {}
    from benchmarks.implementations.torchvision_baseline import torchvision_view

    params = sample(setup, batch)
    count = min(COMPARED, len(batch))
    std = torch.tensor(IMAGENET_STD)[:, None, None]  # [3, 1, 1]
    truth = [
        torch.stack([torchvision_view(batch.image(n), spec, params.view(v), n) for n in range(count)])
        for v, spec in enumerate(setup.specs)
    ]
    found = {}
    for name, function in functions.items():
        if IMPLEMENTATIONS[name].shares_decisions:
            views = next(function([batch.to(setup.device)]))
            gaps = [
                (view[:count].cpu().float() - true).abs()  # [count, 3, S, S]
                for view, true in zip(views, truth, strict=True)
            ]
            found[name] = {
                "normalised": max(float(gap.max()) for gap in gaps),
                "levels": max(float((gap * std).max()) for gap in gaps) * 255,
                "mean_levels": statistics.mean(float((gap * std).mean()) for gap in gaps) * 255,
            }
    return found


def summary(trials: Sequence[Trial], *, views: int) -> dict[str, Any]:
    """Rates of one implementation with `views` views an image, and the fraction of time in which the host queued."""
    shares = [trial.report["host_seconds"] / trial.report["seconds"] for trial in trials]
    return rates(trials, views=views) | {"host_share": statistics.median(shares)}


def body() -> int:
    """Run the command; returns the exit code: 1 if an implementation failed, whatever the others gave."""
    arguments = parse_arguments(Arguments, prog=PROG)
    result = measure(arguments, command=command_of(PROG, sys.argv[1:]))
    return finish(result, arguments.out, failed=bool(result["failed"]))


if __name__ == "__main__":
    run_cli(body)

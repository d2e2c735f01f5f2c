"""Images per second of the view engine against what else makes views: same images, same run, taking turns.

python -m benchmarks.bench_views DATA [--device cuda] [--dtype bfloat16] [--num-images 256] [--out results.json]

Decoding is not timed; the decoded images lie on the device. Contenders that can be told what to do get the same
decisions, and their views are compared with torchvision's on the CPU; DALI and kornia draw for themselves. What is
missing on this machine is left out with a line that says so. --out is rewritten after every round of turns, and
after --seconds nothing more is begun.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from benchmarks.contenders.views import CONTENDERS, MakeAll, Setup, decide, version
from benchmarks.measuring.command_line import finish, write_result
from benchmarks.measuring.timing import Times, drain, take_turns
from benchmarks.measuring.turns import Budget
from mvssl.runs.environment import environment
from pipelines.batch import DecodedBatch
from pipelines.decode import make_decoder
from pipelines.order import Order
from pipelines.runtime import InputError, invalid, run_cli
from pipelines.storage import open_source
from pipelines.views.presets import paper_views
from pipelines.views.spec import IMAGENET_STD

Name = Literal["fused", "native", "reference", "compiled", "torchvision", "dali", "kornia"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPARED = 16  # images whose views are compared with torchvision's


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time what makes views.

    Attributes:
        data: folder of images or converted data set.
        device: where the decoded images lie and the views are made.
        dtype: type of the views.
        contenders: who takes part; everyone who can if none is named.
        num_images: images of a batch.
        batches: batches of a turn, so that the next one is never in a cache already.
        threads: threads torch may use on the CPU, and those of DALI.
        repeats: turns each takes after a warm-up; the median counts.
        size: side of the global and cutout views in pixels.
        local_size: side of the local views in pixels.
        blur_kernel: taps of the blur.
        seconds: after which nothing more is begun; all that is wanted by default.
        out: JSON file, rewritten after every round of turns.
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
    seconds: float | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("num_images", "batches", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "1 or more", "give a larger number")


@dataclass(frozen=True, kw_only=True)
class Entrants:
    """Who takes part, warmed up.

    Attributes:
        functions: name and function of each.
        missing: name of each contender that this machine cannot run, and why.
        failed: name of each that ran and failed, and its error.
    """

    functions: dict[str, MakeAll]
    missing: dict[str, str]
    failed: dict[str, str]


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
            raise InputError(f"{source.key(int(index[position]))} cannot be decoded ({reason}): take it out.")
        batches.append(DecodedBatch.packed(decoded.pixels, sizes=decoded.sizes, index=index))
    decoder.close()
    source.close()
    return batches


def enter(names: Sequence[str], setup: Setup, batches: Sequence[DecodedBatch], *, budget: Budget) -> Entrants:
    """Build the contenders and let each make all views once; say on stderr who is left out, and why.

    The one that compiles is built last, as it takes longest.
    """
    entrants = Entrants(functions={}, missing={}, failed={})
    for name in sorted(names, key=lambda name: name == "compiled"):
        if budget.spent:
            entrants.missing[name] = budget.reason
            print(f"left out {name}: {budget.reason}", file=sys.stderr, flush=True)
            continue
        try:
            function = CONTENDERS[name].build(setup)
        except (InputError, ImportError) as error:
            entrants.missing[name] = str(error)
            print(f"left out {name}: {error}", file=sys.stderr)
            continue
        try:
            drain(function(batches))
            if setup.device.type == "cuda":
                torch.cuda.synchronize(setup.device)
        except Exception as error:  # whatever a peer raises must not cost the others' numbers
            entrants.failed[name] = f"{type(error).__name__}: {error}"
            print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        entrants.functions[name] = function
    return entrants


def differences(functions: dict[str, MakeAll], setup: Setup, batch: DecodedBatch) -> dict[str, dict[str, float]]:
    """How far the views of those who share decisions are from torchvision's on the CPU in float32.

    Args:
        functions: name and function of each contender.
        setup: what they share.
        batch: images on the CPU; the first `COMPARED` are looked at, in a batch of the full size.

    Returns:
        For each name `normalised`, the largest difference of a normalised value, and `levels` and `mean_levels`, the
        largest and the mean difference in units of 1/255. Empty without torchvision.
    """
    if version("torchvision") is None:
        print("left out the comparison of views: torchvision is not installed", file=sys.stderr)
        return {}
    from benchmarks.contenders.baselines.torchvision_views import torchvision_view

    params = decide(setup, batch)
    count = min(COMPARED, len(batch))
    std = torch.tensor(IMAGENET_STD)[:, None, None]  # [3, 1, 1]
    truth = [
        torch.stack([torchvision_view(batch.image(n), spec, params.view(v), n) for n in range(count)])
        for v, spec in enumerate(setup.specs)
    ]
    found = {}
    for name, function in functions.items():
        if CONTENDERS[name].shares_decisions:
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


def turn(function: MakeAll, batches: Sequence[DecodedBatch]) -> Callable[[], Iterator[list[Tensor]]]:
    """One turn of a contender: the views of all batches."""
    return lambda: function(batches)


def summary(times: Times, *, images: int, views: int) -> dict[str, Any]:
    """Rates of one contender from turns over `images` images with `views` views each."""
    rates = [images / seconds for seconds in times.seconds]
    return {
        "images_per_second": statistics.median(rates),
        "views_per_second": statistics.median(rates) * views,
        "spread": {"min": min(rates), "max": max(rates), "n": len(rates)},
        "host_share": statistics.median(
            host / whole for host, whole in zip(times.host_seconds, times.seconds, strict=True)
        ),
    }


def ratios(times: dict[str, Times], base: str) -> dict[str, dict[str, float]]:
    """How many times faster each other contender is than `base`, turn by turn."""
    result = {}
    for name, own in times.items():
        if name != base and base in times:
            each = [theirs / mine for mine, theirs in zip(own.seconds, times[base].seconds, strict=True)]
            result[name] = {"median": statistics.median(each), "min": min(each), "max": max(each), "n": len(each)}
    return result


def measure(arguments: Arguments) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values.

    Raises:
        InputError: there is no GPU or the data cannot be used.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda but torch finds no CUDA device here: take --device cpu.")
    budget = Budget(arguments.seconds)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    batches = load(arguments)
    setup = Setup(
        specs=paper_views(size=arguments.size, local_size=arguments.local_size, blur_kernel=arguments.blur_kernel),
        device=device,
        dtype=DTYPES[arguments.dtype],
        batch_size=arguments.num_images,
        threads=arguments.threads,
    )
    on_device = [batch.to(device) for batch in batches]
    with torch.inference_mode():
        entrants = enter(arguments.contenders or tuple(CONTENDERS), setup, on_device, budget=budget)
        gaps = differences(entrants.functions, setup, batches[0])
        turns = {name: turn(function, on_device) for name, function in entrants.functions.items()}
        times = {name: Times() for name in turns}
        result = told(arguments, batches, setup, entrants, times={}, gaps=gaps, unfinished=True)
        for done in range(arguments.repeats):
            if done > 0 and budget.spent:
                break
            for name, own in take_turns(turns, repeats=1, device=device).items():
                times[name].seconds.extend(own.seconds)
                times[name].host_seconds.extend(own.host_seconds)
            unfinished = done + 1 < arguments.repeats and not budget.spent
            result = told(arguments, batches, setup, entrants, times=times, gaps=gaps, unfinished=unfinished)
            write_result(arguments.out, result)
    return result


def told(
    arguments: Arguments,
    batches: Sequence[DecodedBatch],
    setup: Setup,
    entrants: Entrants,
    *,
    times: dict[str, Times],
    gaps: dict[str, dict[str, float]],
    unfinished: bool,
) -> dict[str, Any]:
    """The result of the turns so far."""
    images = arguments.num_images * len(batches)
    faster = ratios(times, "torchvision")
    pixels = torch.cat([batch.sizes for batch in batches]).prod(dim=1).double().mean()
    return {
        "benchmark": "views",
        "partial": unfinished,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "images": arguments.num_images,
        "batches": len(batches),
        "mean_megapixels": float(pixels) / 1e6,
        "views_per_image": len(setup.specs),
        "sizes": [spec.size for spec in setup.specs],
        "threads": arguments.threads,
        "contenders": {
            name: {
                "what": CONTENDERS[name].what,
                "shares_decisions": CONTENDERS[name].shares_decisions,
                **summary(own, images=images, views=len(setup.specs)),
                "times_torchvision": faster.get(name),
                "difference_from_torchvision_cpu": gaps.get(name),
            }
            for name, own in times.items()
        },
        "left_out": entrants.missing,
        "failed": entrants.failed,
        "environment": environment() | {"command": command(arguments), "kornia": version("kornia")},
    }


def command(arguments: Arguments) -> str:
    """The command that repeats this measurement, without paths of this machine."""
    chosen = "".join(f" {name}" for name in arguments.contenders)
    return (
        f"python -m benchmarks.bench_views {arguments.data.name} --device {arguments.device} "
        f"--dtype {arguments.dtype} --num-images {arguments.num_images} --batches {arguments.batches} "
        f"--threads {arguments.threads} --repeats {arguments.repeats} --size {arguments.size} "
        f"--local-size {arguments.local_size} --blur-kernel {arguments.blur_kernel}"
        + (f" --contenders{chosen}" if chosen else "")
    )


def body() -> int:
    """Run the command; returns the exit code: 1 if a contender failed, whatever the others have given."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.bench_views")
    result = measure(arguments)
    return finish(result, arguments.out, failed=bool(result["failed"]))


if __name__ == "__main__":
    run_cli(body)

"""Where a result is from: machine, versions, turns and command, in the line below its table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
"""What a benchmark's JSON file holds."""

Results = Mapping[str, Result]
"""Results by the name of their file without suffix; those that are missing are not in it."""

FOLDER = "results"  # as benchmarks/MEASURED.md links to it
Sides = Mapping[str, str]
"""What stands side by side or one below the other, and the name of its result."""

NOT_YET = "not measured yet"
SUITE = "benchmarks/gpu_suite.sh"
MADE_BY = {
    "views_cpu": "python -m benchmarks.bench_views DATA",
    "views_cuda_bfloat16": SUITE,
    "views_cuda_float32": SUITE,
    "draws_cpu": "python -m benchmarks.bench_draw",
    "loader_cpu": "python -m benchmarks.bench_loader FOLDER SHARDS BETON",
    "loader_tiny_cpu": "python -m benchmarks.bench_loader TINY_IMAGENET --cache",
    "loader_cold_cpu": "python -m benchmarks.bench_loader FOLDER SHARDS BETON --cold",
    "lock_cpu": "python -m benchmarks.bench_lock DATA --other CHECKOUT",
    "lock_tiny_cpu": "python -m benchmarks.bench_lock TINY_IMAGENET --other CHECKOUT",
    "loader_cuda": SUITE,
    "loader_tiny_cuda": SUITE,
    "train_cpu": "python -m benchmarks.bench_train DATA",
    "train_cuda": SUITE,
    "step_cpu": "python -m benchmarks.bench_step",
    "step_cuda": SUITE,
    "steps_cuda": SUITE,
    "start_cpu": "python -m benchmarks.bench_start",
    "start_cuda": SUITE,
    "paper_small_cpu": "python -m benchmarks.paper_small TINY_IMAGENET",
    "paper_small_cpu_release": "python -m benchmarks.paper_small TINY_IMAGENET --setting cpu_release --methods byol",
    "paper_small_gpu": "python -m benchmarks.paper_small TINY_IMAGENET --setting gpu",
    "evaluation_cpu": "python -m benchmarks.evaluate_small TINY_IMAGENET --out FOLDER",
    "linear_cpu": "python -m benchmarks.bench_linear TRAIN.npy VAL.npy",
    "tune_fused": SUITE,
    **{
        f"compile_{recipe}_{target}".replace("sm_", "sm"): (
            f"python -m benchmarks.bench_compile {recipe} --batch-size {images} --target {target}"
        )
        for recipe, images, target in (
            ("byol_resnet50_200ep", 128, "sm_90"),
            ("byol_resnet50_200ep", 128, "sm_80"),
            ("byol_resnet50_200ep", 128, "sm_100"),
            ("byol_vits16_200ep", 128, "sm_90"),
            ("byol_vitb16_200ep", 128, "sm_90"),
            ("laptop", 64, "sm_90"),
        )
    },
}
"""The results that tables are made of, and the command that makes each."""


def origin(results: Results, name: str, what: str, settings: Sequence[str] = (), *, folder: str) -> str:
    """The line about one result, an item of a list.

    Args:
        results: all results.
        name: of this one.
        what: it says, e.g. "GPU".
        settings: what else a reader needs to know, in a few words each.
        folder: of the results, as a link from the file that the line is for.
    """
    result = results.get(name)
    if result is None:
        return f"- {what}: {NOT_YET} (`{MADE_BY[name]}`)."
    count = turns(result)
    taken = [f"median of {count} turns (min\N{EN DASH}max)" if count > 1 else "one turn"] if count else []
    packages = result["environment"]["packages"]
    versions = [f"{package} {packages[package]}" for package in ("torch", "torchvision") if package in packages]
    said = ", ".join([machine(result), *versions, *settings, *taken])
    return f"- [{what}]({folder}/{name}.json): {said}: `{command(result)}`"


def origins(
    results: Results, sides: Sides, settings: Callable[[Result], list[str]], *, folder: str = FOLDER
) -> list[str]:
    """A line for each side that says where it is from, with the settings that a reader needs to know."""
    return [
        origin(results, name, side, settings(results[name]) if name in results else (), folder=folder)
        for side, name in sides.items()
    ]


def machine(result: Result) -> str:
    """Its processor and, if it computed there, its GPU, as far as the result tells."""
    environment = result["environment"]
    on_gpu = result.get("device", "cuda") == "cuda"
    gpu = environment["gpus"][:1] if on_gpu else []
    return ", ".join([*gpu, f"{environment['cores']} cores ({environment.get('processor') or environment['machine']})"])


def turns(result: Result) -> int:
    """Turns that each contender took, which is one number for all; 0 where there are none."""
    return max((own["spread"]["n"] for own in result.get("contenders", {}).values()), default=0)


def command(result: Result) -> str:
    """The command that made it."""
    return str(result["environment"]["command"])

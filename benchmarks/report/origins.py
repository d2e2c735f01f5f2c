"""All results and their origins: file, machine, versions, trials and command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.results import Result, read_results
from pipelines.runtime import InputError

FOLDER = "benchmarks/results"
Results = Mapping[str, Result]
"""Results by name: of their file without suffix, or of a line in compile.jsonl. Missing ones are not in it."""

Sides = Mapping[str, str]
"""Name of a result by the row label or column title of its numbers."""

NOT_YET = "not measured yet"
SUITE = "benchmarks/gpu_suite.sh"
COMPILED = (
    ("byol_resnet50_200ep", 128, "sm_90"),
    ("byol_resnet50_200ep", 128, "sm_80"),
    ("byol_resnet50_200ep", 128, "sm_100"),
    ("byol_vits16_200ep", 128, "sm_90"),
    ("byol_vitb16_200ep", 128, "sm_90"),
    ("laptop", 64, "sm_90"),
)
"""Recipe, batch size and target of the results of bench_compile."""


def compiled_name(recipe: str, target: str) -> str:
    """Name of a result of bench_compile."""
    return f"compile_{recipe}_{target.replace('_', '')}"


MADE_BY = {
    "views_cpu": "python -m benchmarks.bench_views DATA",
    "views_cuda_bfloat16": SUITE,
    "views_cuda_float32": SUITE,
    "draws_cpu": "python -m benchmarks.bench_micro sampling",
    "loader_cpu": "python -m benchmarks.bench_loader FOLDER SHARDS BETON",
    "loader_tiny_cpu": "python -m benchmarks.bench_loader TINY_IMAGENET --cache",
    "peers_cpu": "python -m benchmarks.bench_loader FOLDER --peers",
    "loader_cold_cpu": "python -m benchmarks.bench_loader FOLDER SHARDS BETON --cold",
    "lock_cpu": "python -m benchmarks.bench_micro gil DATA --other CHECKOUT",
    "lock_tiny_cpu": "python -m benchmarks.bench_micro gil TINY_IMAGENET --other CHECKOUT",
    "loader_cuda": SUITE,
    "loader_tiny_cuda": SUITE,
    "train_cpu": "python -m benchmarks.bench_train DATA",
    "train_cuda": SUITE,
    "step_cpu": "python -m benchmarks.bench_step",
    "step_peers_cpu": "python -m benchmarks.bench_step --contenders 'plain step' grouped lightly stable-pretraining",
    "step_cuda": SUITE,
    "steps_cuda": SUITE,
    "start_cpu": "python -m benchmarks.bench_start",
    "start_cuda": SUITE,
    "neighbour_cpu": "python -m benchmarks.bench_neighbour",
    "paper_small_cpu": "python -m benchmarks.paper_small TINY_IMAGENET",
    "paper_small_cpu_release": "python -m benchmarks.paper_small TINY_IMAGENET --setting cpu_release --methods byol",
    "paper_small_gpu": "python -m benchmarks.paper_small TINY_IMAGENET --setting gpu",
    "evaluation_cpu": "python -m benchmarks.evaluate_small TINY_IMAGENET --out FOLDER",
    "faults_cpu": "python -m benchmarks.bench_faults",
    "memory_cpu": "python -m benchmarks.bench_memory",
    "remote_cpu": "python -m benchmarks.bench_remote",
    "formats_cpu": "python -m benchmarks.bench_formats",
    "linear_cpu": "python -m benchmarks.bench_micro linear TRAIN.npy VAL.npy",
    "tune_fused": SUITE,
    **{
        compiled_name(recipe, target): (
            f"python -m benchmarks.bench_compile {recipe} --batch-size {images} --target {target}"
        )
        for recipe, images, target in COMPILED
    },
}
"""The results that tables are made of, and the command that makes each."""

RENAMED = {
    "benchmarks.bench_draw": "benchmarks.bench_micro sampling",
    "benchmarks.bench_lock": "benchmarks.bench_micro gil",
    "benchmarks.bench_linear": "benchmarks.bench_micro linear",
    "benchmarks.tune_fused": "benchmarks.bench_micro fused",
}
"""Commands that results name, by what they are called today."""


def load(root: Path) -> dict[str, Any]:
    """All results of the repository at `root`, by name.

    The lines of compile.jsonl are results of their own. Any other .jsonl file is one result with its lines as "cells".

    Raises:
        InputError: a file is not JSON, or not a result.
    """
    results: dict[str, Any] = {}
    for path in sorted((root / FOLDER).glob("*.json*")):
        try:
            rows = [row | {"file": path.name} for row in read_results(path)]
            if not rows:
                raise ValueError("is empty")
            if path.name == "compile.jsonl":
                results |= {compiled_name(row["recipe"], row["target"]): row for row in rows}
            elif path.suffix == ".jsonl":
                about = rows[0]["environment"] | {"command": MADE_BY.get(path.stem, "")}
                results[path.stem] = {"cells": rows, "environment": about, "file": path.name}
            else:
                results[path.stem] = rows[0]
        except KeyError as error:
            raise broken(path.name, f"does not hold results (it lacks {error})") from error
        except ValueError as error:
            raise broken(path.name, str(error)) from error
    return results


def broken(file: str, problem: str) -> InputError:
    """The error of a damaged file of results."""
    made_by = MADE_BY.get(Path(file).stem)
    again = f", or measure it again with {made_by}" if made_by else ", or remove it"
    return InputError(f"{FOLDER}/{file} {problem}: restore it with git checkout{again}.")


def origin(results: Results, name: str, what: str, settings: Sequence[str] = (), *, link: str = "results") -> str:
    """The line about one result, an item of a list.

    Args:
        results: all results.
        name: of this one.
        what: its label, e.g. "GPU".
        settings: what else a reader needs to know, in a few words each.
        link: to the folder of results from the file with the line.
    """
    result = results.get(name)
    if result is None:
        return f"- {what}: {NOT_YET} (`{MADE_BY[name]}`)."
    count = num_trials(result)
    trials = [f"median of {count} trials (min\N{EN DASH}max)" if count > 1 else "one trial"] if count else []
    packages = result["environment"]["packages"]
    versions = [f"{package} {packages[package]}" for package in ("torch", "torchvision") if package in packages]
    said = ", ".join([machine(result), *versions, *settings, *trials])
    return f"- [{what}]({link}/{file_of(results, name)}): {said}: `{command(result)}`"


def origins(
    results: Results, sides: Sides, settings: Callable[[Result], list[str]], *, link: str = "results"
) -> list[str]:
    """A line for the origin of each side, with the settings that a reader needs to know."""
    return [
        origin(results, name, side, settings(results[name]) if name in results else (), link=link)
        for side, name in sides.items()
    ]


def file_of(results: Results, name: str) -> str:
    """The file of a result."""
    return str(results.get(name, {}).get("file", f"{name}.json"))


def machine(result: Result) -> str:
    """Its processor and, if it computed there, its GPU."""
    environment = result["environment"]
    on_gpu = result.get("device", "cuda") == "cuda"
    gpu = environment["gpus"][:1] if on_gpu else []
    return ", ".join([*gpu, f"{environment['cores']} cores ({environment.get('processor') or environment['machine']})"])


def num_trials(result: Result) -> int:
    """Trials of each implementation; 0 if there are none."""
    return max((own["spread"]["n"] for own in result.get("contenders", {}).values()), default=0)


def command(result: Result) -> str:
    """The command that made it, by its name of today."""
    said = str(result["environment"]["command"])
    for old, new in RENAMED.items():
        said = said.replace(old, new)
    return said

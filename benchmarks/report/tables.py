"""The tables of measured numbers: each function takes all results by name and returns Markdown lines.

A missing result leaves its cells blank or gives a row that says so. Numbers are those of the benchmarks, rounded.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.harness.results import Result
from benchmarks.implementations.steps import OURS, PLAIN
from benchmarks.report.cells import count, implementations, memory_cell, rate_cell, ratio_cell, stacked
from benchmarks.report.data_tables import LOADERS
from benchmarks.report.markdown import percent, significant, table, with_spread
from benchmarks.report.origins import (
    MADE_BY,
    NOT_YET,
    Results,
    command,
    file_of,
    machine,
    num_trials,
    origins,
)

# Headlines and overview


def headlines(results: Results) -> list[str]:
    """The ratios that matter, CPU next to GPU."""

    def times(name: str, *path: str) -> str:
        """A ratio in a result, by the keys that lead to it."""
        value: Any = results.get(name, {})
        for key in path:
            value = value.get(key) or {}
        return f"{significant(value['median'])} times" if value else NOT_YET

    def wait(name: str) -> str:
        own = results.get(name, {}).get("contenders", {}).get("mvssl") or {}
        return percent(own["data_wait"]) if "data_wait" in own else NOT_YET

    def loading(name: str, usual: str, *, suffix: str = "") -> str:
        """Our loader's rate over the DataLoader's; with its name if it is not the usual one."""
        ratios = results.get(name, {}).get("times_dataloader", {})
        found = next((loader for loader in (usual, *LOADERS) if loader + suffix in ratios), usual)
        said = times(name, "times_dataloader", found + suffix)
        return said if found == usual else f"{said} ({found})"

    def step(name: str) -> str:
        """Our step's rate over the plain step's in the first recipe: captured, else compiled."""
        recipes = results.get(name, {}).get("recipes", [])
        ratios: dict[str, Any] = recipes[0]["times_plain"] if recipes else {}
        found = next((mode for mode in OURS if mode in ratios), None)
        return NOT_YET if found is None else f"{significant(ratios[found]['median'])} times ({found})"

    views, train = ("contenders", "times_torchvision"), "times_plain_with_dataloader"
    shards, folder, cached = "shards + dali", "folder + dali", ", kept"
    rows = [
        ["the step alone, on noise, against a plain eager step", step("step_cpu"), step("step_cuda")],
        [
            "the five views of photos, against torchvision",
            times("views_cpu", views[0], "native", views[1]),
            times("views_cuda_bfloat16", views[0], "fused", views[1]),
        ],
        [
            "reading, decoding and views of photos, against a DataLoader with torchvision",
            loading("loader_cpu", shards),
            loading("loader_cuda", shards),
        ],
        [
            "the same from the second epoch on, with `--cache`",
            loading("loader_cpu", shards, suffix=cached),
            loading("loader_cuda", shards, suffix=cached),
        ],
        [
            "the same of 64-pixel images",
            loading("loader_tiny_cpu", folder, suffix=cached),
            loading("loader_tiny_cuda", folder, suffix=cached),
        ],
        ["training, against a plain step with that DataLoader", times("train_cpu", train), times("train_cuda", train)],
        ["share of the time that training waits for data", wait("train_cpu"), wait("train_cuda")],
    ]
    return table(["what", "2 CPU cores", "GPU"], rows)


def overview(results: Results) -> list[str]:
    """Every result: its file, machine, versions and command."""
    rows = []
    for name in dict.fromkeys([*MADE_BY, *results]):
        if name in results:
            result = results[name]
            file, torch = file_of(results, name), result["environment"]["packages"]["torch"]
            label = file if file.startswith(name) else name
            link = f"[`{label}`](results/{file})"
            rows.append([link, machine(result), torch, str(num_trials(result) or ""), f"`{command(result)}`"])
        else:
            rows.append([f"`{name}`", NOT_YET, "", "", f"`{MADE_BY[name]}`"])
    return table(["result", "machine", "torch", "trials", "command"], rows, words=5)


# Training


def train(results: Results) -> list[str]:
    """Implementations of bench_train and the ratios that matter."""
    sides = {"CPU": "train_cpu", "GPU": "train_cuda"}

    def rows_of(result: Result) -> list[list[str]]:
        rows = []
        for name in implementations(result):
            own = result["contenders"].get(name)
            fields = ("data_wait", "device_idle", "launching")
            shares = [percent(own[field]) if own and field in own else "" for field in fields]
            rows.append([name, rate_cell(own), *shares, memory_cell(own)])
        return rows

    ratios = {
        "Loaded over synthetic input": "loaded_over_synthetic",
        "the same of the plain step with a DataLoader": "plain_loaded_over_synthetic",
        "mvssl over the plain step with a DataLoader": "times_plain_with_dataloader",
    }
    measured = {side: results[name] for side, name in sides.items() if name in results}
    sentences = [
        f"{what}: "
        + ", ".join(f"{side} {ratio_cell(result[field]) or 'not measured'}" for side, result in measured.items())
        for what, field in ratios.items()
    ]
    heads = ["implementation", "source images/s", "wait for data", "GPU idle", "of it launching", "memory, MiB"]
    return [
        *stacked(results, sides, heads, rows_of),
        "",
        *(["; ".join(sentences) + ".", ""] if measured else []),
        *origins(results, sides, _train_settings),
    ]


def _train_settings(result: Result) -> list[str]:
    recipe = result["recipe"]
    return [f"`{recipe['name']}`", recipe["backbone"]["name"], f"batch {recipe['batch_size']}"]


def step(results: Results) -> list[str]:
    """Implementations of bench_step: each recipe at each batch size."""
    sides = {"CPU": "step_cpu", "CPU, peers": "step_peers_cpu", "GPU": "step_cuda", "GPU, more": "steps_cuda"}
    heads = [
        "recipe",
        "implementation",
        "source images/s",
        "times the plain step",
        "launches",
        "kernels",
        "kernels, predicted",
        "MB an image, predicted",
        "host, ms",
        "device, ms of a step's",
        "predicted, ms",
        "TFLOP/s",
        "of the peak",
        "with the loader",
        "memory, MiB",
    ]

    def rows_of(result: Result) -> list[list[str]]:
        return [
            [f"{one['recipe']['name']}, batch {one['batch_size']}", name, *_step_cells(one, name)]
            for one in result["recipes"]
            for name in implementations(one)
        ]

    return [*stacked(results, sides, heads, rows_of, words=3), "", *origins(results, sides, _step_settings)]


def _step_cells(measured: Result, name: str) -> list[str]:
    """Cells of one implementation of bench_step."""
    own = measured["contenders"].get(name)
    if own is None:
        return ["failed"]
    busy, loaded = own["busy_milliseconds"], measured["with_loader"].get(name)
    compiled = name in OURS and OURS[name].compile == "on"
    expected = (measured.get("predicted") or {}) if compiled else {}
    same_batch = expected.get("batch_size", measured["batch_size"]) == measured["batch_size"]
    return [
        rate_cell(own),
        "1" if name == PLAIN else ratio_cell(measured["times_plain"].get(name)),
        count(own["launches"]),
        count(own.get("kernels")),
        count(expected.get("launches")),
        significant(expected.get("megabytes_per_image")),
        significant(own["host_milliseconds"]),
        "" if busy is None else f"{significant(busy)} of {significant(own['milliseconds'])}",
        significant(expected.get("predicted_milliseconds") if same_batch else None),
        significant(own["tflops"]),
        "" if own["share_of_peak"] is None else percent(own["share_of_peak"]),
        "" if loaded is None else percent(loaded["over_alone"]["median"]),
        memory_cell(own),
    ]


def _step_settings(result: Result) -> list[str]:
    """Steps of a trial, trials, and what the peak is."""
    trials = max(map(num_trials, result["recipes"]), default=0)
    said = [f"{result['steps']} steps a trial", f"median of {trials} trials"]
    for measured in result["recipes"]:
        if (peak := measured["matrix_product"]) is not None:
            kind = peak["dtype"].removeprefix("torch.")
            product = f"a product of matrices of {peak['side']:,} x {peak['side']:,} in {kind}"
            return [*said, f"peak {significant(peak['tflops'])} TFLOP/s: {product}"]
    return said


def start(results: Results) -> list[str]:
    """Kinds of starts of bench_start."""
    sides = {"CPU": "start_cpu", "GPU": "start_cuda"}
    phases = ("training_after", "imports", "build", "first_step", "later_step")

    def rows_of(result: Result) -> list[list[str]]:
        return [[kind, *(significant(own[phase]) for phase in phases)] for kind, own in result["starts"].items()]

    heads = ["start", "training after, s", "imports", "building", "first step", "a later step"]
    return [*stacked(results, sides, heads, rows_of), "", *origins(results, sides, _train_settings)]


def neighbour(results: Results) -> list[str]:
    """Training beside a busy process in bench_neighbour."""
    name = "neighbour_cpu"
    rows = []
    for what, settings in results.get(name, {"implementations": {}})["implementations"].items():
        for setting, rates in settings.items():
            alone, busy = (median(rates[beside]) for beside in ("alone", "busy"))
            spread = {b: f"{significant(min(rates[b]))} to {significant(max(rates[b]))}" for b in rates}
            waiting = "as the commands set it" if setting == "set" else "the default of libgomp"
            rows.append(
                [
                    f"{what}, {waiting}",
                    f"{significant(alone)} ({spread['alone']})",
                    f"{significant(busy)} ({spread['busy']})",
                    f"{busy / alone:.2f}",
                    f"{alone / median(settings['default']['alone']):.2f}",
                ]
            )
    heads = ["images/s of the demo", "alone", "beside one busy process", "of its rate alone", "alone, of the default's"]
    return [*table(heads, rows), "", *origins(results, {"CPU": name}, _neighbour_settings)]


def _neighbour_settings(result: Result) -> list[str]:
    return [f"GOMP_SPINCOUNT={result['spins']} or 300000", f"{result['seconds']} s each"]


# Accuracy


def evaluation(results: Results) -> list[str]:
    """Accuracies of evaluate_small for each network."""
    name = "evaluation_cpu"
    heads = {"knn": "kNN, k = 20", "linear": "linear, fast", "release": "linear, release", "finetune": "10 % of labels"}
    rows = [
        [network, *(_accuracy(measured.get(evaluation)) for evaluation in heads)]
        for network, measured in results.get(name, {"rows": {}})["rows"].items()
    ]
    about = origins(results, {"CPU": name}, _evaluation_settings, link="../../benchmarks/results")
    return [*table(["network", *heads.values()], rows), "", *about]


def _accuracy(measured: Result | None) -> str:
    """Top-1 in percent with its 95 % interval."""
    if measured is None:
        return ""
    low, high = (100 * end for end in measured["interval"])
    return f"{100 * measured['top1']:.1f} % ({low:.1f} to {high:.1f})"


def _evaluation_settings(result: Result) -> list[str]:
    setting = result["settings"]
    return [
        f"ResNet-18, images of {setting['size']} px",
        f"pre-trained by {result['recipe']}",
        f"supervised for {setting['supervised_epochs']} epochs",
        f"the release's probe for {setting['release_epochs']} epochs instead of 100",
        f"fine-tuned for {setting['finetune_epochs']}",
        "95 % intervals",
    ]


# Reliability


def faults(results: Results) -> list[str]:
    """Faults tried and failures of bench_faults for each command."""
    name = "faults_cpu"
    rows = [
        [
            row["command"],
            f"{row['operations']:,}",
            *(f"{tried['tried']:,}, {tried['failed']:,} failed" for tried in row["faults"].values()),
        ]
        for row in results.get(name, {"commands": []})["commands"]
    ]
    heads = ["command", "file operations", "kill -9", "full disk", "read-only disk"]
    about = origins(results, {"CPU": name}, lambda _: [], link="../../benchmarks/results")
    return [*table(heads, rows), "", *about]


def memory(results: Results) -> list[str]:
    """Growth of a long training's memory."""
    name = "memory_cpu"
    rows = []
    if name in results:
        result = results[name]
        first, last = result["samples"][0], result["samples"][-1]
        growth = f"{result['mib_per_100_epochs']:.2f}"
        rows.append([f"{result['epochs']:,}", f"{first[1]:.0f}", f"{last[1]:.0f}", growth])
    heads = ["epochs", "MiB at the first sample", "MiB at the last", "MiB per 100 epochs, second half"]
    about = origins(results, {"CPU": name}, lambda _: [], link="../../benchmarks/results")
    return [*table(heads, rows), "", *about]


def linear(results: Results) -> list[str]:
    """Classifiers of `bench_micro linear`."""
    name = "linear_cpu"
    rows = [
        [
            classifier,
            with_spread(own["seconds"], own["spread"]),
            significant(own["times_one_setting"]),
            f"{100 * own['top1']:.1f} %",
        ]
        for classifier, own in results.get(name, {}).get("contenders", {}).items()
    ]
    return [
        *table(["classifier", "seconds", "times one setting", "top-1"], rows),
        "",
        *origins(results, {"CPU": name}, lambda result: [f"{result['settings']} settings, {result['epochs']} epochs"]),
    ]

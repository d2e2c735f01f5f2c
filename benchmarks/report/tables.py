"""The tables of measured numbers: each function takes all results by name and returns Markdown lines.

A missing result leaves its cells blank or gives a row that says so. Numbers are those of the benchmarks, rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from statistics import median
from typing import Any

from benchmarks.bench_loader import BASELINE
from benchmarks.compiled import view_kernels as kernels
from benchmarks.harness.results import Result
from benchmarks.implementations.steps import OURS, PLAIN
from benchmarks.implementations.views import IMPLEMENTATIONS
from benchmarks.report.markdown import percent, scientific, significant, table, with_spread
from benchmarks.report.origins import (
    MADE_BY,
    NOT_YET,
    Results,
    Sides,
    command,
    file_of,
    machine,
    num_trials,
    origin,
    origins,
)

LOADERS = tuple(
    f"{storage} + {decoder}"
    for storage, decoder in product(("shards", "folder", "beton"), ("dali", "auto", "pillow", "ffcv"))
)
"""Our loaders in bench_loader; the first one that a result has is shown in the headlines."""


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


# Cells that all interleaved benchmarks have alike


def implementations(result: Result) -> list[str]:
    """All that took part, whether they failed or not."""
    return list(dict.fromkeys([*result.get("contenders", {}), *result.get("failed", {})]))


def stacked(
    results: Results,
    sides: Sides,
    heads: Sequence[str],
    rows_of: Callable[[Result], list[list[str]]],
    *,
    words: int = 2,
    label: str = "on",
) -> list[str]:
    """A table with the rows of each side one below the other, and one row for a side without a result."""
    rows: list[list[str]] = []
    for side, name in sides.items():
        rows += [[side, *row] for row in rows_of(results[name])] if name in results else [[side, NOT_YET]]
    return table([label, *heads], rows, words=words)


def _rate(own: Result | None) -> str:
    return "failed" if own is None else with_spread(own["images_per_second"], own["spread"])


def _views_rate(own: Result | None) -> str:
    return "" if own is None else significant(own["views_per_second"])


def _ratio(ratio: Result | None) -> str:
    return "" if ratio is None else with_spread(ratio["median"], ratio)


def _memory(own: Result | None) -> str:
    """Peak of the processes, shared pages counted once, and of the GPU; blank if the system does not report it."""
    host = 0 if own is None else own["peak_memory_mib"]["pss"]
    parts = [significant(host)] if host else []
    if own is not None and "device_mib" in own:
        parts.append(f"{significant(own['device_mib'])} on the GPU")
    return " + ".join(parts)


def count(value: float | None) -> str:
    return f"{value:,.0f}" if value else ""


# Views


def views(results: Results) -> list[str]:
    """Implementations of bench_views, on the CPU next to the GPU."""
    sides = {"CPU": "views_cpu", "GPU": "views_cuda_bfloat16"}
    order = {name: number for number, name in enumerate(IMPLEMENTATIONS)}
    names = {name for side in sides.values() for name in implementations(results.get(side, {}))}
    rows = [
        [name, *(cell for side in sides.values() for cell in _view_rates(results.get(side, {}), name))]
        for name in sorted(names, key=lambda name: order.get(name, len(order)))
    ]
    heads = [f"{side}: {head}" for side in sides for head in ("source images/s", "views/s", "times torchvision")]
    return [*table(["implementation", *heads], rows), "", *origins(results, sides, _views_settings)]


def views_details(results: Results) -> list[str]:
    """All numbers of bench_views on speed and differences, in every type."""

    def rows_of(result: Result) -> list[list[str]]:
        rows = []
        for name in implementations(result):
            own = result["contenders"].get(name, {})
            difference = own.get("difference_from_torchvision_cpu")
            cells = [percent(own["host_share"])] if own else []
            cells += [scientific(difference["normalised"]), scientific(difference["levels"])] if difference else []
            rows.append([name, *_view_rates(result, name), *cells])
        return rows

    sides = {"CPU, float32": "views_cpu", "GPU, bfloat16": "views_cuda_bfloat16", "GPU, float32": "views_cuda_float32"}
    heads = ["source images/s", "views/s", "times torchvision", "host share", "largest difference", "in 1/255"]
    return stacked(results, sides, ["implementation", *heads], rows_of)


def view_kernels(results: Results) -> list[str]:
    """Bytes of the fused engine's kernels, with the times of `bench_micro fused`."""
    measured = {}
    if "tune_fused" in results:
        images = results["tune_fused"]["images"]
        own = results["tune_fused"]["kernels"].items()
        measured = {name: 1e3 * kernel["now"]["milliseconds"] / images for name, kernel in own}
    return [*kernels.table(kernels.Arguments(), measured=measured), "", origin(results, "tune_fused", "Times")]


def _views_settings(result: Result) -> list[str]:
    count = result["threads"]
    threads = ["one thread" if count == 1 else f"{count} threads"] if result["device"] == "cpu" else []
    return [result["dtype"], *threads, f"photos of {significant(result['mean_megapixels'])} megapixels"]


def _view_rates(result: Result, name: str) -> list[str]:
    """Cells of one implementation of bench_views; blank if it did not take part."""
    if name in result.get("failed", {}):
        return ["failed", "", ""]
    own = result.get("contenders", {}).get(name)
    if own is None:
        return ["", "", ""]
    return [_rate(own), _views_rate(own), "1" if name == "torchvision" else _ratio(own["times_torchvision"])]


# Loading


def loader(results: Results) -> list[str]:
    """Implementations of bench_loader, with the files in memory."""
    sides = {
        "CPU": "loader_cpu",
        "CPU, 64 px": "loader_tiny_cpu",
        "GPU": "loader_cuda",
        "GPU, 64 px": "loader_tiny_cuda",
    }
    return _loaders(results, sides)


def loader_cold(results: Results) -> list[str]:
    """The same with the files dropped from the page cache before each trial."""
    return _loaders(results, {"CPU": "loader_cold_cpu"})


def peers(results: Results) -> list[str]:
    """Loaders of other libraries in bench_loader, for the same five views, by CPU time."""
    return _peers(results, details=False, link="benchmarks/results")


def peers_details(results: Results) -> list[str]:
    """The same with rates, versions and what each library's views are."""
    return _peers(results, details=True, link="results")


def _peers(results: Results, *, details: bool, link: str) -> list[str]:
    name = "peers_cpu"
    result = results.get(name, {})
    measured: dict[str, Any] = result.get("contenders", {})
    ours = next((own for own in LOADERS if own in measured), None)
    names = {ours: "mvssl", BASELINE: "torchvision, as the reference implementation"}
    rows = []
    for own, row in measured.items():
        milliseconds = row["cpu_milliseconds"]
        cells = [names.get(own, own), row.get("version", "")] if details else [names.get(own, own)]
        times = "1" if own == ours else _ratio(row["times_cpu"])
        cells += [with_spread(milliseconds["median"], milliseconds), times]
        said = "" if own in (ours, BASELINE) else row.get("what", "")
        rows.append([*cells, _rate(row), said or "the same views"] if details else cells)
    for own, reason in (result.get("left_out", {}) | result.get("failed", {})).items():
        rows.append([own, *([""] if details else []), f"not measured: {reason.partition(':')[0]}"])
    heads = ["loader", *(["version"] if details else []), "CPU time per image, ms", "times mvssl's"]
    heads += ["source images/s", "its views"] if details else []
    about = origins(results, {"CPU": name}, _loader_settings, link=link)
    return [*table(heads, rows or [[NOT_YET]], words=2 if details else 1), "", *about]


def _loaders(results: Results, sides: Sides) -> list[str]:
    def rows_of(result: Result) -> list[list[str]]:
        rows = []
        for name in implementations(result):
            own = result["contenders"].get(name)
            times = "1" if name == BASELINE and own else _ratio(result["times_dataloader"].get(name))
            rows.append([name, _rate(own), _views_rate(own), _memory(own), times])
        return rows

    heads = ["implementation", "source images/s", "views/s", "memory, MiB", "times the DataLoader"]
    return [*stacked(results, sides, heads, rows_of), "", *origins(results, sides, _loader_settings)]


def _loader_settings(result: Result) -> list[str]:
    shown = [f"{result['images']:,} images of {significant(result['mean_kilobytes'])} KB"]
    shown += [result["disk"]] if result.get("disk") else []
    if result["cold"]:
        cached = max((own.get("cached_share_before_turns", 0) for own in result["contenders"].values()), default=0)
        shown.append(f"at most {percent(cached)} of the files in memory before a trial")
    return shown


def gil(results: Results) -> list[str]:
    """Numbers of `bench_micro gil` for this loader, and for an earlier one."""
    sides = {"CPU": "lock_cpu", "CPU, 64 px": "lock_tiny_cpu"}
    names = {"this": "now", "other": "before"}

    def rows_of(result: Result) -> list[list[str]]:
        return [
            [names[name], with_spread(own["lost_milliseconds"], own["spread"]), significant(own["images_per_second"])]
            for name, own in result["contenders"].items()
        ]

    lines = stacked(results, sides, ["loader", "lost a batch, ms", "source images/s meanwhile"], rows_of)
    settings = origins(results, sides, lambda result: [f"batch {result['batch_size']}, views of {result['size']} px"])
    return [*lines, "", *settings]


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
            rows.append([name, _rate(own), *shares, _memory(own)])
        return rows

    ratios = {
        "Loaded over synthetic input": "loaded_over_synthetic",
        "the same of the plain step with a DataLoader": "plain_loaded_over_synthetic",
        "mvssl over the plain step with a DataLoader": "times_plain_with_dataloader",
    }
    measured = {side: results[name] for side, name in sides.items() if name in results}
    sentences = [
        f"{what}: "
        + ", ".join(f"{side} {_ratio(result[field]) or 'not measured'}" for side, result in measured.items())
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
        _rate(own),
        "1" if name == PLAIN else _ratio(measured["times_plain"].get(name)),
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
        _memory(own),
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


def formats(results: Results) -> list[str]:
    """Conversion of the forms of bench_formats."""
    name = "formats_cpu"
    rows = [
        [
            form,
            with_spread(
                own["images_per_second"], {"min": own["least"], "max": own["most"], "n": results[name]["repeats"]}
            ),
            significant(own["times_folder"]),
            significant(own["cpu_ms"]),
            f"{own['peak_mib']:.0f}",
        ]
        for form, own in results.get(name, {"forms": {}})["forms"].items()
    ]
    heads = ["form", "images/s", "times the folder", "CPU-ms an image", "peak memory, MiB"]
    return [*table(heads, rows), "", *origins(results, {"CPU": name}, _formats_settings)]


def _formats_settings(result: Result) -> list[str]:
    return [f"{result['images']:,} images of {result['side']} pixels", f"{result['workers']} threads"]


def remote(results: Results) -> list[str]:
    """Reading from a server of bench_remote."""
    name = "remote_cpu"
    kinds = ("first epoch", "second epoch", "no cache", "no cache, order-chunk")
    rows = [
        [f"{latency} ms", *(significant(rates[kind]) for kind in ("local", *kinds))]
        for latency, rates in results.get(name, {"latencies": {}})["latencies"].items()
    ]
    heads = [
        "latency of a request",
        "local disk",
        "first epoch",
        "second epoch",
        "no cache",
        "no cache, `--order-chunk 16`",
    ]
    return [*table(heads, rows), "", *origins(results, {"CPU": name}, _remote_settings)]


def _remote_settings(result: Result) -> list[str]:
    size, connections = result["bytes_per_image"] / 1000, result["connections"]
    return [
        f"{result['images']:,} images of {size:.0f} kB",
        f"batch {result['batch_size']}",
        f"{connections} connections",
    ]


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

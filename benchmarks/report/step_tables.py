"""Tables of training: bench_train, bench_step and bench_start."""

from __future__ import annotations

from benchmarks.contenders.step import OURS, PLAIN
from benchmarks.report.contender_cells import entrants, memory, rate, ratio, stacked
from benchmarks.report.markdown import table
from benchmarks.report.origins import NOT_YET, Result, Results, origins, turns
from benchmarks.report.rounding import percent, significant


def train(results: Results) -> list[str]:
    """Contenders of bench_train and the ratios that matter."""
    sides = {"CPU": "train_cpu", "GPU": "train_cuda"}
    heads = ["source images/s", "wait for data", "GPU idle", "of it launching", "memory, MiB"]

    def cells(result: Result, contender: str) -> list[str]:
        own = result["contenders"].get(contender)
        names = ("data_wait", "device_idle", "launching")
        shares = [percent(own[name]) if own and name in own else "" for name in names]
        return [rate(own), *shares, memory(own)]

    ratios = {
        "Loaded over synthetic input": "loaded_over_synthetic",
        "the same of the plain step with a DataLoader": "plain_loaded_over_synthetic",
        "mvssl over the plain step with a DataLoader": "times_plain_with_dataloader",
    }
    measured = {side: results[name] for side, name in sides.items() if name in results}
    sentences = [
        f"{what}: " + ", ".join(f"{side} {ratio(result[field]) or 'not measured'}" for side, result in measured.items())
        for what, field in ratios.items()
    ]
    return [
        *stacked(results, sides, heads, cells),
        "",
        *(["; ".join(sentences) + ".", ""] if measured else []),
        *origins(results, sides, _of_train),
    ]


def step(results: Results) -> list[str]:
    """Contenders of bench_step: each recipe at each batch size."""
    sides = {"CPU": "step_cpu", "GPU": "step_cuda", "GPU, more": "steps_cuda"}
    heads = [
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
    rows: list[list[str]] = []
    for side, name in sides.items():
        if name not in results:
            rows.append([side, NOT_YET])
            continue
        for measured in results[name]["recipes"]:
            what = f"{measured['recipe']['name']}, batch {measured['batch_size']}"
            rows += [[side, what, contender, *_of_step(measured, contender)] for contender in entrants(measured)]
    return [*table(["on", "recipe", "contender", *heads], rows, words=3), "", *origins(results, sides, _about_steps)]


def _of_step(measured: Result, contender: str) -> list[str]:
    """Cells of one contender of bench_step."""
    own = measured["contenders"].get(contender)
    if own is None:
        return ["failed"]
    busy, loaded = own["busy_milliseconds"], measured["with_loader"].get(contender)
    compiled = contender in OURS and OURS[contender].compile == "on"
    expected = (measured.get("predicted") or {}) if compiled else {}
    same_batch = expected.get("batch_size", measured["batch_size"]) == measured["batch_size"]
    return [
        rate(own),
        "1" if contender == PLAIN else ratio(measured["times_plain"].get(contender)),
        _count(own["launches"]),
        _count(own.get("kernels")),
        _count(expected.get("launches")),
        _number(expected.get("megabytes_per_image")),
        significant(own["host_milliseconds"]),
        "" if busy is None else f"{significant(busy)} of {significant(own['milliseconds'])}",
        _number(expected.get("predicted_milliseconds") if same_batch else None),
        significant(own["tflops"]),
        "" if own["share_of_peak"] is None else percent(own["share_of_peak"]),
        "" if loaded is None else percent(loaded["over_alone"]["median"]),
        memory(own),
    ]


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _number(value: float | None) -> str:
    return "" if value is None else significant(value)


def _about_steps(result: Result) -> list[str]:
    """Steps of a turn, turns, and what the share of the peak is of."""
    said = [f"{result['steps']} steps a turn", f"median of {max(map(turns, result['recipes']), default=0)} turns"]
    for measured in result["recipes"]:
        if (peak := measured["matrix_product"]) is not None:
            kind = peak["dtype"].removeprefix("torch.")
            product = f"a product of matrices of {peak['side']:,} x {peak['side']:,} in {kind}"
            return [*said, f"peak {significant(peak['tflops'])} TFLOP/s: {product}"]
    return said


def start(results: Results) -> list[str]:
    """Kinds of starts of bench_start."""
    sides = {"CPU": "start_cpu", "GPU": "start_cuda"}
    heads = ["training after, s", "imports", "building", "first step", "a later step"]
    phases = ("training_after", "imports", "build", "first_step", "later_step")
    rows: list[list[str]] = []
    for side, name in sides.items():
        if name not in results:
            rows.append([side, NOT_YET])
            continue
        for kind, own in results[name]["starts"].items():
            rows.append([side, kind, *(significant(own[phase]) for phase in phases)])
    return [*table(["on", "start", *heads], rows, words=2), "", *origins(results, sides, _of_train)]


def _of_train(result: Result) -> list[str]:
    recipe = result["recipe"]
    return [f"`{recipe['name']}`", recipe["backbone"]["name"], f"batch {recipe['batch_size']}"]

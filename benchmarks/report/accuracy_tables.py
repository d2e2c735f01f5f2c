"""Tables of accuracies: what the evaluations say, and what the linear probe costs."""

from __future__ import annotations

from benchmarks.report.markdown import table
from benchmarks.report.origins import FOLDER, Result, Results, origins
from benchmarks.report.rounding import significant, with_spread


def evaluation(results: Results) -> list[str]:
    """What evaluate_small measured of each network."""
    name = "evaluation_cpu"
    heads = {"knn": "kNN, k = 20", "linear": "linear, fast", "release": "linear, release", "finetune": "10 % of labels"}
    rows = [
        [network, *(_share(measured.get(evaluation)) for evaluation in heads)]
        for network, measured in results.get(name, {"rows": {}})["rows"].items()
    ]
    return [
        *table(["network", *heads.values()], rows),
        "",
        *origins(results, {"CPU": name}, _of_evaluation, folder=f"../../benchmarks/{FOLDER}"),
    ]


def linear(results: Results) -> list[str]:
    """Contenders of bench_linear."""
    name = "linear_cpu"
    rows = [
        [
            contender,
            with_spread(own["seconds"], own["spread"]),
            significant(own["times_one_setting"]),
            f"{100 * own['top1']:.1f} %",
        ]
        for contender, own in results.get(name, {}).get("contenders", {}).items()
    ]
    return [
        *table(["contender", "seconds", "times one setting", "top-1"], rows),
        "",
        *origins(results, {"CPU": name}, lambda result: [f"{result['settings']} settings, {result['epochs']} epochs"]),
    ]


def _share(measured: Result | None) -> str:
    """Top-1 in per cent with its 95 % interval."""
    if measured is None:
        return ""
    low, high = (100 * end for end in measured["interval"])
    return f"{100 * measured['top1']:.1f} % ({low:.1f} to {high:.1f})"


def _of_evaluation(result: Result) -> list[str]:
    setting = result["settings"]
    return [
        f"ResNet-18, images of {setting['size']} px",
        f"pre-trained by {result['recipe']}",
        f"supervised for {setting['supervised_epochs']} epochs",
        f"the release's probe for {setting['release_epochs']} epochs instead of 100",
        f"fine-tuned for {setting['finetune_epochs']}",
        "95 % intervals",
    ]

"""Summary at the end of demo.sh: the files, and whether training has helped."""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.files import read_json
from pipelines.names import visible
from pipelines.runtime import InputError, run_cli

FILES = (
    ("images", "the synthetic JPEGs, train/ and val/, one folder per class"),
    ("shards", "the same images as tar shards with an index"),
    ("run/report.html", "report of the run: open it in a browser"),
    ("run/views.png", "contact sheet: the five views of some images"),
    ("run/losses.png", "loss of each task by step"),
    ("run/metrics.jsonl", "all logged metrics"),
    ("run/eval", "results of the trained and the untrained backbone"),
    ("backbone.safetensors", "the backbone; timm.create_model(..., checkpoint_path=...) loads it"),
)


def summary(out: Path) -> str:
    """Describe the finished demo in `out`.

    Raises:
        InputError: a result is missing, or the trained backbone is not better than the untrained one.
    """
    missing = [name for name, _ in FILES if not (out / name).exists()]
    if missing:
        raise InputError(f"{out} lacks {', '.join(missing)}: run tools/demo.sh again.")
    measured = out / "run" / "eval"
    (k, untrained), (_, trained) = (_knn(measured / f"knn-{which}.json") for which in ("untrained", "online"))
    chance = 1 / sum(entry.is_dir() for entry in (out / "images" / "train").iterdir())
    width = max(len(name) for name, _ in FILES)
    lines = [f"Everything is in {out}:"]
    lines += [f"  {name:<{width}}  {about}" for name, about in FILES]
    lines += [
        "",
        f"kNN top-1 (k = {k}; chance {100 * chance:.1f} %)",
        f"  untrained  {100 * untrained:5.1f} %",
        f"  trained    {100 * trained:5.1f} %",
    ]
    if trained <= untrained:
        print(*map(visible, lines), sep="\n")
        raise InputError("Training has not helped: try another --seed, and please report it.")
    return "\n".join(lines)


def _knn(path: Path) -> tuple[int, float]:
    """Number of neighbours and accuracy of the first setting of mvssl-eval knn."""
    first = read_json(path)["results"]["settings"][0]
    return first["k"], first["top1"]


if __name__ == "__main__":
    run_cli(lambda: print(*map(visible, summary(Path(sys.argv[1])).split("\n")), sep="\n"))

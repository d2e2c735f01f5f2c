"""One page about a run: everything in one HTML file, without a network or a script.

Curves as inline SVG, which a page shows without a script and in its own colours.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.monitor.console import duration
from mvssl.monitor.loggers import read_jsonl
from mvssl.runs.folder import RunFolder
from mvssl.runs.results import read_result
from mvssl.weights.backbone_file import loading_code
from pipelines.runtime import InputError

Curve = tuple[Sequence[float], Sequence[float]]
"""x and y."""

_WIDTH, _HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 34
_MOST = 400  # points of a curve: more would not be seen


def svg(curves: Mapping[str, Curve], *, x: str, y: str, log: bool = False) -> str:
    """Draw curves in one frame, with a legend below; "" where there is no point.

    Colours are the classes c0, c1, ... of the page's style; text takes the page's colour.

    Args:
        curves: by name, in the order of the legend.
        x: what stands below.
        y: what the picture shows, for readers that do not see it.
        log: whether y is logarithmic; values of 0 and less are left out then.
    """
    shown = {name: _points(curve, log=log) for name, curve in curves.items()}
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    xs = [a for points in shown.values() for a, _ in points]
    ys = [b for points in shown.values() for _, b in points]
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], max(y_ticks[-1], y_ticks[0] + 1e-9)

    def place(a: float, b: float) -> tuple[float, float]:
        across = (a - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (b - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y)}">']
    for tick in y_ticks:
        _, at = place(x_low, tick)
        label = number(10**tick if log else tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            at, _ = place(tick, y_low)
            parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x)}</text>')
    for place_of, points in enumerate(shown.values()):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*point) for point in points))
        parts.append(f'<polyline class="curve c{place_of % 6}" points="{path}"/>')
        if len(points) == 1:
            a, b = place(*points[0])
            parts.append(f'<circle class="dot c{place_of % 6}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>')
    parts.append("</svg>")
    if len(shown) > 1:
        keys = "".join(f'<span class="key c{n % 6}">{escape(name)}</span>' for n, name in enumerate(shown))
        parts.append(f'<div class="legend">{keys}</div>')
    return "".join(parts)


def ticks(low: float, high: float, *, about: int = 4) -> list[float]:
    """Round numbers from below `low` to above `high`, some `about` steps apart."""
    if not high > low:
        half = abs(low) / 10 or 1.0
        low, high = low - half, high + half
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * min((1, 2, 5, 10), key=lambda times: abs(times * unit - rough))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Decimal logarithms of 1, 2 and 5 times powers of ten, or of the powers alone where those would be many.

    The first is at most `low`, the last at least `high`, which are logarithms too.
    """
    digits = (1, 2, 5) if high - low < 2 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 2)
    marks = [power + math.log10(digit) for power in powers for digit in digits]
    first = max(n for n, mark in enumerate(marks) if mark <= low + 1e-9)
    last = min(n for n, mark in enumerate(marks) if mark >= high - 1e-9)
    return marks[first : max(last, first + 1) + 1]


def number(value: float) -> str:
    """A number in few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.0f}k"
    if abs(value) < 0.001:
        return f"{value:.0e}"
    return f"{value:.4g}"


def _points(curve: Curve, *, log: bool) -> list[tuple[float, float]]:
    """At most `_MOST` points, each the mean of its neighbours where there are more."""
    pairs = [(float(a), float(b)) for a, b in zip(*curve, strict=True) if math.isfinite(b) and (b > 0 or not log)]
    share = -(-len(pairs) // _MOST) or 1
    points = []
    for at in range(0, len(pairs), share):
        some = pairs[at : at + share]
        a, b = (sum(values) / len(some) for values in zip(*some, strict=True))
        points.append((a, math.log10(b) if log else b))
    return points


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --paper: #ffffff; --card: #f5f6f8; --line: #d9dde3;
  --c0: #2563c9; --c1: #c2571a; --c2: #2a8a4a; --c3: #8b3fb5; --c4: #b3263a; --c5: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa4b1; --paper: #15181c; --card: #1e2228;
  --line: #343a43; --c0: #7aa7ff; --c1: #f0a06a; --c2: #6fcf8f; --c3: #cf94ef; --c4: #f2808e; --c5: #9aa4b1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 24px 20px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 36px 0 12px; }
p { margin: 6px 0; } .soft { color: var(--soft); } code, pre { font: 13px/1.5 ui-monospace, monospace; }
pre { background: var(--card); padding: 12px; border-radius: 8px; overflow-x: auto; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border-radius: 10px; padding: 12px 14px; }
figcaption { font-weight: 600; margin-bottom: 6px; } figure svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg .grid { stroke: var(--line); }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.c0 { stroke: var(--c0); --key: var(--c0); } .c1 { stroke: var(--c1); --key: var(--c1); }
.c2 { stroke: var(--c2); --key: var(--c2); } .c3 { stroke: var(--c3); --key: var(--c3); }
.c4 { stroke: var(--c4); --key: var(--c4); } .c5 { stroke: var(--c5); --key: var(--c5); }
.dot { fill: var(--key); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 6px; font-size: 13px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin: 0 6px 3px 0;
  background: var(--key); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 16px 0; }
.tile { background: var(--card); border-radius: 10px; padding: 10px 14px; } .tile b { display: block; font-size: 20px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
td, th { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; } img { max-width: 100%; border-radius: 8px; }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
.warn { border-left: 4px solid var(--c4); padding: 6px 12px; background: var(--card); border-radius: 4px; }
"""


def write_report(path: Path, folder: RunFolder) -> None:
    """Write the page of a run, finished or not.

    Raises:
        InputError: the folder holds no run, or its files are damaged.
        OSError: the page cannot be written; an earlier one is untouched then.
    """
    page = render(folder)
    aside = path.with_name(f".{path.name}")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)


def render(folder: RunFolder) -> str:
    """The page as HTML.

    Raises:
        InputError: as `write_report`.
    """
    recipe = folder.recipe()
    rows = _rows(folder.metrics)
    train = [row for row in rows if row["kind"] == "train"]
    knn = [row for row in rows if row["kind"] == "knn"]
    speed = _rows(folder.throughput)
    parts = [
        _head(folder, recipe, train),
        _tiles(train, knn, speed),
        _failure(folder),
        _section("How it went", f'<div class="grid2">{_figures(recipe, train, knn, speed)}</div>'),
        _section("What limited it", _limits(folder)),
        _section("Measured afterwards", _results(folder)),
        _section("What the network sees", _picture(folder.views, "the views of some images")),
        _section("Bad images", _bad(folder)),
        _section("Take the backbone along", _backbone(folder, recipe)),
        _section("Recipe", _recipe(recipe)),
        _section("Made on", _environment(folder)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(folder.path.name)}: {escape(recipe.name)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """Lines of a file, [] if there is none.

    Raises:
        InputError: a line is damaged.
    """
    try:
        return list(read_jsonl(path)) if path.exists() else []
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): restore it, or delete the broken line.") from error


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _head(folder: RunFolder, recipe: Recipe, train: Sequence[Mapping[str, Any]]) -> str:
    views = ", ".join(f"{view.name} {view.size} px" for view in recipe.views)
    done = train[-1]["epoch"] + 1 if train else 0
    options = json.loads(folder.config.read_text())["options"]
    notes = f"<p>{escape(options['notes'])}</p>" if options.get("notes") else ""
    tags = " ".join(f"<code>{escape(tag)}</code>" for tag in options.get("tags") or ())
    return (
        f"<h1>{escape(options.get('run_name') or folder.path.name)}</h1>"
        f'<p class="soft">{escape(recipe.name)}: {escape(recipe.method)}, {escape(recipe.backbone.name)}, '
        f"{escape(recipe.predictors)} predictors, batch {recipe.batch_size}, epoch {done} of {recipe.epochs}</p>"
        f'<p class="soft">{escape(views)}</p>{notes}{f"<p>{tags}</p>" if tags else ""}'
    )


def _tiles(
    train: Sequence[Mapping[str, Any]], knn: Sequence[Mapping[str, Any]], speed: Sequence[Mapping[str, Any]]
) -> str:
    tiles: list[tuple[str, str]] = []
    if train:
        tiles += [("steps", f"{train[-1]['step']:,}"), ("loss", f"{train[-1]['loss']:.4f}")]
        tiles.append(("effective rank", f"{train[-1]['effective_rank']:.1f}"))
    if knn:
        tiles.append(("kNN top-1", f"{100 * knn[-1]['top1']:.2f} %"))
    if speed:
        seconds = sum(row["seconds"] for row in speed)
        images = sum(row["images_per_second"] * row["seconds"] for row in speed)
        waited = sum(row["data_wait"] * row["seconds"] for row in speed)
        tiles += [
            ("source images/s", f"{images / max(seconds, 1e-9):,.0f}"),
            ("waited for data", f"{100 * waited / max(seconds, 1e-9):.1f} %"),
            ("training time", duration(seconds)),
            ("memory at peak", f"{max(row['memory_gib'] for row in speed):.2f} GiB"),
        ]
    if not tiles:
        return '<p class="soft">Nothing has been logged yet.</p>'
    return '<div class="tiles">' + "".join(f'<div class="tile">{a}<b>{b}</b></div>' for a, b in tiles) + "</div>"


def _figures(
    recipe: Recipe,
    train: Sequence[Mapping[str, Any]],
    knn: Sequence[Mapping[str, Any]],
    speed: Sequence[Mapping[str, Any]],
) -> str:
    tasks = [name for name in (train[0] if train else {}) if name.startswith("loss/")]
    figures = [
        ("Loss of each task", svg({n.removeprefix("loss/"): _curve(train, n) for n in tasks}, x="step", y="losses")),
        ("kNN top-1, %", svg({"top-1": _curve(knn, "top1", times=100)}, x="step", y="kNN top-1 in per cent")),
        ("Learning rate", svg({"lr": _curve(train, "lr")}, x="step", y="learning rate")),
        ("Target decay", svg({"decay": _curve(train, "target_decay")}, x="step", y="target decay")),
        ("Spread of the embeddings", svg({"std": _curve(train, "embedding_std")}, x="step", y="standard deviation")),
        ("Effective rank", svg({"rank": _curve(train, "effective_rank")}, x="step", y="effective rank")),
        (
            "Gradient norm",
            svg({"norm": _curve(train, "grad_norm")}, x="step", y="gradient norm, logarithmic", log=True),
        ),
        ("Source images/s", svg({"rate": _curve(speed, "images_per_second")}, x="step", y="source images a second")),
        (
            "Waiting, % of the time",
            svg(
                {
                    "for data": _curve(speed, "data_wait", times=100),
                    "GPU idle": _curve(speed, "device_idle", times=100),
                },
                x="step",
                y="waiting in per cent of the time",
            ),
        ),
    ]
    if recipe.method == "simsiam":
        figures = [figure for figure in figures if figure[0] != "Target decay"]
    return "".join(f"<figure><figcaption>{title}</figcaption>{drawn}</figure>" for title, drawn in figures if drawn)


def _curve(rows: Iterable[Mapping[str, Any]], name: str, *, times: float = 1.0) -> Curve:
    pairs = [(row["step"], times * row[name]) for row in rows if row.get(name) is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _limits(folder: RunFolder) -> str:
    """The last sentence of the log about it."""
    said = [line for line in _log(folder) if " limits the run" in line]
    return f"<p>{escape(said[-1].split('done: ', 1)[-1])}</p>" if said else ""


def _log(folder: RunFolder) -> list[str]:
    return folder.log.read_text(errors="replace").splitlines() if folder.log.exists() else []


def _failure(folder: RunFolder) -> str:
    if not folder.failure.exists():
        return ""
    return (
        f'<p class="warn">This run diverged:</p><pre>{escape(folder.failure.read_text(errors="replace")[:4000])}</pre>'
    )


def _results(folder: RunFolder) -> str:
    rows = []
    for path in sorted(folder.evaluations.glob("*.json")):
        held = read_result(path)
        best = held["results"].get("best", held["results"])
        low, high = best["top1_interval_95"]
        rows.append(
            (
                held["evaluation"],
                held["network"],
                f"{100 * best['top1']:.2f} %",
                f"{100 * low:.1f} to {100 * high:.1f} %",
            )
        )
    return _table(("evaluation", "network", "top-1", "95 % interval"), rows, numbers=2) if rows else ""


def _bad(folder: RunFolder) -> str:
    lines = [line for line in _log(folder) if "cannot be decoded" in line]
    if not lines:
        return '<p class="soft">None.</p>' if folder.log.exists() else ""
    shown = "".join(f"<li>{escape(line)}</li>" for line in lines[:50])
    more = f"<p>and {len(lines) - 50:,} more in train.log</p>" if len(lines) > 50 else ""
    return f"<details><summary>{len(lines):,} lines in the log</summary><ul>{shown}</ul>{more}</details>"


def _backbone(folder: RunFolder, recipe: Recipe) -> str:
    if not folder.backbone.exists():
        return ""
    code = "\n".join(loading_code(recipe.backbone.name, str(folder.backbone)))
    return f"<pre>{escape(code)}</pre><pre>{escape(f'mvssl-eval linear --run {folder.path}')}</pre>"


def _recipe(recipe: Recipe) -> str:
    plain = to_dict(recipe)
    views = plain.pop("views")
    flat = [(name, _short(value)) for name, value in plain.items() if not isinstance(value, dict)]
    for name, value in plain.items():
        if isinstance(value, dict):
            flat += [(f"{name}.{key}", _short(inner)) for key, inner in value.items()]
    names = list(views[0])
    per_view = [[name, *(_short(view[name]) for view in views)] for name in names]
    return (
        f'<div class="wide">{_table(("view", *(view["name"] for view in views)), per_view[1:])}</div>'
        f"<details><summary>all {len(flat)} other fields</summary>{_table(('field', 'value'), flat)}</details>"
    )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _environment(folder: RunFolder) -> str:
    if not folder.environment.exists():
        return ""
    try:
        held = json.loads(folder.environment.read_text())
    except ValueError as error:
        raise InputError(f"{folder.environment} is damaged ({error}): restore it.") from error
    packages = ", ".join(f"{name} {version}" for name, version in held["packages"].items())
    command = " ".join(held["command"])
    gpus = ", ".join(held["gpus"]) or "none"
    rows = [
        ("machine", f"{held['cores']} cores ({held['processor']}), GPUs: {gpus}"),
        ("system", f"{held['platform']}, Python {held['python']}"),
        ("packages", packages),
        ("command", command),
    ]
    return _table(("", ""), rows)


def _picture(path: Path, what: str) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0) -> str:
    """A table whose last `numbers` columns are numbers."""
    first = len(heads) - numbers

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="n"' if n >= first else "" for n in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for c, k in zip(cells, kinds, strict=True)) + "</tr>"

    head = line(heads, "th") if any(heads) else ""
    return f"<table>{head}{''.join(line(row, 'td') for row in rows)}</table>"

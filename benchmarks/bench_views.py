"""Images per second of the view engine against the torchvision composition: same images, same decisions, same run.

python -m benchmarks.bench_views DATA [--num-images 64] [--threads 1] [--repeats 5] [--out results.json]

Decoding is not timed. The two take turns, so that whatever else the machine does hits both; the headline is the ratio.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from benchmarks.baselines.torchvision_views import torchvision_view
from mvssl.environment import environment
from pipelines.batch import DecodedBatch
from pipelines.console import run_cli
from pipelines.decode import make_decoder
from pipelines.order import Order
from pipelines.storage import open_source
from pipelines.views.draw import draw
from pipelines.views.engine import ViewEngine
from pipelines.views.presets import paper_views


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time the view engine against torchvision.

    Attributes:
        data: folder of images or converted data set.
        num_images: images of a batch.
        threads: threads torch may use, in both.
        repeats: turns each takes; the median counts.
        size: side of the global and cutout views in pixels.
        local_size: side of the local views in pixels.
        out: JSON file to write.
    """

    data: tyro.conf.Positional[Path]
    num_images: int = 64
    threads: int = 1
    repeats: int = 5
    size: int = 224
    local_size: int = 96
    out: Path | None = None


def load(arguments: Arguments) -> DecodedBatch:
    """Decode a random batch of the data set."""
    source = open_source(arguments.data)
    order = Order(num_images=len(source), batch_size=arguments.num_images, seed=0)
    index = torch.from_numpy(order.batch(0, 0))
    decoder = make_decoder("auto", device="cpu", batch_size=len(index), threads=1)
    decoded = decoder([source.read(i) for i in index.tolist()])
    decoder.close()
    good = torch.tensor([n not in decoded.failures for n in range(len(index))])
    return DecodedBatch.packed(decoded.pixels, sizes=decoded.sizes, index=index[good])


def measure(arguments: Arguments) -> dict[str, object]:
    """Run the benchmark; the result as plain JSON values."""
    torch.set_num_threads(arguments.threads)
    batch = load(arguments)
    specs = paper_views(size=arguments.size, local_size=arguments.local_size)
    engine = ViewEngine(specs)
    params = draw(specs, batch.sizes, seed=0, epoch=0, index=batch.index)

    def ours() -> list[Tensor]:
        fresh = draw(specs, batch.sizes, seed=0, epoch=0, index=batch.index)
        return engine(batch, fresh)

    def torchvision() -> list[Tensor]:
        return [
            torch.stack([torchvision_view(batch.image(n), spec, params.view(v), n) for n in range(len(batch))])
            for v, spec in enumerate(specs)
        ]

    difference = max(float((a - b).abs().max()) for a, b in zip(ours(), torchvision(), strict=True))
    contenders: dict[str, Callable[[], list[Tensor]]] = {"engine": ours, "torchvision": torchvision}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, make in contenders.items():
            began = time.perf_counter()
            make()
            seconds[name].append(time.perf_counter() - began)
    rates = {name: len(batch) / statistics.median(times) for name, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["engine"], seconds["torchvision"], strict=True)]
    command = (
        f"python -m benchmarks.bench_views {arguments.data.name} --num-images {arguments.num_images} "
        f"--threads {arguments.threads} --repeats {arguments.repeats} "
        f"--size {arguments.size} --local-size {arguments.local_size}"
    )
    return {
        "benchmark": "views",
        "images": len(batch),
        "mean_megapixels": float(batch.sizes.prod(dim=1).double().mean()) / 1e6,
        "views_per_image": len(specs),
        "sizes": [spec.size for spec in specs],
        "threads": arguments.threads,
        "images_per_second": rates,
        "views_per_second": {name: rate * len(specs) for name, rate in rates.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "n": len(ratios)},
        "largest_difference": difference,
        "environment": environment() | {"command": command},
    }


def body() -> int:
    """Run the command; returns the exit code."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.bench_views")
    result = measure(arguments)
    print(json.dumps(result, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(body)

"""Reading converted data from an HTTP server of a given latency, against the same shards on the local disk.

python -m benchmarks.bench_remote [--images 2000] [--side 256] [--batch-size 64] [--latencies 0 10 50] [--out FILE]

The server, a process of its own on this machine, waits so many milliseconds before each answer; its bandwidth is not
limited. Images are read in the order of a full shuffle (and in blocks of 16), and announced as a loader does; they are
not decoded. Measured are the first epoch with an empty cache, the second one, and an epoch without a cache.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.bench_formats import draw, write_folder
from benchmarks.harness.command import check_positive, command_of, finish
from benchmarks.harness.results import measured_by, write_result
from benchmarks.harness.trials import say
from pipelines.conversion.command import Convert, convert
from pipelines.order import Order
from pipelines.runtime import InputError, parse_arguments, run_cli
from pipelines.storage import RemoteOptions, Source, open_source
from pipelines.storage.source import ReadsAhead, ReadsBatches

PROG = "python -m benchmarks.bench_remote"
_LEAD = 4  # batches that are announced ahead
_BLOCK = 16  # images


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Read shards from a server and from the disk.

    Attributes:
        images: of the data set.
        side: pixels of the JPEGs.
        batch_size: images that are read at once.
        latencies: milliseconds before each answer.
        connections: requests in flight.
        repeats: trials; the median counts.
        out: JSON file.
    """

    images: int = 2000
    side: int = 256
    batch_size: int = 64
    latencies: tuple[int, ...] = (0, 10, 50)
    connections: int = 16
    repeats: int = 3
    out: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "images", "side", "batch_size", "connections", "repeats")
        if not self.latencies or min(self.latencies) < 0:
            raise InputError(f"latencies is {self.latencies} but must be 0 or more milliseconds: give one or more.")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, root: Path, latency: float) -> None:
        self.root, self.latency = root, latency
        super().__init__(*args)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        time.sleep(self.latency)
        file = self.root / self.path.lstrip("/")
        size = file.stat().st_size if file.is_file() else -1
        part = self.headers.get("Range")
        first, last = (int(n) for n in part.removeprefix("bytes=").split("-")) if part else (0, size - 1)
        self.send_response(404 if size < 0 else 206 if part else 200)
        self.send_header("Content-Length", str(max(last - first + 1, 0)))
        if part:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if body and size > 0:
            with file.open("rb") as data:
                data.seek(first)
                self.wfile.write(data.read(last - first + 1))


def _serve(root: Path, latency: float, told: Connection) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, root=root, latency=latency))
    told.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def served(root: Path, milliseconds: float) -> Any:
    """The URL of a folder, of a server that waits before each answer."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(root, milliseconds / 1000, there), daemon=True
    )
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def epoch_rate(source: Source, batch_size: int, *, epoch: int, chunk: int) -> float:
    """Images/s of reading an epoch."""
    assert isinstance(source, ReadsAhead)
    assert isinstance(source, ReadsBatches)
    order = Order(num_images=len(source), batch_size=batch_size, seed=0, chunk=chunk, window=max(512, chunk))
    batches = order.reading(order.permutation(epoch), epoch).tolist()
    began = time.perf_counter()
    for batch in batches[:_LEAD]:
        source.will_need(batch)
    for number, batch in enumerate(batches):
        for ahead in batches[number + _LEAD : number + _LEAD + 1]:
            source.will_need(ahead)
        assert all(data is not None for data in source.read_batch(batch))
    return sum(map(len, batches)) / (time.perf_counter() - began)


def rates(asked: Arguments, shards: Path, folder: Path, milliseconds: int) -> dict[str, float]:
    """Images/s of one trial, by what is read."""
    found: dict[str, float] = {}

    def measure(name: str, opened: Callable[[], Source], epochs: Sequence[str], chunk: int = 0) -> None:
        source = opened()
        for epoch, word in enumerate(epochs):
            found[f"{name}{word}"] = epoch_rate(source, asked.batch_size, epoch=epoch, chunk=chunk)
        source.close()

    measure("local", lambda: open_source(shards), [""])
    with served(shards, milliseconds) as url, tempfile.TemporaryDirectory(dir=folder) as cache:

        def remote(size: str) -> Source:
            options = RemoteOptions(cache=Path(cache), cache_size=size, connections=asked.connections)
            return open_source(url, remote=options)

        measure("", lambda: remote("100GB"), ["first epoch", "second epoch"])
        measure("", lambda: remote("0"), ["no cache"])
        measure("", lambda: remote("0"), ["no cache, order-chunk"], chunk=_BLOCK)
    return found


def run(asked: Arguments, command: str) -> dict[str, Any]:
    """Measure all latencies, interleaved."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        images = draw(asked.images, asked.side)
        convert(Convert(src=write_folder(root / "images", images), dst=root / "shards", shard_size=16))
        trials: dict[int, list[dict[str, float]]] = {latency: [] for latency in asked.latencies}
        for trial in range(asked.repeats):
            for latency in asked.latencies:
                trials[latency].append(rates(asked, root / "shards", root, latency))
                say(f"trial {trial + 1}, {latency} ms: {trials[latency][-1]}")
        result = {
            "images": asked.images,
            "bytes_per_image": sum(map(len, images.jpegs)) / asked.images,
            "batch_size": asked.batch_size,
            "connections": asked.connections,
            "repeats": asked.repeats,
            "latencies": {
                str(latency): {name: statistics.median(one[name] for one in measured) for name in measured[0]}
                for latency, measured in trials.items()
            },
            **measured_by(command),
        }
        write_result(asked.out, result)
        return result


def body(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    asked = parse_arguments(Arguments, prog=PROG, args=arguments)
    return finish(run(asked, command_of(PROG, arguments)), asked.out)


if __name__ == "__main__":
    sys.exit(run_cli(lambda: body(sys.argv[1:])))

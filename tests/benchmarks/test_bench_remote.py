"""bench_remote: every kind of reading at every latency, and no wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench_remote import Arguments, run
from pipelines.runtime import InputError


def test_a_rate_for_each_kind_of_reading(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    out = tmp_path / "out.json"
    asked = Arguments(images=40, side=32, batch_size=8, latencies=(0, 5), repeats=1, connections=2, out=out)
    result = run(asked, "x")
    assert json.loads(out.read_text())["latencies"] == result["latencies"]
    kinds = {"local", "first epoch", "second epoch", "no cache", "no cache, order-chunk"}
    assert {latency: set(rates) for latency, rates in result["latencies"].items()} == {"0": kinds, "5": kinds}
    assert all(rate > 0 for rates in result["latencies"].values() for rate in rates.values())


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="latencies"):
        Arguments(latencies=(-1,))
    with pytest.raises(InputError, match="images"):
        Arguments(images=0)

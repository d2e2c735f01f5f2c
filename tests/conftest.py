"""What all tests share: how property tests run, which files start first, and which tests this machine cannot run."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from hypothesis import HealthCheck, settings

mpl.use("Agg")

# The same examples in every run, and no deadline: the cores are shared with the tests beside it.
settings.register_profile(
    "mvssl", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("mvssl")


LONGEST = (
    "benchmarks/test_gpu_compile.py",
    "benchmarks/test_gpu_suite.py",
    "benchmarks/test_bench_faults.py",
    "tools/test_coco_torchvision.py",
    "mvssl/training/test_compile.py",
    "test_guides.py",
    "mvssl/training/test_ranks_step.py",
    "mvssl/training/test_ranks_run.py",
    "mvssl/training/test_ranks_faults.py",
    "mvssl/models/test_batchnorm.py",
    "benchmarks/test_bench_compile.py",
    "benchmarks/test_bench_step.py",
    "benchmarks/test_gpu_paper.py",
    "benchmarks/test_paper_small.py",
    "mvssl/evaluate/test_evaluations.py",
    "mvssl/training/test_checkpointing.py",
    "mvssl/cli/test_cli.py",
    "mvssl/weights/test_timm_folder.py",
    "tools/test_distributions.py",
    "mvssl/training/test_start.py",
    "benchmarks/test_bench_start.py",
    "benchmarks/test_bench_loader.py",
    "mvssl/cli/test_devices.py",
    "mvssl/training/test_capture.py",
)
"""Files of half a minute and more, the longest first: started last, one of them would keep a single core busy."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, and skip the tests marked `gpu` where there is no CUDA device."""
    order = {Path(__file__).parent / name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _threads_of_torch() -> Iterator[None]:
    """Benchmarks set torch's threads; the next test must not feel it: sums over other threads round otherwise."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make reports of odd file names fit for pytest-xdist, which ends the whole run where one is not UTF-8."""
    report = yield
    report.sections = [(name, _encodable(text)) for name, text in report.sections]
    if report.longrepr is not None and str(report.longrepr) != _encodable(str(report.longrepr)):
        report.longrepr = _encodable(str(report.longrepr))
    return report


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()

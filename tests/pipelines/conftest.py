"""Fixtures of the tests of pipelines."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_thread_left() -> Iterator[None]:
    """The test must end with no more threads than it began with."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before

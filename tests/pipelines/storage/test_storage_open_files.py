"""More shards than files may be open."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.runtime import InputError
from pipelines.storage import open_source
from tools.convert import Convert, convert

COUNT = 40


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image in each shard."""
    root = tmp_path_factory.mktemp("many")
    (root / "src").mkdir()
    for number in range(COUNT):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(root / "src" / f"{number:02d}.png")
    convert(Convert(src=root / "src", dst=root / "d", shard_size=1e-6))
    return root / "d"


@pytest.fixture
def few_files() -> Iterator[int]:
    """At most 20 more files than now; the limit that says so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 20, hard))
    yield lowest_free + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_the_soft_limit(shards: Path, few_files: int) -> None:
    source = open_source(shards)
    read = [source.read(i) for i in range(COUNT)]  # opens every shard
    source.close()
    for number, data in enumerate(read):
        assert data.tobytes() == (shards.parent / "src" / f"{number:02d}.png").read_bytes()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > few_files


def test_limit_is_left_alone_if_it_suffices(shards: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[0] < 1024:
        pytest.skip("the soft limit here is below the usual 1024")
    source = open_source(shards)
    for i in range(COUNT):
        source.read(i)
    source.close()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_more_shards_than_the_hard_limit(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256 + COUNT - 1))
    with pytest.raises(InputError, match=r"has 40 shards but .* only 39 of them open: raise .* larger --shard-size"):
        open_source(shards)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256 + COUNT))
    assert len(open_source(shards)) == COUNT

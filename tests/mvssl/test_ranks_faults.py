"""What goes wrong on one rank alone ends the others with a sentence, and is said before anything waits for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import results, run_ranks

from mvssl.distributed import FailedElsewhere, join_world
from mvssl.options import RunOptions
from mvssl.recipe import Recipe
from mvssl.trainer import run
from pipelines.errors import InputError


def failing_on_rank_one() -> tuple[str, bool]:
    """What each rank meets where rank 1 fails between two votes, and whether it is still connected behind the run."""
    try:
        with join_world(cuda=False) as world:
            world.any(False)
            if world.rank == 1:
                raise InputError("a fault of rank 1 alone")
            world.any(False)
    except (FailedElsewhere, InputError) as error:
        return str(error), dist.is_initialized()
    return "nothing", dist.is_initialized()


def test_a_rank_that_fails_alone_ends_the_others() -> None:
    (message, _), (own, connected) = results(run_ranks(failing_on_rank_one, 2))
    assert message.startswith("another process of the run is gone (")
    assert own == "a fault of rank 1 alone"
    assert connected  # to disconnect may wait for the others (NCCL), before the message is seen


def test_more_processes_than_gpus_are_refused_before_one_is_taken(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    options = RunOptions(data=None, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"Process 1 of this machine has no GPU.*1 GPUs here.*start fewer"):
        run(tiny_recipe, options)

"""What to do when the device's memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipelines.errors import InputError


@contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Turn CUDA's out-of-memory error into a sentence with the remedy.

    Raises:
        InputError: the device has too little memory for what the block does.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"The GPU's memory is full ({str(error).splitlines()[0]}): add --step-mode per-view, which holds one "
            "view at a time, or --accumulate 2, which takes the batch in parts, or lower --batch-size; --cuda-graph "
            "off gives memory back between steps; --dry-run tells how much a recipe takes."
        ) from error

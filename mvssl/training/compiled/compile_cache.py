"""Compiled code kept from one start to the next: a step that took minutes to compile is there in seconds."""

from __future__ import annotations

import logging
import os

from pipelines.cache_folder import cache_folder

logger = logging.getLogger("mvssl")

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variables that name the caches of torch.compile and Triton, and ours in the user's cache folder."""


def keep_compiled_code() -> None:
    """Let torch.compile and Triton keep what they compile in the user's cache folder.

    By default torch keeps it among the temporary files, where it is gone with the next start of a machine or container.
    Variables that are set already stay; so does torch's default where the folder cannot be written.
    """
    for variable, name in FOLDERS.items():
        if variable in os.environ:
            continue
        folder = cache_folder() / name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if writable:
            os.environ[variable] = str(folder)
        else:
            logger.warning(
                "compiled code is not kept for the next start: %s cannot be written; set %s", folder, variable
            )

"""Fetching, threads, the pixel cache and the loader of evaluations."""

from __future__ import annotations

from typing import Literal

Cache = Literal["off", "host", "device", "auto"]

"""The commands.

Threads of OpenMP spin while they wait for the next piece of work. By default they do so for so long that one other busy
process makes training ten times slower. libgomp reads the variable when it is loaded, with torch: so it is set here,
which every command imports before torch. A user's own setting wins.
"""

from __future__ import annotations

import os

SPINS = "1000"
"""Turns of waiting before a thread sleeps. On 2 cores the demo makes 281 to 303 images/s with it (290 to 316 without),
and 141 to 145 beside a busy process (11 to 101 without)."""

if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = SPINS

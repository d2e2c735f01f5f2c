"""Column positions of the job tables, as constants for kernels."""

from __future__ import annotations

import triton.language as tl

from pipelines.views.fused.jobs import COLUMNS, FACTORS, ROTATION
from pipelines.views.fused.jobs import ROTATED as _ROTATED

WIDTH_OF_TABLE = tl.constexpr(len(COLUMNS))
CROP = tl.constexpr(COLUMNS.index("crop"))
STRIDE = tl.constexpr(COLUMNS.index("stride"))
HEIGHT = tl.constexpr(COLUMNS.index("height"))
WIDTH = tl.constexpr(COLUMNS.index("width"))
SIZE = tl.constexpr(COLUMNS.index("size"))
ROWS = tl.constexpr(COLUMNS.index("rows"))
BYTES = tl.constexpr(COLUMNS.index("bytes"))
BOUNDS = tl.constexpr(COLUMNS.index("bounds"))
COLUMN_WEIGHTS = tl.constexpr(COLUMNS.index("column_weights"))
COLUMN_TAPS = tl.constexpr(COLUMNS.index("column_taps"))
ROW_WEIGHTS = tl.constexpr(COLUMNS.index("row_weights"))
ROW_TAPS = tl.constexpr(COLUMNS.index("row_taps"))
ORIENTATION = tl.constexpr(COLUMNS.index("orientation"))
CUTOUT = tl.constexpr(COLUMNS.index("cutout_top"))
JITTER = tl.constexpr(COLUMNS.index("jitter"))
ORDER = tl.constexpr(COLUMNS.index("order_0"))
GRAY = tl.constexpr(COLUMNS.index("gray"))
SOLARIZE = tl.constexpr(COLUMNS.index("solarize"))
REACH = tl.constexpr(COLUMNS.index("reach"))
BLURRED = tl.constexpr(COLUMNS.index("blurred"))
OUT = tl.constexpr(COLUMNS.index("out"))
THRESHOLD = tl.constexpr(FACTORS)
BLUR_TAPS = tl.constexpr(FACTORS + 1)
ROTATED = tl.constexpr(_ROTATED)
WIDTH_OF_ROTATIONS = tl.constexpr(len(ROTATION))
COSINE = tl.constexpr(ROTATION.index("cosine"))
SINE = tl.constexpr(ROTATION.index("sine"))
IS_BILINEAR = tl.constexpr(ROTATION.index("bilinear"))
IS_FILLED = tl.constexpr(ROTATION.index("filled"))
FILL = tl.constexpr(ROTATION.index("red"))

"""Vertical flip, quarter turns and rotation of square views, as torchvision does them on bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.views import portable_math
from pipelines.views.params import ViewParams
from pipelines.views.randomness import Slot
from pipelines.views.spec import ViewSpec

MIRROR_COLUMNS, MIRROR_ROWS, TRANSPOSE = 1, 2, 4
"""Bits of an orientation: rows and columns are exchanged first, then mirrored."""
_BORDER = 1  # pixels around a view, which stand for all outside


def sample(spec: ViewSpec, u: Tensor) -> dict[str, Tensor]:
    """Sample the orientation of one view from u float64 [blocks, 4, N]: three fields of ViewParams, [N] each."""
    low, high = spec.degrees
    turns = (u[Slot.QUARTER_TURNS, 1] * 4).to(torch.int64)
    return {
        "vertical_flip": u[Slot.VERTICAL_FLIP, 0] < spec.vertical_flip,
        "quarter_turns": torch.where(u[Slot.QUARTER_TURNS, 0] < spec.quarter_turns, turns, 0),
        "angle": (low + u[Slot.ROTATE, 0] * (high - low)).to(torch.float32),
    }


def orientations(params: ViewParams) -> tuple[Tensor, Tensor]:
    """What moves whole pixels as one orientation, and what is left to interpolate.

    An angle that is a multiple of 90 degrees is a number of quarter turns, as in torchvision.

    Args:
        params: tensors [...] on the CPU.

    Returns:
        uint8 [...], the bits above (the flip is the lowest), and bool [...], whether the angle rotates the rest.
    """
    columns = params.flip
    if not (params.vertical_flip.any() or params.quarter_turns.any() or params.angle.any()):
        return columns.view(torch.uint8), torch.zeros_like(columns)
    degrees = torch.remainder(params.angle.to(torch.float64), 360.0)
    rotates = torch.remainder(degrees, 90.0) != 0
    turns = params.quarter_turns + torch.where(rotates, 0, (degrees / 90.0).to(torch.int64))
    odd, half = turns % 2 == 1, turns % 4 >= 2
    rows = params.vertical_flip ^ half
    columns = columns ^ half
    # A quarter turn takes row y, column x to row S - 1 - x, column y.
    bits = torch.where(odd, ~columns * MIRROR_ROWS + rows * MIRROR_COLUMNS + TRANSPOSE, rows * 2 + columns * 1)
    return bits.to(torch.uint8), rotates


def rotation(angle: Tensor, size: int | Tensor) -> Tensor:
    """The matrix of rotations by float32 [n] degrees: cosine and sine over half the side, float32 [n, 2]."""
    degrees = torch.remainder(angle.to(torch.float64), 360.0)
    half = torch.as_tensor(size, dtype=torch.float32) * 0.5
    cosine, sine = portable_math.cosine_and_sine(degrees)
    return torch.stack((cosine.to(torch.float32) / half, sine.to(torch.float32) / half), dim=-1)


def apply(views: Tensor, params: ViewParams, spec: ViewSpec) -> Tensor:
    """Flip, turn and rotate views, which are flipped horizontally already.

    Args:
        views: uint8 [N, 3, S, S]; may be overwritten.
        params: of this view, on the CPU.
        spec: the view.

    Returns:
        uint8 [N, 3, S, S].
    """
    if not (params.vertical_flip.any() or params.quarter_turns.any() or params.angle.any()):
        return views
    degrees = torch.remainder(params.angle.to(torch.float64), 360.0)
    cosine, sine = rotation(params.angle, spec.size).T.tolist()
    for n, (flip, turns, angle) in enumerate(
        zip(params.vertical_flip.tolist(), params.quarter_turns.tolist(), degrees.tolist(), strict=True)
    ):
        whole = angle % 90 == 0
        view = views[n].flip(1) if flip else views[n]
        view = torch.rot90(view, turns + int(angle // 90) * whole, (1, 2))
        views[n] = view if whole else _rotate(view, cosine[n], sine[n], spec)
    return views


def _rotate(view: Tensor, cosine: float, sine: float, spec: ViewSpec) -> Tensor:
    """Rotate uint8 [3, S, S] by a matrix of `rotation`: the same bits as torchvision's grid_sample on x86.

    That multiplies and adds positions in float32, but fuses a scale with a shift, and weights with a sum. A fused
    multiply-add is computed here in float64, where a product of two float32 is exact.
    """
    size, device = spec.size, view.device
    at = torch.arange(size, dtype=torch.float32, device=device) - (size - 1) / 2
    x, y = at, at[:, None]
    column = _position(x * cosine - y * sine, size)  # [S, S] float32, in pixels of the source
    row = _position(x * sine + y * cosine, size)
    padded = torch.zeros((4, size + 2 * _BORDER, size + 2 * _BORDER), device=device)
    inner = padded[:, _BORDER:-_BORDER, _BORDER:-_BORDER]
    inner[:3], inner[3] = view, 1.0  # the fourth channel says where the view is
    fill = None
    if spec.fill_colour is not None:
        fill = torch.tensor(spec.fill_colour, dtype=torch.float32, device=device)[:, None, None]
    if spec.rotate_interpolation == "nearest":
        pixels = _gather(padded, row.round(), column.round())
        rotated = pixels[:3] if fill is None else torch.where(pixels[3:] < 0.5, fill, pixels[:3])
        return rotated.round_().to(torch.uint8)
    top, left = row.floor(), column.floor()
    below, right = row - top, column - left
    above, before = 1.0 - below, 1.0 - right
    total = above * before * _gather(padded, top, left)  # [4, S, S]
    total = _multiply_add(above * right, _gather(padded, top, left + 1), total)
    total = _multiply_add(below * before, _gather(padded, top + 1, left), total)
    total = _multiply_add(below * right, _gather(padded, top + 1, left + 1), total)
    rotated = total[:3] if fill is None else (total[:3] - fill) * total[3:] + fill
    return rotated.round_().to(torch.uint8)


def _position(of_grid: Tensor, size: int) -> Tensor:
    """A position in -1 to 1 of the view in pixels, float32."""
    return ((of_grid + 1.0).to(torch.float64) * (size * 0.5) - 0.5).to(torch.float32)


def _multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c in float32, rounded once."""
    return (a.to(torch.float64) * b.to(torch.float64) + c.to(torch.float64)).to(torch.float32)


def _gather(padded: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Pixels [4, S, S] of a padded view [4, S + 2, S + 2] at rows and columns of the view; zeros from outside."""
    last = padded.shape[-1] - 1
    at = [(position.to(torch.int64) + _BORDER).clamp(0, last) for position in (row, column)]
    return padded[:, at[0], at[1]]

"""Contact sheet: each source image with its crop boxes, and its views."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.batch import DecodedBatch
from pipelines.names import visible
from pipelines.views.params import ViewParams
from pipelines.views.reference import normalize
from pipelines.views.spec import ViewSpec

_COLOURS = ("#d1495b", "#00798c", "#edae49", "#66a182", "#8d6cab", "#3d5a80", "#bc6c25", "#6c757d")
_PAPER, _INK, _FAINT = "#ffffff", "#1f2328", "#656d76"
_MARGIN, _GAP, _HEADER, _CAPTION = 24, 16, 44, 40  # pixels
_SOURCE = 264  # pixels, width of the column of source images
_LARGEST = 176  # pixels, shown side of the largest view; the others in proportion
_NAME = 16  # characters of a name above a view
_NARROWEST = 96  # pixels, so that a caption fits below a small view


def view_sheet(
    batch: DecodedBatch,
    specs: Sequence[ViewSpec],
    params: ViewParams,
    views: Sequence[Tensor],
) -> Image.Image:
    """Draw one row per image: the source with each view's crop as a labelled box, then the views, un-normalised.

    Args:
        batch: N decoded images.
        specs: V views.
        params: their augmentation parameters [V, N, ...].
        views: V tensors [N, 3, S, S], normalised, in any float type and on any device.

    Returns:
        An RGB picture, about 1,200 pixels wide for the paper's five views.
    """
    params = params.to("cpu")
    largest = max(spec.size for spec in specs)
    sides = [max(24, round(spec.size / largest * _LARGEST)) for spec in specs]
    widths = [max(side, _NARROWEST) for side in sides]
    starts = [_MARGIN + _SOURCE + _GAP + sum(widths[:v]) + v * _GAP for v in range(len(specs))]
    captions = [
        [_wrap(_applied(params.view(v), n), widths[v] + _GAP // 2) for v in range(len(specs))]
        for n in range(len(batch))
    ]
    ends = [side + 15 * (row[v].count("\n") + 1) + 10 for row in captions for v, side in enumerate(sides)]
    row_height = max(_LARGEST + _CAPTION, *ends) if ends else _LARGEST + _CAPTION
    width = starts[-1] + widths[-1] + _MARGIN
    height = _MARGIN + _HEADER + len(batch) * row_height + _MARGIN - _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)

    _heading(pen, _MARGIN, "source image", "and the crop of each view")
    for v, spec in enumerate(specs):
        role = f"task {visible(spec.task, _NAME)}" if spec.task is not None else "target only"
        _heading(pen, starts[v] + 20, visible(spec.name, _NAME), f"{spec.size} px, {role}")
        _badge(pen, starts[v], _MARGIN, v)
    pictures = [normalize.undo(view.detach().cpu()).permute(0, 2, 3, 1).contiguous().numpy() for view in views]
    for n in range(len(batch)):
        top = _MARGIN + _HEADER + n * row_height
        sheet.paste(_source(batch.image(n).cpu(), params.crop[:, n]), (_MARGIN, top))
        caption = "{1} x {0} px".format(*batch.sizes[n].tolist())
        pen.text((_MARGIN, top + _LARGEST + 5), caption, fill=_FAINT, font=_font(12))
        for v, side in enumerate(sides):
            picture = Image.fromarray(pictures[v][n]).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (starts[v], top))
            pen.multiline_text((starts[v], top + side + 5), captions[n][v], fill=_FAINT, font=_font(12), spacing=3)
    return sheet


def _heading(pen: ImageDraw.ImageDraw, left: int, title: str, subtitle: str) -> None:
    """Write a column's two-line heading."""
    pen.text((left, _MARGIN - 2), title, fill=_INK, font=_font(15))
    pen.text((left, _MARGIN + 17), subtitle, fill=_FAINT, font=_font(11))


def _badge(pen: ImageDraw.ImageDraw, left: float, top: float, v: int) -> None:
    """Draw the number of view v on its colour."""
    pen.rectangle((left, top, left + 13, top + 13), fill=_colour(v))
    pen.text((left + 7, top + 7), str(v + 1), fill=_PAPER, font=_font(11), anchor="mm")


def _source(image: Tensor, crops: Tensor) -> Image.Image:
    """The source uint8 [H, W, 3] scaled into its cell, with the crops int64 [V, 4] as labelled boxes."""
    height, width = image.shape[:2]
    scale = min(_SOURCE / width, _LARGEST / height)
    shown = (max(1, round(width * scale)), max(1, round(height * scale)))
    cell = Image.new("RGB", (_SOURCE, _LARGEST), _PAPER)
    cell.paste(Image.fromarray(image.numpy()).resize(shown, Image.Resampling.LANCZOS), (0, 0))
    pen = ImageDraw.Draw(cell)
    for v, (top, left, tall, wide) in enumerate(crops.tolist()):
        right, bottom = (left + wide) * scale - 1, (top + tall) * scale - 1
        box = (left * scale, top * scale, max(right, left * scale), max(bottom, top * scale))
        pen.rectangle(box, outline=_colour(v), width=2)
    placed: list[tuple[float, float]] = []
    for v, (top, left, _, _) in enumerate(crops.tolist()):  # over all boxes
        x, y = min(left * scale, _SOURCE - 14), min(top * scale, _LARGEST - 14)
        while any(abs(x - other_x) < 14 and abs(y - other_y) < 14 for other_x, other_y in placed):
            x += 1  # next to the badges already there
        placed.append((x, y))
        _badge(pen, x, y, v)
    return cell


def _applied(params: ViewParams, n: int) -> list[str]:
    """The augmentations of image n in one view."""
    words = []
    if params.flip[n]:
        words.append("flip")
    if params.vertical_flip[n]:
        words.append("vertical flip")
    if params.quarter_turns[n] > 0:
        words.append(f"turn {90 * int(params.quarter_turns[n])}°")
    if params.angle[n] != 0:
        words.append(f"rotate {float(params.angle[n]):.0f}°")
    if params.cutout[n, 2] > 0:
        words.append("cutout")
    if params.jitter_on[n]:
        words.append("jitter")
    if params.gray[n]:
        words.append("gray")
    if params.blur_sigma[n] > 0:
        words.append(f"blur {float(params.blur_sigma[n]):.1f}")
    if params.solarize[n]:
        words.append("solarize")
    return words


def _wrap(words: Sequence[str], width: int) -> str:
    """Join words by commas into lines at most `width` pixels wide."""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}, {word}" if lines[-1] else word
        if lines[-1] and _font(12).getlength(longer) > width:
            lines[-1] += ","
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _colour(v: int) -> str:
    """Colour of view v."""
    return _COLOURS[v % len(_COLOURS)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font at a size in pixels."""
    return ImageFont.load_default(size)

"""View specifications: how each view of an image is made, and which sets of views can be trained on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Literal, cast, get_args

from pipelines.checks import check_types
from pipelines.runtime import InputError, invalid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LARGEST_SIDE = 4096  # pixels of a view or crop; above all uses, and a batch of a few still fits in memory
MOST_VIEWS = 256  # of an image
_LONGEST_NAME = 200

Interpolation = Literal["bicubic", "bilinear"]
"""How images are resized; always antialiased."""
INTERPOLATIONS: tuple[Interpolation, ...] = ("bicubic", "bilinear")
RotateInterpolation = Literal["nearest", "bilinear"]
"""How a view is rotated by an angle that is not a multiple of 90 degrees."""
LARGEST_ANGLE = 360.0  # degrees
_WHITE = 255.0


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """How one view of an image is made. A new view type is a new ViewSpec in a recipe, nothing else.

    The operations run in this order: random resized crop, horizontal flip, vertical flip, quarter turns, rotation,
    cutout, colour jitter, grayscale, blur, solarize, normalise; each has the semantics of torchvision.transforms.v2.
    Those that move pixels come first, on uint8, as torchvision's recipes compose them: so the fill of a rotation takes
    part in the colour operations, and the cutout's box stays upright and filled with the mean.

    Attributes:
        name: of the view, for logs and pictures.
        task: key of the view's predictor; None for a target-only view.
        size: side of the square view in pixels, a multiple of 8, up to 4096.
        area: range of the crop's fraction of the image area; None for the whole image.
        ratio: range of the crop's width / height, sampled log-uniformly.
        flip: probability of a horizontal flip.
        vertical_flip: probability of a vertical flip.
        quarter_turns: probability of a rotation by 0, 90, 180 or 270 degrees, each equally likely; 1 makes all four
            orientations equally likely. Moves whole pixels.
        rotate: range of a rotation's angle in degrees counter-clockwise about the view's centre, within -360 to 360,
            sampled uniformly; one number d is the range (-d, d), and None or 0 is no rotation. The size stays, so
            corners are filled: torchvision's RandomRotation and its `functional.rotate` of uint8 views.
        rotate_interpolation: nearest or bilinear, of that rotation.
        rotate_fill: value from 0 to 255 of pixels from outside the view, or one each for red, green and blue; None is
            torchvision's None, black without its blending at the border.
        jitter: strengths of brightness, contrast, saturation and hue (0 disables one).
        jitter_p: probability of colour jitter.
        grayscale: probability of grayscale.
        blur: probability of a Gaussian blur.
        blur_kernel: taps of the blur, odd, less than twice the size.
        blur_sigma: range of the blur's standard deviation in pixels, sampled uniformly.
        solarize: probability of solarize (after the blur).
        solarize_threshold: values at or above it are inverted, in [0, 1].
        cutout: range of the box's fraction of the view area, filled with the ImageNet mean; None for no box.
        cutout_ratio: range of the box's width / height, sampled log-uniformly.
        is_target: whether the target network embeds this view, for the other views to predict.
        interpolation: bicubic, or bilinear, for which only the slower reference engine has code.
    """

    name: str
    task: str | None
    size: int = 224
    area: tuple[float, float] | None = (0.25, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: float = 0.0
    rotate: float | tuple[float, float] | None = None
    rotate_interpolation: RotateInterpolation = "bilinear"
    rotate_fill: float | tuple[float, float, float] | None = 0.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.5
    blur_kernel: int = 23
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    solarize_threshold: float = 0.5
    cutout: tuple[float, float] | None = None
    cutout_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    is_target: bool = False
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        check_types(self, f"ViewSpec({self.name!r}).", tuples=False)
        for own in fields(self):
            if isinstance(getattr(self, own.name), list):  # as in JSON; a list has no hash
                object.__setattr__(self, own.name, tuple(getattr(self, own.name)))
        if not 0 < len(self.name) <= _LONGEST_NAME or len(self.task or "") > _LONGEST_NAME:
            field, value = ("name", self.name) if not 0 < len(self.name) <= _LONGEST_NAME else ("task", self.task)
            raise invalid(f"ViewSpec.{field}", value, f"a word of at most {_LONGEST_NAME} characters", 'e.g. "local"')
        if self.task is None and not self.is_target:
            raise InputError(
                f"View {self.name!r} has neither a task nor is it a target, so nothing would use it: "
                "set ViewSpec.task to a predictor's key or ViewSpec.is_target to True."
            )
        field = f"ViewSpec({self.name!r})."
        if not isinstance(self.size, int) or not 8 <= self.size <= LARGEST_SIDE or self.size % 8:
            allowed = f"a multiple of 8, at least 8 and at most {LARGEST_SIDE:,}"
            raise invalid(f"{field}size", self.size, allowed, "round it, e.g. 224, 96 or 32")
        if self.interpolation not in INTERPOLATIONS:
            raise invalid(f"{field}interpolation", self.interpolation, "bicubic or bilinear", "choose one of these")
        chances = ("flip", "vertical_flip", "quarter_turns", "jitter_p", "grayscale", "blur", "solarize")
        for name in (*chances, "solarize_threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise invalid(field + name, getattr(self, name), "between 0 and 1", "give a probability or fraction")
        for name in ("area", "cutout"):
            bounds = getattr(self, name)
            if bounds is not None and not _is_range(bounds, most=1.0):
                raise invalid(field + name, bounds, "two fractions with 0 < low <= high <= 1", "swap or correct them")
        for name in ("ratio", "cutout_ratio", "blur_sigma"):
            bounds = getattr(self, name)
            if not _is_range(bounds, most=sys.float_info.max):
                raise invalid(field + name, bounds, "two finite numbers with 0 < low <= high", "correct them")
        self._check_rotation(field)
        largest = (1.0, 1.0, 1.0, 0.5)
        if not (
            isinstance(self.jitter, Sequence)
            and len(self.jitter) == len(largest)
            and all(
                isinstance(strength, Real) and 0.0 <= strength <= most
                for strength, most in zip(self.jitter, largest, strict=True)
            )
        ):
            raise invalid(
                f"{field}jitter",
                self.jitter,
                "brightness, contrast and saturation in [0, 1] and hue in [0, 0.5]",
                "use the paper's (0.4, 0.4, 0.2, 0.1)",
            )
        if self.blur > 0 and (self.blur_kernel < 1 or self.blur_kernel % 2 == 0 or self.blur_kernel // 2 >= self.size):
            raise invalid(
                f"{field}blur_kernel",
                self.blur_kernel,
                f"odd and at most {2 * self.size - 1} for a view of {self.size} pixels (reflect border)",
                "take a smaller odd number or set blur to 0",
            )

    @property
    def degrees(self) -> tuple[float, float]:
        """Lowest and highest angle of the rotation; (0, 0) for none."""
        if self.rotate is None:
            return 0.0, 0.0
        return self.rotate if isinstance(self.rotate, tuple) else (-self.rotate, self.rotate)

    @property
    def fill_colour(self) -> tuple[float, float, float] | None:
        """Red, green and blue of `rotate_fill`, 0 to 255."""
        fill = self.rotate_fill
        return fill if fill is None or isinstance(fill, tuple) else (fill, fill, fill)

    def _check_rotation(self, field: str) -> None:
        """Check the fields of the rotation."""
        low, high = -LARGEST_ANGLE, LARGEST_ANGLE
        if not (
            self.rotate is None
            or (_are_numbers((self.rotate,), low=0, high=high))
            or (_are_numbers(self.rotate, count=2, low=low, high=high) and self.degrees[0] <= self.degrees[1])
        ):
            allowed = "degrees from 0 to 360, a range (low, high) with -360 <= low <= high <= 360, or None"
            raise invalid(f"{field}rotate", self.rotate, allowed, "e.g. 180 for any angle, or (-15, 15)")
        if self.rotate_interpolation not in get_args(RotateInterpolation):
            allowed = "nearest or bilinear"
            raise invalid(f"{field}rotate_interpolation", self.rotate_interpolation, allowed, "choose one of these")
        fill = self.rotate_fill
        if not (fill is None or _are_numbers((fill,), high=_WHITE) or _are_numbers(fill, count=3, high=_WHITE)):
            allowed = "a number from 0 to 255, three of them (red, green, blue), or None"
            raise invalid(f"{field}rotate_fill", fill, allowed, "e.g. 255 for white")


def _are_numbers(values: object, *, count: int = 1, low: float = 0.0, high: float) -> bool:
    """Whether these are `count` numbers, each from `low` to `high`."""
    if not isinstance(values, tuple) or len(values) != count:
        return False
    return all(
        isinstance(value, Real) and not isinstance(value, bool) and low <= cast(float, value) <= high
        for value in values
    )


def _is_range(bounds: object, *, most: float) -> bool:
    """Whether `bounds` is a pair of numbers with 0 < low <= high <= most."""
    if not (isinstance(bounds, Sequence) and len(bounds) == 2 and all(isinstance(bound, Real) for bound in bounds)):
        return False
    return bool(0.0 < bounds[0] <= bounds[1] <= most)


def tasks(specs: Sequence[ViewSpec]) -> tuple[str, ...]:
    """The distinct tasks of the views, in order of first appearance: one predictor each."""
    return tuple(dict.fromkeys(spec.task for spec in specs if spec.task is not None))


def sizes_by_task(specs: Sequence[ViewSpec]) -> dict[str | None, str]:
    """Edge of each task's views in pixels, e.g. "224", or "96/64" if they differ; None has the target-only views."""
    names = [*tasks(specs), *([None] if any(spec.task is None for spec in specs) else [])]
    return {name: "/".join(dict.fromkeys(str(spec.size) for spec in specs if spec.task == name)) for name in names}


def check_views(specs: Sequence[ViewSpec]) -> None:
    """Check that a set of views can be trained on.

    Raises:
        InputError: no view, no target, a name given twice, or a view that has no target of another view to predict.
    """
    if not specs:
        raise InputError("views is empty but must hold at least two views: use paper_views().")
    if len(specs) > MOST_VIEWS:
        raise InputError(f"views has {len(specs):,} views but must have at most {MOST_VIEWS}: leave some out.")
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise InputError(f"views has names {names} but each name must be unique: rename the repeated views.")
    targets = [spec.name for spec in specs if spec.is_target]
    for spec in specs:
        if spec.task is not None and not [name for name in targets if name != spec.name]:
            raise InputError(
                f"View {spec.name!r} has no target to predict (targets: {targets}): set is_target=True on another view."
            )

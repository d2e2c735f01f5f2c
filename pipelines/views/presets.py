"""View presets: the paper's (arXiv 2602.05845; multi-task, two-view baselines, ablations), and for other pictures."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.checks import typed
from pipelines.runtime import InputError, invalid
from pipelines.views.spec import MOST_VIEWS, ViewSpec

# Differences between the two views of a pair in BYOL, MoCo v3 and the paper.
_FIRST: Mapping[str, Any] = {"blur": 1.0}
_SECOND: Mapping[str, Any] = {"blur": 0.1, "solarize": 0.2}
_CUTOUT = (0.2, 0.4)
_ANY_WAY_UP: Mapping[str, Any] = {"vertical_flip": 0.5, "quarter_turns": 1.0}
VIEW_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "microscopy": {**_ANY_WAY_UP, "jitter": (0.3, 0.3, 0.2, 0.04), "grayscale": 0.0, "solarize": 0.0},
    "aerial": {**_ANY_WAY_UP, "jitter": (0.4, 0.4, 0.2, 0.05), "solarize": 0.0},
    "astronomy": {
        "vertical_flip": 0.5,
        "rotate": 180.0,
        "jitter": (0.2, 0.2, 0.0, 0.0),
        "grayscale": 0.0,
        "solarize": 0.0,
    },
    "radiology": {"rotate": 10.0, "jitter": (0.4, 0.4, 0.0, 0.0), "grayscale": 0.0, "solarize": 0.0},
    "documents": {"flip": 0.0, "rotate": 3.0, "rotate_fill": 255.0, "solarize": 0.0},
}
"""What a preset changes in every view of a recipe, for pictures that are no photographs.

The page README.md in this folder says which to choose, why, and the sources of what is done; the strengths are ours,
and no accuracy was measured with them.
"""
_NO_PHOTOMETRICS: Mapping[str, Any] = {"flip": 0.0, "jitter_p": 0.0, "grayscale": 0.0, "blur": 0.0}


def _pair(
    first: Mapping[str, Any], second: Mapping[str, Any], stem: str = "view", **both: Any
) -> tuple[ViewSpec, ViewSpec]:
    """Two targets of task "global", named `stem`_1 and _2, with their own and their common settings."""
    shared = {"task": "global", "is_target": True, **both}
    return ViewSpec(name=f"{stem}_1", **shared, **first), ViewSpec(name=f"{stem}_2", **shared, **second)


@typed
def paper_views(
    *,
    num_local: int = 2,
    num_cutout: int = 1,
    num_global_more: int = 0,
    size: int = 224,
    local_size: int = 96,
    blur_kernel: int = 23,
) -> tuple[ViewSpec, ...]:
    """The views of the paper's multi-task recipes: two global, then local, then cutout views.

    Source: PAPER.md section 2 (arXiv 2602.05845 and its release). `size`, `local_size` and `blur_kernel` differ from
    the paper's 224, 96 and 23 in the small recipes only.

    Raises:
        InputError: a count is negative, or a size does not fit ViewSpec.
    """
    for field, count in (("num_local", num_local), ("num_cutout", num_cutout), ("num_global_more", num_global_more)):
        if not 0 <= count <= MOST_VIEWS:
            raise invalid(field, count, f"0 to {MOST_VIEWS}", "give the number of such views per image")

    more = (
        ("local", num_local, {"size": local_size, "area": (0.08, 0.25)}),
        ("cutout", num_cutout, {"size": size, "cutout": _CUTOUT}),
        ("global_more", num_global_more, {"size": size}),
    )
    return (
        *_pair(_FIRST, _SECOND, "global", size=size, blur_kernel=blur_kernel),
        *(
            ViewSpec(name=f"{task}_{i + 1}", task=task, blur_kernel=blur_kernel, **values)
            for task, count, values in more
            for i in range(count)
        ),
    )


@typed
def adapt_views(views: Sequence[ViewSpec], preset: str) -> tuple[ViewSpec, ...]:
    """Views changed for other pictures by a preset of `VIEW_PRESETS`; sizes, crops, blur and tasks stay as they are.

    Raises:
        InputError: there is no preset of this name.
    """
    if preset not in VIEW_PRESETS:
        near = difflib.get_close_matches(preset, VIEW_PRESETS, n=1)
        remedy = f"did you mean {near[0]!r}" if near else "choose one of these"
        raise invalid("view_preset", preset, f"one of {', '.join(VIEW_PRESETS)}", remedy)
    return tuple(dataclasses.replace(view, **VIEW_PRESETS[preset]) for view in views)


@typed
def microscopy_views(
    *, num_local: int = 2, num_cutout: int = 1, size: int = 224, local_size: int = 96, blur_kernel: int = 23
) -> tuple[ViewSpec, ...]:
    """The paper's views for stained tissue, cells and other microscopy: `paper_views` adapted by "microscopy"."""
    views = paper_views(
        num_local=num_local, num_cutout=num_cutout, size=size, local_size=local_size, blur_kernel=blur_kernel
    )
    return adapt_views(views, "microscopy")


@typed
def aerial_views(
    *, num_local: int = 2, num_cutout: int = 1, size: int = 224, local_size: int = 96, blur_kernel: int = 23
) -> tuple[ViewSpec, ...]:
    """The paper's views for aerial and satellite images: `paper_views` adapted by "aerial"."""
    views = paper_views(
        num_local=num_local, num_cutout=num_cutout, size=size, local_size=local_size, blur_kernel=blur_kernel
    )
    return adapt_views(views, "aerial")


@typed
def byol_views(*, size: int = 224, blur_kernel: int = 23) -> tuple[ViewSpec, ViewSpec]:
    """The two views of the BYOL baseline: crops of area 0.08 to 1 (PAPER.md section 2)."""
    return _pair(_FIRST, _SECOND, area=(0.08, 1.0), size=size, blur_kernel=blur_kernel)


@typed
def mocov3_views(*, size: int = 224, blur_kernel: int = 23) -> tuple[ViewSpec, ViewSpec]:
    """The two views of the MoCo v3 baseline: BYOL's with crops of area 0.2 to 1 (PAPER.md section 2)."""
    return _pair(_FIRST, _SECOND, area=(0.2, 1.0), size=size, blur_kernel=blur_kernel)


@typed
def simsiam_views(*, size: int = 224, blur_kernel: int = 23) -> tuple[ViewSpec, ViewSpec]:
    """The two views of the SimSiam baseline, alike: area 0.2 to 1, saturation 0.4, blur 0.5 (PAPER.md section 2)."""
    return _pair({}, {}, area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), blur=0.5, size=size, blur_kernel=blur_kernel)


@typed
def no_crop_views(*, size: int = 224, blur_kernel: int = 23) -> tuple[ViewSpec, ViewSpec]:
    """Ablation: BYOL's two views of the whole image, resized (PAPER.md section 2)."""
    return _pair(_FIRST, _SECOND, area=None, size=size, blur_kernel=blur_kernel)


@typed
def crop_only_views(*, size: int = 224) -> tuple[ViewSpec, ViewSpec]:
    """Ablation: BYOL's random resized crop and nothing else (PAPER.md section 2)."""
    return _pair({}, {}, area=(0.08, 1.0), size=size, **_NO_PHOTOMETRICS)


@typed
def cutout_only_views(*, both: bool, size: int = 224) -> tuple[ViewSpec, ViewSpec]:
    """Ablation: the whole image, resized, with a box cut out of view 1 or of both views (PAPER.md section 2)."""
    return _pair({"cutout": _CUTOUT}, {"cutout": _CUTOUT if both else None}, area=None, size=size, **_NO_PHOTOMETRICS)


@typed
def asymmetric(views: Sequence[ViewSpec]) -> tuple[ViewSpec, ViewSpec]:
    """A pair in which view 1 predicts view 2 but not vice versa: view 1 keeps its task, view 2 is the target.

    Raises:
        InputError: these are not two views.
    """
    if len(views) != 2:
        names = [view.name for view in views]
        raise InputError(f"views is {names} but must be two views: give a two-view preset, e.g. byol_views().")
    first, second = views
    return dataclasses.replace(first, is_target=False), dataclasses.replace(second, task=None, is_target=True)

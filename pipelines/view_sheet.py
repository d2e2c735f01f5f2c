"""Renders a contact sheet of views: `python -m pipelines.view_sheet DATA OUT.png`.

For the views of a recipe: `mvssl-train RECIPE --print-config | python -m pipelines.view_sheet DATA OUT.png --views -`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from pipelines import DecodedBatch, InputError, ViewEngine, ViewSpec, draw, paper_views
from pipelines.decode import make_decoder
from pipelines.files import parse_json, read_regular, strict_text
from pipelines.loading.deep_images import state_value_range
from pipelines.names import visible
from pipelines.order import Order
from pipelines.runtime import parse_arguments, run_cli
from pipelines.storage import check_outside, open_source
from pipelines.storage.image_facts import facts_of
from pipelines.value_range import parse_value_range
from pipelines.views.sheet import view_sheet

_LARGEST = 1 << 22  # bytes of a recipe


@dataclass(frozen=True, kw_only=True)
class Options:
    """Render source images with their crops, and all their views, as one PNG."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder of images, list of files, tars, Parquet or converted data."""
    out: Annotated[Path, tyro.conf.Positional]
    """PNG file to write."""
    num_images: int = 6
    """Rows of the sheet."""
    seed: int = 0
    """Selects the images and their augmentation parameters."""
    epoch: int = 0
    """Epoch of the augmentation parameters."""
    size: int = 224
    """Side of the global and cutout views in pixels."""
    local_size: int = 96
    """Side of the local views in pixels."""
    num_local: int = 2
    """Local views per image."""
    num_cutout: int = 1
    """Cutout views per image."""
    blur_kernel: int = 23
    """Taps of the blur."""
    value_range: str | None = None
    """MIN..MAX of the values of images with more than 8 bits, such as 0..4095."""
    views: Path | None = None
    """JSON with a recipe's views, as written by `mvssl-train RECIPE --print-config`; - reads standard input. Replaces
    the paper's views and the options for them above."""


def run(options: Options) -> None:
    """Write the sheet.

    Raises:
        InputError: the data cannot be used, has fewer images than rows, or no selected image can be decoded.
        OSError: the file cannot be written.
    """
    specs = _specs(options)
    check_outside(options.out, options.data, field="out")
    source = open_source(options.data)
    state_value_range(source, None if options.value_range is None else parse_value_range(options.value_range))
    if options.num_images > len(source):
        raise InputError(
            f"num_images is {options.num_images} but {options.data} has only {len(source)} images: lower --num-images."
        )
    order = Order(num_images=len(source), batch_size=options.num_images, seed=options.seed)
    index = order.batch(options.epoch, 0)  # int64 [num_images]
    known = facts_of(source).value_range
    decoder = make_decoder("pillow", device="cpu", batch_size=options.num_images, threads=1, value_range=known)
    decoded = decoder([source.read(int(i)) for i in index])
    for position, reason in decoded.failures.items():
        print(visible(f"skipping {source.key(int(index[position]))}: {reason}"), file=sys.stderr)
    good = [int(i) for position, i in enumerate(index) if position not in decoded.failures]
    if not good:
        raise InputError(f"None of the {len(index)} chosen images of {options.data} can be decoded: try another seed.")
    batch = DecodedBatch.packed(decoded.pixels, sizes=decoded.sizes, index=torch.tensor(good))
    params = draw(specs, batch.sizes, seed=options.seed, epoch=options.epoch, index=batch.index)
    view_sheet(batch, specs, params, ViewEngine(specs)(batch, params)).save(options.out, format="PNG")
    decoder.close()
    source.close()


def _specs(options: Options) -> tuple[ViewSpec, ...]:
    if options.views is not None:
        return _read_views(options.views)
    return paper_views(
        num_local=options.num_local,
        num_cutout=options.num_cutout,
        size=options.size,
        local_size=options.local_size,
        blur_kernel=options.blur_kernel,
    )


def _text(path: Path) -> str:
    return strict_text(read_regular(path, most=_LARGEST))


def _read_views(path: Path) -> tuple[ViewSpec, ...]:
    """The views in a recipe's JSON."""
    remedy = "write it with mvssl-train RECIPE --print-config"
    try:
        plain = parse_json(sys.stdin.read(_LARGEST) if str(path) == "-" else _text(path))
    except (OSError, ValueError) as error:
        raise InputError(f"views is {str(path)!r}, which cannot be read as JSON ({error}): {remedy}.") from error
    views = plain.get("views") if isinstance(plain, dict) else plain
    if not isinstance(views, list) or not views or not all(isinstance(view, dict) for view in views):
        raise InputError(f"views is {str(path)!r}, which has no list of views under 'views': {remedy}.")
    known = {field.name for field in fields(ViewSpec)}
    specs = []
    for number, view in enumerate(views):
        unknown = sorted(set(view) - known)
        if unknown:
            raise InputError(f"view {number} of {path} has the unknown field {unknown[0]!r}: {remedy}.")
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in view.items()}
            specs.append(ViewSpec(**values))
        except TypeError as error:
            raise InputError(f"view {number} of {path} is no view ({error}): {remedy}.") from error
    return tuple(specs)


def main() -> None:
    """Run the command; exits the process."""
    run_cli(lambda: run(parse_arguments(Options, prog="python -m pipelines.view_sheet")))


if __name__ == "__main__":
    main()

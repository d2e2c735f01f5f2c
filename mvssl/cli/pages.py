"""The pages of mvssl-eval: nearest neighbours, the map of features, attention maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mvssl.config.evaluation import BackboneSource, ComputeOptions, EvalOptions
from pipelines.checks import between, check_fields
from pipelines.runtime import InputError, parse_arguments

if TYPE_CHECKING:  # with torch, which takes seconds and help does not need
    from mvssl.evaluate.session import EvalSession


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Images and place of a page.

    Attributes:
        data: images, labelled or not; by default those of the run. Its train/ and val/ are used where they exist.
        val: images to look at; by default DATA/val, or the run's --val.
        out: folder for the page, or the page itself, ending in .html; by default RUN. An existing page is replaced.
    """

    data: Path | None = None
    val: Path | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self, with_class=False)
        if self.out is not None and self.out.is_file() and self.out.suffix != ".html":
            raise InputError(f"out is {str(self.out)!r}, a file, but must be a folder or end in .html: choose another.")


@dataclass(frozen=True, kw_only=True)
class PageArguments:
    """Arguments of every page.

    Attributes:
        source: which backbone.
        options: which images, where the page goes.
        compute: where and how features are computed.
    """

    source: Annotated[BackboneSource, tyro.conf.arg(name="")]
    options: Annotated[PageOptions, tyro.conf.arg(name="")] = field(default_factory=PageOptions)
    compute: Annotated[ComputeOptions, tyro.conf.arg(name="")] = field(default_factory=ComputeOptions)


@dataclass(frozen=True, kw_only=True)
class NeighboursArguments(PageArguments):
    """A page of nearest neighbours: images of val among those of train, or without val each image among all others.

    Labels are not needed; with labels, neighbours of the same class are marked. The page also shows images that their
    neighbours contradict, near duplicates, and images far from all others.

    Attributes:
        images: queries that are shown, evenly spaced.
        k: neighbours of each.
        max_images: images of train, and of val, that are taken, evenly spaced.
    """

    images: int = between(1, 200, 12)
    k: int = between(1, 50, 8)
    max_images: int = between(1, 1_000_000, 5000)

    def __post_init__(self) -> None:
        check_fields(self, with_class=False)


def run_neighbours(arguments: Sequence[str]) -> None:
    """Write RUN/neighbours.html."""
    asked = parse_arguments(NeighboursArguments, prog="mvssl-eval neighbours", args=arguments)
    with _open(asked, "neighbours") as (session, page):
        from mvssl.evaluate.pages.write import write_neighbours

        write_neighbours(session, page, images=asked.images, k=asked.k, most=asked.max_images)


@dataclass(frozen=True, kw_only=True)
class ScatterArguments(PageArguments):
    """A map of the features with a thumbnail of every point: PCA, and UMAP where umap-learn is installed.

    Attributes:
        max_images: number of images, evenly spaced; 5,000 make a page of 6 to 9 MB.
        umap: auto takes UMAP where umap-learn is installed; on needs it; off leaves it out.
        seed: of UMAP.
    """

    max_images: int = between(1, 20_000, 5000)
    umap: Literal["auto", "on", "off"] = "auto"
    seed: int = between(0, 2**32 - 1, 0)

    def __post_init__(self) -> None:
        check_fields(self, with_class=False)


def run_scatter(arguments: Sequence[str]) -> None:
    """Write RUN/scatter.html."""
    asked = parse_arguments(ScatterArguments, prog="mvssl-eval scatter", args=arguments)
    with _open(asked, "scatter") as (session, page):
        from mvssl.evaluate.pages.write import write_scatter

        write_scatter(session, page, most=asked.max_images, use_umap=asked.umap, seed=asked.seed)


@dataclass(frozen=True, kw_only=True)
class AttentionArguments(PageArguments):
    """Where the backbone looks, as overlays on images: a page and a PNG.

    Of a vision transformer: attention of the class token in the last block, averaged and of each head. Of other
    networks: the norm of the last feature map. A larger --resize and --crop (a multiple of the patch size) gives finer
    maps.

    Attributes:
        images: number of images, evenly spaced.
        kind: auto takes attention where the backbone has it, else activation.
    """

    images: int = between(1, 200, 8)
    kind: Literal["auto", "attention", "activation"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self, with_class=False)


def run_attention(arguments: Sequence[str]) -> None:
    """Write RUN/attention.html and RUN/attention.png."""
    asked = parse_arguments(AttentionArguments, prog="mvssl-eval attention", args=arguments)
    with _open(asked, "attention") as (session, page):
        from mvssl.evaluate.pages.write import write_attention

        picture = session.check_picture(page.with_suffix(".png"))
        write_attention(session, page, picture, images=asked.images, kind=asked.kind)
        session.say(f"Picture: {picture}")


@contextmanager
def _open(asked: PageArguments, name: str) -> Iterator[tuple[EvalSession, Path]]:
    """The session and the page to write; says where it is, and links it from the run's report."""
    from mvssl.evaluate.pages.write import refresh_report
    from mvssl.evaluate.session import open_session

    out = asked.options.out
    is_page = out is not None and out.suffix == ".html" and not out.is_dir()
    cache = out
    if out is not None and is_page:  # the features go to the run's others
        cache = None if asked.source.run is not None else out.parent
    options = EvalOptions(data=asked.options.data, val=asked.options.val, out=cache)
    with open_session(asked.source, options, asked.compute) as session:
        if out is not None:
            page = out if is_page else out / f"{name}.html"
        elif session.loaded.folder is not None and session.loaded.name == "online":
            page = session.loaded.folder.path / f"{name}.html"
        else:
            page = session.out / f"{name}-{session.loaded.name}.html"
        yield session, page
        session.say(f"Page: {page}")
        if out is None:
            session.world.run_on_rank0(lambda: refresh_report(session.loaded.folder))


PAGES: dict[str, Callable[[Sequence[str]], None]] = {
    "neighbours": run_neighbours,
    "scatter": run_scatter,
    "attention": run_attention,
}

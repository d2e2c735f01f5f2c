"""Writes the pages of a backbone: those that mvssl-eval is asked for, and those at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import nn

from mvssl.config.recipe import Evaluation
from mvssl.evaluate.attention import MapKind
from mvssl.evaluate.pages.attention_page import attention_page, attention_picture, map_images
from mvssl.evaluate.pages.gallery import Gallery, cached_gallery, embedded_gallery
from mvssl.evaluate.pages.neighbour_page import neighbour_page
from mvssl.evaluate.pages.scatter_page import MOST_POINTS, directions, scatter_page
from mvssl.evaluate.projection import NEEDS_UMAP, UMAP_IMAGES, Projection, has_umap, pca, umap
from mvssl.evaluate.session import EvalSession, Session
from mvssl.monitor.report import write_report
from mvssl.runs.folder import RunFolder
from pipelines.files import whole_file, write_whole
from pipelines.progress import Progress
from pipelines.runtime import InputError, invalid
from pipelines.storage.source import Source

AFTER_RUN, FEWEST = 1000, 24
"""Most images of the pages at the end of a run, and the fewest for which they are made."""
TRAINED_PER_SHOWN = 20
"""Images that a run trains on for each that its pages embed: reading them takes at most 5 % of the run's time, and the
forward of one view, without gradients, far less."""

logger = logging.getLogger("mvssl")


def about_backbone(session: EvalSession) -> list[str]:
    """Lines on which backbone a page is of."""
    loaded = session.loaded
    run = "" if loaded.folder is None else f", run {loaded.folder.path}"
    network = f", {loaded.about or loaded.name}{run}"
    evaluation = loaded.evaluation
    crop = f"resize {evaluation.resize} ({evaluation.interpolation}), crop {evaluation.crop}"
    return [f"{loaded.architecture}{network}; {crop}."]


def write_neighbours(session: EvalSession, path: Path, *, images: int, k: int, most: int) -> None:
    """Write the page of nearest neighbours: val among train, or without val each training image among all others.

    Args:
        session: the backbone and the images.
        path: the page; an existing one is replaced.
        images: queries that are shown.
        k: neighbours of each.
        most: images of each part that are compared, evenly spaced.

    Raises:
        InputError: images cannot be decoded, or features are not finite.
    """
    bank = cached_gallery(session, session.train, "train", most=most)
    queries = None if session.val is None else cached_gallery(session, session.val, "val", most=most)
    _say_sampled(session, bank, queries)
    about = about_backbone(session)
    session.world.run_on_rank0(lambda: _write(path, neighbour_page(bank, queries, about=about, images=images, k=k)))


def write_scatter(session: EvalSession, path: Path, *, most: int, use_umap: str = "auto", seed: int = 0) -> None:
    """Write the map of features of the validation images, or without val of the training images.

    Args:
        session: the backbone and the images.
        path: the page; an existing one is replaced.
        most: number of images, evenly spaced; at most `MOST_POINTS`.
        use_umap: auto adds UMAP where umap-learn is installed, on needs it, off leaves it out.
        seed: of UMAP.

    Raises:
        InputError: UMAP is needed but not installed, images cannot be decoded, or features are not finite.
    """
    if use_umap == "on" and not has_umap():
        raise InputError(f"umap is 'on' but {NEEDS_UMAP}, or leave --umap out.", field="umap")
    if not 1 <= most <= MOST_POINTS:
        raise invalid("max_images", most, f"between 1 and {MOST_POINTS:,}", "a page holds no more")
    source, name = (session.train, "train") if session.val is None else (session.val, "val")
    gallery = cached_gallery(session, source, name, most=most)
    _say_sampled(session, gallery)

    def write() -> None:
        projections = {"PCA": pca(directions(gallery.features))}
        if use_umap != "off":
            if not has_umap():
                session.say(f"UMAP is left out: {NEEDS_UMAP}.")
            elif len(gallery) < UMAP_IMAGES:
                session.say(f"UMAP is left out: it needs {UMAP_IMAGES} images or more.")
            else:
                session.say("Computing UMAP (its first use compiles for a while)")
                projections["UMAP"] = umap(gallery.features, seed=seed)
        with Progress(session.console, "thumbnails", total=len(gallery)) as progress:
            page = scatter_page(gallery, projections, about=about_backbone(session), progress=progress.add)
        _write(path, page)

    session.world.run_on_rank0(write)


def write_attention(session: EvalSession, page: Path, picture: Path, *, images: int, kind: MapKind = "auto") -> None:
    """Write the page and the PNG of attention or activation maps of some validation or training images.

    Raises:
        InputError: images cannot be decoded, or the backbone has no such maps.
    """
    source = session.train if session.val is None else session.val

    def write() -> None:
        evaluation = session.loaded.evaluation
        mapped = map_images(session, session.loaded.backbone, source, evaluation, images=images, kind=kind)
        _write(page, attention_page(mapped, about=about_backbone(session)))
        with whole_file(picture) as temporary:
            attention_picture(mapped).save(temporary, format="PNG")

    session.world.run_on_rank0(write)


def write_after_run(
    session: Session,
    backbone: nn.Module,
    source: Source,
    evaluation: Evaluation,
    folder: RunFolder,
    *,
    trained: int,
    about: str,
) -> list[str]:
    """Write the pages of a finished run, of a few of its training images; what fails is a warning in the log.

    Args:
        session: device, precision and decoder, of one process.
        backbone: images [B, 3, S, S] to features [B, D], on the device.
        source: the training images.
        evaluation: resize and crop.
        folder: the run.
        trained: images that the run has trained on, epochs times images: `TRAINED_PER_SHOWN` of them allow one.
        about: the line below the titles.

    Returns:
        The names of the pages written; none if the run was too short for them.
    """
    most = min(AFTER_RUN, len(source), trained // TRAINED_PER_SHOWN)
    if most < FEWEST:
        return []
    written: list[str] = []

    def attempt(path: Path, make: Callable[[], str]) -> None:
        try:
            write_whole(path, make())
            written.append(path.name)
        except Exception as error:  # whatever it is, the run is done and saved
            logger.warning("%s could not be written: %s", path, str(error) or type(error).__name__)

    try:
        gallery = embedded_gallery(session, backbone, source, evaluation, most=most)
    except Exception as error:
        logger.warning("the pages of what was learned could not be made: %s", str(error) or type(error).__name__)
        return []
    attempt(folder.neighbours, lambda: neighbour_page(gallery, about=[about]))
    attempt(folder.scatter, lambda: scatter_page(gallery, _principal(gallery), about=[about]))

    def maps() -> str:
        mapped = map_images(session, backbone, source, evaluation, images=8)
        with whole_file(folder.attention_picture) as temporary:
            attention_picture(mapped).save(temporary, format="PNG")
        return attention_page(mapped, about=[about])

    attempt(folder.attention, maps)
    return written


def _principal(gallery: Gallery) -> dict[str, Projection]:
    return {"PCA": pca(directions(gallery.features))}


def _write(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)


def _say_sampled(session: Session, *galleries: Gallery | None) -> None:
    """Say which data sets were sampled."""
    for gallery in galleries:
        if gallery is not None and gallery.is_sample:
            session.say(f"Taken are {gallery.described} (--max-images takes more)")


def refresh_report(folder: RunFolder | None) -> None:
    """Write the report of a run again, with the links to its pages, if there is one; a failure is a warning."""
    if folder is None or not folder.report.exists():
        return
    try:
        write_report(folder.report, folder)
    except (OSError, InputError) as error:
        logger.warning("%s could not be written: %s", folder.report, error)

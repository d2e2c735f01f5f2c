"""The page of nearest neighbours: evenly spaced queries, the most contradicted labels, near duplicates and outliers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from mvssl.evaluate.neighbours import nearest_images
from mvssl.evaluate.pages.gallery import Gallery, data_uri, evenly, render_page

MOST_QUERIES = 1000
"""Queries that agreement, duplicates and outliers are counted and sought among."""
_FOUND = 12  # rows of each of these sections


@dataclass(frozen=True, kw_only=True)
class _Section:
    """A part of the page; `rows` are as the template reads them, `pairs` shows the first neighbour only."""

    title: str
    about: str
    rows: list[dict[str, Any]]
    pairs: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """Neighbours of some queries.

    Attributes:
        bank: the images that were searched.
        queries: the images that were looked for; those of the bank itself if `own`.
        own: whether each image of the bank was compared with all others.
        rows: int64 [Q], rows of the queries.
        nearest: int64 [Q, k], rows of the bank.
        cosine: float [Q, k], descending.
        uris: pictures made so far, by gallery and row.
    """

    bank: Gallery
    queries: Gallery
    own: bool
    rows: NDArray[np.int64]
    nearest: NDArray[np.int64]
    cosine: NDArray[np.float64]
    uris: dict[tuple[bool, int], Markup] = field(default_factory=dict)

    def same(self) -> NDArray[np.float64]:
        """Float [Q, k]: 1 for the same class, 0 for another one, NaN where a label is missing."""
        bank, queries = np.array(self.bank.classes), np.array(self.queries.classes)
        theirs, ours = bank[self.nearest], queries[self.rows][:, None]
        known = (theirs != "") & (ours != "")
        same: NDArray[np.float64] = np.where(known, theirs == ours, np.nan)
        return same

    def picture(self, row: int, *, of_query: bool) -> Markup:
        """A thumbnail as an address."""
        in_bank = self.own or not of_query
        if (in_bank, row) not in self.uris:
            gallery = self.bank if in_bank else self.queries
            self.uris[in_bank, row] = data_uri(gallery.thumbnail(row))
        return self.uris[in_bank, row]

    def described(self, number: int, same: NDArray[np.float64], k: int) -> dict[str, Any]:
        """Query `number` and its k nearest images, as the template reads them."""
        row = int(self.rows[number])
        near = []
        for other, cosine, is_same in zip(
            self.nearest[number, :k].tolist(), self.cosine[number, :k].tolist(), same[number, :k].tolist(), strict=True
        ):
            kind = "plain" if is_same != is_same else "right" if is_same else "wrong"
            sign = {"right": "\u2713", "wrong": "\u2717", "plain": ""}[kind]
            meaning = {"right": "same class", "wrong": "another class", "plain": ""}[kind]
            near.append(
                {
                    "kind": kind,
                    "sign": sign,
                    "meaning": meaning,
                    "cosine": cosine,
                    "width": round(100 * min(max(cosine, 0.0), 1.0), 1),
                    "key": self.bank.keys[other],
                    "class_name": self.bank.classes[other],
                    "picture": self.picture(other, of_query=False),
                }
            )
        known = ~np.isnan(same[number, :k])
        score = f"{int(np.nansum(same[number, :k]))} of {int(known.sum())} of its class" if known.any() else ""
        return {
            "key": self.queries.keys[row],
            "class_name": self.queries.classes[row],
            "picture": self.picture(row, of_query=True),
            "near": near,
            "score": score,
        }


def neighbour_page(
    bank: Gallery, queries: Gallery | None = None, *, about: list[str], images: int = 12, k: int = 8
) -> str:
    """The page as HTML.

    Args:
        bank: the images to search.
        queries: the images to look for; None compares each image of the bank with all others.
        about: lines below the title.
        images: number of queries in its first part, evenly spaced.
        k: neighbours of each; fewer if the bank has fewer images.
    """
    own = queries is None
    asked = bank if queries is None else queries
    shown, counted = evenly(len(asked), images), evenly(len(asked), MOST_QUERIES)
    rows = np.unique(np.concatenate([shown, counted]))
    most = min(k, len(bank) - own)
    cosine, nearest = nearest_images(bank.features, None if own else asked.features, rows.tolist(), k=most)
    found = _Found(
        bank=bank,
        queries=asked,
        own=own,
        rows=rows,
        nearest=nearest.cpu().numpy(),
        cosine=cosine.double().cpu().numpy(),
    )
    labelled = bank.labelled and asked.labelled
    compared = f"Compared with {bank.described}."
    lines = [*about, compared] if own else [*about, compared, f"Queries: {asked.described}."]
    if most == 0:
        lines.append("There is no other image to compare with.")
    return render_page(
        "neighbours.html.j2",
        title="Nearest neighbours",
        about=lines,
        agreement=_agreement(found, most) if labelled and most else "",
        labelled=labelled,
        sections=_sections(found, shown, most, labelled=labelled),
    )


def _agreement(found: _Found, k: int) -> str:
    """How often neighbours have the class of the query, in words; "" if there is no such pair."""
    same = found.same()
    if np.isnan(same).all():
        return ""
    first = same[:, 0][~np.isnan(same[:, 0])]
    by_class = np.array(found.bank.classes)
    shares = np.unique(by_class[by_class != ""], return_counts=True)[1] / max(1, int((by_class != "").sum()))
    nearest = f"the nearest image has the class of the query for {100 * first.mean():.1f} %, and " if len(first) else ""
    return (
        f"Of {len(found.rows):,} queries {nearest}{100 * np.nanmean(same):.1f} % of all {k} neighbours do "
        f"(by chance {100 * float((shares**2).sum()):.1f} %)."
    )


def _sections(found: _Found, shown: NDArray[np.int64], k: int, *, labelled: bool) -> list[_Section]:
    """The parts of the page that have something to show."""
    same = found.same()
    number_of = {row: number for number, row in enumerate(found.rows.tolist())}
    first = [found.described(number_of[row], same, k) for row in shown.tolist()]
    sections = [_Section(title="Evenly spaced images", about="One row for each query, nearest first.", rows=first)]
    if k == 0 or len(found.rows) < 2 * _FOUND:  # all of them are shown already
        return sections
    among = f"Among {len(found.rows):,} queries"
    agree = np.nanmean(np.where(np.isnan(same).all(axis=1, keepdims=True), 1.0, same), axis=1)  # [Q]
    contradicted = [number for number in np.lexsort((-found.cosine[:, 0], agree)).tolist() if agree[number] < 0.5]
    if labelled and contradicted:
        sections.append(
            _Section(
                title="Contradicted by their neighbours",
                about=f"{among}, those whose neighbours are least of their class: hard images, or wrong labels.",
                rows=[found.described(number, same, k) for number in contradicted[:_FOUND]],
            )
        )
    pairs: dict[tuple[int, int], int] = {}
    for number in np.argsort(-found.cosine[:, 0], kind="stable").tolist():
        one, other = int(found.rows[number]), int(found.nearest[number, 0])
        pairs.setdefault((min(one, other), max(one, other)) if found.own else (one, -1 - other), number)
    sections.append(
        _Section(
            title="Most similar pairs",
            about=f"{among}, those nearest to another image: perhaps duplicates.",
            rows=[found.described(number, same, 1) for number in list(pairs.values())[:_FOUND]],
            pairs=True,
        )
    )
    far = np.argsort(found.cosine[:, 0], kind="stable").tolist()
    sections.append(
        _Section(
            title="Far from all others",
            about=f"{among}, those whose nearest image is least similar: outliers, or images of other kinds.",
            rows=[found.described(number, same, min(k, 4)) for number in far[: _FOUND // 2]],
        )
    )
    return sections

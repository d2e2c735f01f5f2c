"""mvssl-eval knn: votes of the nearest training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from mvssl.cli.evaluations.report import print_accuracy_table
from mvssl.evaluate.knn import grid_rows, knn_grid, neighbour_sheet
from mvssl.evaluate.session import ComputeOptions, EvalOptions, open_session
from mvssl.weights.load import BackboneSource
from pipelines.runtime import invalid


@dataclass(frozen=True, kw_only=True)
class KnnArguments:
    """kNN accuracy of a backbone (PAPER.md section 6: cosine similarity, votes weighted exp(similarity / temperature)).

    Attributes:
        source: which backbone.
        options: which images, where the results go.
        compute: where and how features are computed.
        k: numbers of neighbours; by default those of the run's recipe, or 20 and 10.
        temperature: of the votes.
        sheet: images of a picture that shows them with their nearest neighbours, OUT/neighbours-NAME.png; 0 draws none.
            Without labels there is the picture only.
    """

    source: Annotated[BackboneSource, tyro.conf.arg(name="")]
    options: Annotated[EvalOptions, tyro.conf.arg(name="")] = field(default_factory=EvalOptions)
    compute: Annotated[ComputeOptions, tyro.conf.arg(name="")] = field(default_factory=ComputeOptions)
    k: tuple[int, ...] = ()
    temperature: tuple[float, ...] = (0.07,)
    sheet: int = 0

    def __post_init__(self) -> None:
        if self.sheet < 0:
            raise invalid("sheet", self.sheet, "0 or more images", "give a small number such as 12")


def run(arguments: Sequence[str]) -> None:
    """Measure, print a table and write OUT/knn-NAME.json."""
    asked = tyro.cli(KnnArguments, prog="mvssl-eval knn", args=list(arguments))
    with open_session(asked.source, asked.options, asked.compute) as session:
        k = asked.k or session.loaded.evaluation.k
        name = session.loaded.name
        if asked.sheet:
            path = session.out / f"neighbours-{name}.png"
            neighbour_sheet(session, path, images=asked.sheet)
            session.say(f"Neighbours: {path}")
            if bool((session.train.labels < 0).any()):
                session.console.print("These images have no labels, so there is no accuracy.")
                return
        results, path = session.measure_once(
            "knn",
            session.identity("knn", k=k, temperature=asked.temperature),
            lambda: knn_grid(session, k=k, temperatures=asked.temperature),
        )
        title = f"kNN top-1, {session.loaded.architecture}, {name}"
        how = " (leave one out)" if results["leave_one_out"] else ""
        rows = [[*row, f"{results['neighbours']:,}", f"{results['images']:,}{how}"] for row in grid_rows(results)]
        heads = ("k", "temperature", "top-1 %", "95 % interval", "neighbours", "classified")
        print_accuracy_table(session.console, title, heads, rows, path)

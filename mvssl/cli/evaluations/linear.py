"""mvssl-eval linear: a linear classifier on frozen features."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from mvssl.cli.evaluations.report import accuracy_cells, print_accuracy_table
from mvssl.evaluate.linear import FastLinear, fast_linear, release_linear
from mvssl.evaluate.session import ComputeOptions, EvalOptions, open_session
from mvssl.evaluate.supervised import Supervision
from mvssl.weights.load import BackboneSource


@dataclass(frozen=True, kw_only=True)
class LinearArguments:
    """Linear probe (PAPER.md section 6).

    Attributes:
        source: which backbone.
        options: which images, where the results go.
        compute: where and how features are computed.
        protocol: fast computes features once and trains a grid of settings at the same time; release trains as the
            reference implementation does, on new crops in every epoch.
        fast: of the fast protocol.
        release: of the release protocol.
    """

    source: Annotated[BackboneSource, tyro.conf.arg(name="")]
    options: Annotated[EvalOptions, tyro.conf.arg(name="")] = field(default_factory=EvalOptions)
    compute: Annotated[ComputeOptions, tyro.conf.arg(name="")] = field(default_factory=ComputeOptions)
    protocol: Literal["fast", "release"] = "fast"
    fast: FastLinear = field(default_factory=FastLinear)
    release: Supervision = field(default_factory=Supervision)


def run(arguments: Sequence[str]) -> None:
    """Measure, print a table and write OUT/linear-PROTOCOL-NAME.json."""
    asked = tyro.cli(LinearArguments, prog="mvssl-eval linear", args=list(arguments))
    with open_session(asked.source, asked.options, asked.compute) as session:
        settings = asked.fast if asked.protocol == "fast" else asked.release
        identity = session.identity(f"linear-{asked.protocol}", **dataclasses.asdict(settings))
        results, path = session.measure_once(
            f"linear-{asked.protocol}",
            identity,
            lambda: (
                fast_linear(session, asked.fast) if asked.protocol == "fast" else release_linear(session, asked.release)
            ),
        )
        lr = results.get("lr", asked.release.lr)
        decay = results.get("weight_decay", asked.release.weight_decay)
        row = [*accuracy_cells(results), f"{lr:g}", f"{decay:g}", f"{results['train_images']:,}"]
        row.append(f"{results['images']:,}")
        heads = ("top-1 %", "95 % interval", "top-5 %", "lr", "decay", "trained on", "measured")
        title = f"Linear probe ({asked.protocol}), {session.loaded.architecture}, {session.loaded.name}"
        print_accuracy_table(session.console, title, heads, [row], path)

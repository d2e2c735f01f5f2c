"""mvssl-eval finetune: the whole network learns from labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mvssl.cli.evaluations.report import accuracy_cells, print_accuracy_table
from mvssl.evaluate.finetune import LabelSubset, finetune
from mvssl.evaluate.session import ComputeOptions, EvalOptions, open_session
from mvssl.evaluate.supervised import Supervision
from mvssl.weights.load import BackboneSource

_DEFAULT = Supervision(epochs=30, batch_size=256, lr=0.05, weight_decay=1e-4)


@dataclass(frozen=True, kw_only=True)
class FinetuneArguments:
    """Fine-tune the whole network with all labels, a share of them or those of a list.

    Attributes:
        source: which backbone.
        options: which images, where the results go.
        compute: where and how features are computed.
        subset: which labels.
        supervision: how it is trained.
        backbone_out: write the fine-tuned backbone to this .safetensors file.
    """

    source: Annotated[BackboneSource, tyro.conf.arg(name="")]
    options: Annotated[EvalOptions, tyro.conf.arg(name="")] = field(default_factory=EvalOptions)
    compute: Annotated[ComputeOptions, tyro.conf.arg(name="")] = field(default_factory=ComputeOptions)
    subset: Annotated[LabelSubset, tyro.conf.arg(name="")] = field(default_factory=LabelSubset)
    supervision: Annotated[Supervision, tyro.conf.arg(name="")] = field(default_factory=lambda: _DEFAULT)
    backbone_out: Path | None = None


def run(arguments: Sequence[str]) -> None:
    """Train, measure, print a table and write OUT/finetune-LABELS-NAME.json."""
    asked = tyro.cli(FinetuneArguments, prog="mvssl-eval finetune", args=list(arguments))
    with open_session(asked.source, asked.options, asked.compute) as session:
        settings = {**dataclasses.asdict(asked.supervision), **dataclasses.asdict(asked.subset)}
        settings["label_list"] = str(asked.subset.label_list)
        results, path = session.measure_once(
            f"finetune-{asked.subset.name()}",
            session.identity("finetune", **settings),
            lambda: finetune(session, asked.supervision, asked.subset, backbone_out=asked.backbone_out),
        )
        row = [*accuracy_cells(results), f"{results['train_images']:,}", f"{results['images']:,}"]
        heads = ("top-1 %", "95 % interval", "top-5 %", "labels", "measured on")
        title = f"Fine-tuned ({asked.subset.name()}), {session.loaded.architecture}, {session.loaded.name}"
        print_accuracy_table(session.console, title, heads, [row], path)

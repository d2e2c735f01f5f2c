"""Fine-tuning: the whole network learns from labels (PAPER.md section 6)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from mvssl.evaluate.label_subset import LabelSubset
from mvssl.evaluate.session import EvalSession, check_labelled
from mvssl.evaluate.supervised import Classifier, Supervision, train_and_measure
from mvssl.weights.backbone_file import export_backbone


def finetune(
    session: EvalSession, supervision: Supervision, subset: LabelSubset, *, backbone_out: Path | None = None
) -> dict[str, Any]:
    """Train the whole network on labelled images and measure it on val.

    Args:
        session: the backbone and the images.
        supervision: how to train.
        subset: the training images whose labels are used.
        backbone_out: file for the fine-tuned backbone; None writes none.

    Raises:
        InputError: labels are missing or do not match, images cannot be decoded, or training diverges.
    """
    check_labelled("finetune", session.train, session.val)
    session.labelled_val()
    source = subset.of(session.train)
    classes = len(session.train.classes)
    absent = classes - len(np.unique(source.labels))
    if absent:
        session.console.print(f"{absent} of {classes} classes have no labelled image", style="yellow")
    size = min(supervision.batch_size, len(source))
    supervision = dataclasses.replace(supervision, batch_size=size - size % session.world.size or size)
    identity = session.identity("finetune", images=source.fingerprint, **dataclasses.asdict(supervision))
    model = Classifier(session.loaded.backbone, session.width, classes).to(session.device)
    name = f"finetune-{subset.name()}-{session.loaded.name}"
    results = train_and_measure(session, model, source, supervision, name=name, identity=identity)
    if backbone_out is not None:
        session.world.run_on_rank0(lambda: export_backbone(model.backbone, session.loaded.architecture, backbone_out))
    return results

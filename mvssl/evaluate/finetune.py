"""Fine-tuning: the whole network learns from all labels, a share of them, or those of a list (PAPER.md section 6)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvssl.evaluate.label_subset import labelled_share, listed_images
from mvssl.evaluate.linear import trained
from mvssl.evaluate.session import Session, check_labelled
from mvssl.evaluate.supervised import Classifier, Supervision
from mvssl.weights.backbone_file import export_backbone
from pipelines.runtime import InputError
from pipelines.storage.source import Source
from pipelines.storage.subset import SubsetSource


@dataclass(frozen=True, kw_only=True)
class LabelledPart:
    """Which labels are used.

    Attributes:
        labels: share of the images of each class, drawn.
        label_list: a text file that names the images instead, one a line, such as SimCLR's lists of ImageNet.
        label_seed: of the draw.
    """

    labels: float = 1.0
    label_list: Path | None = None
    label_seed: int = 0

    def __post_init__(self) -> None:
        if self.label_list is not None and self.labels != 1.0:
            raise InputError("labels and label_list exclude each other: give one of --labels and --label-list.")

    def name(self) -> str:
        """For the result's file: the share in per cent, or the list's name."""
        return f"{100 * self.labels:g}pct" if self.label_list is None else self.label_list.stem

    def of(self, source: Source) -> Source:
        """The images of a source that may be learned from.

        Raises:
            InputError: the share or the list cannot be used.
        """
        if self.label_list is not None:
            return SubsetSource(source, listed_images(source, self.label_list))
        if self.labels == 1:
            return source
        return SubsetSource(source, labelled_share(source, self.labels, seed=self.label_seed))


def finetune(
    session: Session, supervision: Supervision, part: LabelledPart, *, name: str, backbone_out: Path | None
) -> dict[str, Any]:
    """Train the whole network on labelled images and measure it on val.

    Args:
        session: the backbone and the images.
        supervision: how.
        part: which images.
        name: of the evaluation, for its state.
        backbone_out: where to write the backbone as it is then; None does not.

    Raises:
        InputError: labels are missing or do not agree, images cannot be decoded, or training diverges.
    """
    check_labelled("finetune", session.train, session.val)
    session.val_labels()
    source = part.of(session.train)
    absent = len(session.train.classes) - len(np.unique(source.labels))
    if absent:
        session.console.print(
            f"{absent} of {len(session.train.classes)} classes have no labelled image", style="yellow"
        )
    size = min(supervision.batch_size, len(source))
    supervision = dataclasses.replace(supervision, batch_size=size - size % session.world.size or size)
    identity = session.identity("finetune", images=source.fingerprint, **dataclasses.asdict(supervision))
    model = Classifier(session.measured.backbone, session.width, len(session.train.classes)).to(session.device)
    results = trained(session, model, source, supervision, name, identity)
    if backbone_out is not None:
        session.world.run_on_rank0(lambda: export_backbone(model.backbone, session.measured.architecture, backbone_out))
    return results

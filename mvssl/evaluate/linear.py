"""The linear probe: the fast protocol on features that are computed once, and the release's (PAPER.md section 6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mvssl.evaluate.feature_store import DONE
from mvssl.evaluate.features import loaded, stored
from mvssl.evaluate.linear_fit import Classifiers, Setting, fit, race, standardisation, stratified
from mvssl.evaluate.session import Accuracy, Session, accuracy_of, check_labelled
from mvssl.evaluate.supervised import Classifier, Supervision, classify, train_classifier
from pipelines.runtime import InputError, invalid
from pipelines.storage.source import Source

_STEPS = 32  # of an epoch, at least
ROUNDS = ((0.05, 1.0), (0.2, 0.125))
"""Rounds of the race: share of the epochs, and share of the settings of the round before that take part."""


@dataclass(frozen=True, kw_only=True)
class FastLinear:
    """A linear classifier on features that are computed once, the best of a grid.

    Attributes:
        lr: peak learning rates of the grid, for the batch as it is.
        weight_decay: weight decays of the grid.
        epochs: passes over the features.
        batch_size: images of a step; at most a 32nd of the training images, so that small data gets its steps too.
        drawn: random resized crops of each training image, besides its centre crop.
        held_out: share of the training images that the settings are compared on.
        seed: of order, crops and the images held out.
    """

    lr: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    weight_decay: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2)
    epochs: int = 100
    batch_size: int = 512
    drawn: int = 0
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            if not getattr(self, name):
                raise invalid(name, getattr(self, name), "one or more numbers", "the grid needs some")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "at least 1", "give a positive number")
        if self.drawn < 0:
            raise invalid("drawn", self.drawn, "0 or more", "0 takes the centre crops alone")
        if not 0 < self.held_out < 1:
            raise invalid("held_out", self.held_out, "between 0 and 1", "0.1 is usual")
        self.grid()

    def batch_for(self, images: int) -> int:
        """Images of a step where there are so many to train on."""
        return min(self.batch_size, max(1, images // _STEPS))

    def grid(self) -> list[Setting]:
        """All settings."""
        return [Setting(lr=lr, weight_decay=decay) for lr in self.lr for decay in self.weight_decay]


@dataclass(frozen=True, kw_only=True)
class BestFit:
    """The best classifier of a grid.

    Attributes:
        classifiers: it alone, trained on all images.
        setting: its learning rate and weight decay.
        held_out_top1: of each setting of the grid, on images held out in the race.
    """

    classifiers: Classifiers
    setting: Setting
    held_out_top1: list[float]


def fit_best(
    features: torch.Tensor,
    labels: torch.Tensor,
    settings: FastLinear,
    *,
    classes: int,
    held_out: torch.Tensor,
    say: Callable[[str], None] = lambda said: None,
) -> BestFit:
    """The fast protocol on features: the settings race on images that are held out, the best is trained on all.

    Args:
        features: float [N, D], of the images to learn from.
        labels: int64 [N].
        settings: the grid and how it is trained.
        classes: how many there are.
        held_out: bool [N], of images that the settings are compared on (`stratified`).
        say: called with a sentence on what is done.

    Raises:
        InputError: the best setting diverges.
    """
    grid, batch_size = settings.grid(), settings.batch_for(len(features))
    raced = race(
        features,
        labels,
        grid,
        classes=classes,
        held_out=held_out,
        rounds=[(max(1.0, share * settings.epochs), part) for share, part in ROUNDS],
        batch_size=batch_size,
        seed=settings.seed,
        progress=say,
    )
    chosen = grid[raced.order[0]]
    say(f"learning rate {chosen.lr:g}, weight decay {chosen.weight_decay:g} for {settings.epochs} epochs on all images")
    final = fit(
        features,
        labels,
        [chosen],
        classes=classes,
        epochs=settings.epochs,
        batch_size=batch_size,
        seed=settings.seed,
    )
    _check_finite(final, chosen)
    return BestFit(classifiers=final, setting=chosen, held_out_top1=raced.accuracy)


def fast_linear(session: Session, settings: FastLinear) -> dict[str, Any]:
    """Measure a grid of linear classifiers.

    The settings race on images held out of the training images; the best one is trained on all of them and measured.

    Raises:
        InputError: labels are missing or do not agree, or images cannot be decoded.
    """
    check_labelled("linear", session.train, session.val)
    val_labels = session.val_labels()
    val = session.val
    assert val is not None  # val_labels() says so
    classes = len(session.train.classes)
    train_store = stored(session, session.train, "train", drawn=settings.drawn, seed=settings.seed)
    val_store = stored(session, val, "val")
    features, labels, image = loaded(session, train_store, session.train.labels)
    val_features, val_truth, _ = loaded(session, val_store, val_labels)

    def best() -> tuple[BestFit, Accuracy]:
        held_out = stratified(torch.from_numpy(session.train.labels), settings.held_out, seed=settings.seed)
        found = fit_best(
            features,
            labels,
            settings,
            classes=classes,
            held_out=held_out.to(image.device)[image],
            say=lambda said: session.console.print(f"linear: {said}", highlight=False),
        )
        return found, accuracy_of(found.classifiers.ranked(val_features, 0), val_truth, session.train.classes)

    found, measured = session.world.run_on_rank0(best)
    return {
        **measured.to_dict(),
        "lr": found.setting.lr,
        "weight_decay": found.setting.weight_decay,
        "grid": [
            {"lr": setting.lr, "weight_decay": setting.weight_decay, "held_out_top1": value}
            for setting, value in zip(settings.grid(), found.held_out_top1, strict=True)
        ],
        "train_images": int((train_store.state[: len(session.train)] == DONE).sum()),
    }


def release_linear(session: Session, supervision: Supervision) -> dict[str, Any]:
    """Measure a linear classifier as the release trains it, on new crops in every epoch.

    Features are standardised by mean and deviation of the training images' centre crops.

    Raises:
        InputError: labels are missing or do not agree, images cannot be decoded, or training diverges.
    """
    check_labelled("linear", session.train, session.val)
    session.val_labels()
    store = stored(session, session.train, "train")
    mean, scale = standardisation(torch.from_numpy(store.values[store.state == DONE]))
    model = Classifier(
        session.measured.backbone, session.width, len(session.train.classes), standardise=(mean, scale)
    ).to(session.device)
    identity = session.identity("linear-release", **dataclasses.asdict(supervision))
    return trained(session, model, session.train, supervision, "linear-release", identity)


def trained(
    session: Session,
    model: Classifier,
    source: Source,
    supervision: Supervision,
    name: str,
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Train a classifier and measure it on val."""
    val_labels = session.val_labels()
    assert session.val is not None
    evaluation = session.measured.evaluation
    train_classifier(
        model,
        source,
        supervision,
        size=evaluation.crop,
        folder=session.out / f"{name}-state",
        identity=identity,
        device=session.device,
        autocast=session.autocast,
        computing=session.computing,
        world=session.world,
        say=lambda line: session.console.print(line, highlight=False, markup=False, soft_wrap=True),
    )
    ranked, index = classify(
        model,
        session.val,
        resize=evaluation.resize,
        crop=evaluation.crop,
        device=session.device,
        autocast=session.autocast,
        computing=session.computing,
        world=session.world,
    )
    measured = accuracy_of(ranked, torch.from_numpy(val_labels[index]), session.train.classes)
    return {**measured.to_dict(), "train_images": len(source)}


def _check_finite(classifiers: Classifiers, setting: Setting) -> None:
    if not bool(classifiers.weight.isfinite().all()):
        raise InputError(
            f"The linear classifier diverged with learning rate {setting.lr:g}: give smaller ones with --lr."
        )

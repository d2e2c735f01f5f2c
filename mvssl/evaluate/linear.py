"""The linear probe: the fast protocol on cached features, and the reference implementation's (PAPER.md section 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvssl.config.evaluation import RELEASE as RELEASE
from mvssl.config.evaluation import FastLinear as FastLinear
from mvssl.config.evaluation import Setting, Supervision
from mvssl.evaluate.accuracy import Accuracy, accuracy_of
from mvssl.evaluate.feature_store import DONE
from mvssl.evaluate.features import cached_features, load_features
from mvssl.evaluate.linear_fit import Classifiers, fit, race, standardisation, stratified
from mvssl.evaluate.session import EvalSession, check_labelled
from mvssl.evaluate.supervised import Classifier, train_and_measure
from pipelines.runtime import InputError

ROUNDS = ((0.05, 1.0), (0.2, 0.125))
"""Rounds of the race: fraction of the epochs, and fraction of the previous round's settings that take part."""


def fast_linear(session: EvalSession, config: FastLinear) -> dict[str, Any]:
    """Select a linear classifier on held-out training images, train it on all of them and measure it on val.

    Raises:
        InputError: labels are missing or do not match, images cannot be decoded, or the classifier diverges.
    """
    check_labelled("linear", session.train, session.val)
    train, classes = session.train, session.train.classes
    val, val_labels = session.labelled_val()
    train_store = cached_features(session, train, "train", drawn=config.drawn, seed=config.seed)
    val_store = cached_features(session, val, "val")
    features, labels, image = load_features(session, train_store, train.labels)
    val_features, val_truth, _ = load_features(session, val_store, val_labels)

    def fit_and_measure() -> tuple[BestFit, Accuracy]:
        held_out = stratified(torch.from_numpy(train.labels), config.held_out, seed=config.seed)
        best = fit_best(
            features,
            labels,
            config,
            classes=len(classes),
            held_out=held_out.to(image.device)[image],
            say=lambda line: session.say(f"linear: {line}"),
        )
        return best, accuracy_of(best.classifiers.ranked(val_features, 0), val_truth, classes)

    best, accuracy = session.world.run_on_rank0(fit_and_measure)
    return {
        **accuracy.to_dict(),
        "lr": best.setting.lr,
        "weight_decay": best.setting.weight_decay,
        "grid": [
            {"lr": setting.lr, "weight_decay": setting.weight_decay, "held_out_top1": top1}
            for setting, top1 in zip(config.grid(), best.held_out_top1, strict=True)
        ],
        "train_images": int((train_store.state[: len(train)] == DONE).sum()),
    }


@dataclass(frozen=True, kw_only=True)
class BestFit:
    """The best classifier of a grid.

    Attributes:
        classifiers: this one alone, trained on all images.
        setting: its learning rate and weight decay.
        held_out_top1: held-out accuracy of each setting of the grid.
    """

    classifiers: Classifiers
    setting: Setting
    held_out_top1: list[float]


def fit_best(
    features: Tensor,
    labels: Tensor,
    config: FastLinear,
    *,
    classes: int,
    held_out: Tensor,
    say: Callable[[str], None] = lambda line: None,
) -> BestFit:
    """Race the settings on held-out images and train the best one on all images.

    Args:
        features: float [N, D].
        labels: int64 [N].
        config: the grid and its training.
        classes: number of classes.
        held_out: bool [N], the images on which the settings are compared (`stratified`).
        say: called with a line on what happens next.

    Raises:
        InputError: the best setting diverges.
    """
    grid, batch_size = config.grid(), config.batch_for(len(features))
    raced = race(
        features,
        labels,
        grid,
        classes=classes,
        held_out=held_out,
        rounds=[(max(1.0, epochs * config.epochs), settings) for epochs, settings in ROUNDS],
        batch_size=batch_size,
        seed=config.seed,
        progress=say,
    )
    best = grid[raced.order[0]]
    say(f"learning rate {best.lr:g}, weight decay {best.weight_decay:g} for {config.epochs} epochs on all images")
    final = fit(
        features, labels, [best], classes=classes, epochs=config.epochs, batch_size=batch_size, seed=config.seed
    )
    if not bool(final.weight.isfinite().all()):
        raise InputError(
            f"The linear classifier diverged with learning rate {best.lr:g}: give smaller ones with --fast.lr."
        )
    return BestFit(classifiers=final, setting=best, held_out_top1=raced.accuracy)


def release_linear(session: EvalSession, supervision: Supervision) -> dict[str, Any]:
    """Measure a linear classifier trained as in the reference implementation, on new crops in every epoch.

    Features are standardised by mean and standard deviation of the training images' centre crops.

    Raises:
        InputError: labels are missing or do not match, images cannot be decoded, or training diverges.
    """
    check_labelled("linear", session.train, session.val)
    session.labelled_val()
    store = cached_features(session, session.train, "train")
    standardise = standardisation(torch.from_numpy(store.values[store.state == DONE]))
    model = Classifier(
        session.loaded.backbone,
        session.width,
        len(session.train.classes),
        standardise=standardise,
        head_std=supervision.head_std,
        seed=supervision.seed,
    ).to(session.device)
    identity = session.identity("linear-release", **supervision.identity())
    return train_and_measure(session, model, session.train, supervision, name="linear-release", identity=identity)

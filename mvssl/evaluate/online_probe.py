"""Linear probe during training: a classifier fitted to the features that the online kNN has extracted.

Fitted at each evaluation instead of trained along with the backbone: the step has no part of it, a checkpoint no state
of it, and it measures what `mvssl-eval linear` does, frozen features of centre crops, instead of a classifier that lags
behind a changing backbone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mvssl.evaluate.linear_fit import Classifiers, Setting, fit, stratified

RATES = (0.001, 0.01, 0.1)
"""Peak learning rates, for standardised features; the best one on held-out training images is taken."""
EPOCHS = 20
IMAGES_SEEN = 10_000_000  # at most, by each classifier: 8 epochs of ImageNet
_BATCH = 512
_MIN_STEPS = 32  # per epoch, so that small data get enough of them
_SELECTION = 0.1  # fraction of the training images on which the rates are compared
_HELD_OUT = 0.2  # the same if the accuracy is measured on them, too


def probe_accuracy(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor | None,
    test_labels: Tensor | None,
    *,
    classes: int,
    progress: Callable[[], None] | None = None,
) -> float:
    """Top-1 accuracy in [0, 1] of a linear classifier.

    With test images it is fitted to all training images, at the rate that is best on a tenth of them. Without, a fifth
    of the training images (of each class) is held out, and the accuracy is the best one there.

    Args:
        features: float32 [N, D] of the training images.
        labels: int64 [N], each 0 or more.
        test_features: float32 [M, D]; None without validation images.
        test_labels: int64 [M]; None without validation images.
        classes: number of classes.
        progress: called after each epoch; an exception in it ends the fit.
    """
    settings = [Setting(lr=rate) for rate in RATES]
    held_out = stratified(labels.cpu(), _HELD_OUT if test_features is None else _SELECTION, seed=0)
    if not bool(held_out.any()):  # one image of each class: no accuracy but chance
        held_out[1::2] = True
    rows, chosen = (part.nonzero()[:, 0].to(labels.device) for part in (~held_out, held_out))

    def fitted(settings: list[Setting], rows: Tensor | None) -> Classifiers:
        images = len(features) if rows is None else len(rows)
        return fit(
            features,
            labels,
            settings,
            classes=classes,
            epochs=min(EPOCHS, IMAGES_SEEN / images),
            batch_size=min(_BATCH, max(1, images // _MIN_STEPS)),
            rows=rows,
            progress=None if progress is None else lambda _: progress(),
        )

    right = fitted(settings, rows).right(features[chosen], labels[chosen])  # [G]
    if test_features is None or test_labels is None:
        return float(right.max())
    best = settings[int(right.argmax())]
    return float(fitted([best], None).right(test_features, test_labels)[0])

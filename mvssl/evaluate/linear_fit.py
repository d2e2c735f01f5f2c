"""Linear classifiers on frozen features, many hyperparameter settings trained as one problem.

All settings see the same batches. Their weights are concatenated to [D, G * C], so that one step of all of them is one
matrix product forward and one for the gradient, which is in closed form instead of autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mvssl.config.evaluation import Setting as Setting
from pipelines.runtime import InputError


@dataclass(frozen=True, kw_only=True)
class Classifiers:
    """G linear classifiers of C classes.

    Attributes:
        weight: float [G, D, C], of standardised features.
        bias: float [G, C].
        mean: float [D], subtracted from features.
        scale: float [D], by which they are multiplied then.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def scores(self, features: Tensor, setting: int) -> Tensor:
        """Logits [M, C] of features [M, D] from one classifier."""
        x = (features.to(self.mean) - self.mean) * self.scale  # [M, D]
        return x @ self.weight[setting] + self.bias[setting]

    def ranked(self, features: Tensor, setting: int, *, chunk: int = 8192) -> Tensor:
        """int64 [M, min(5, C)]: the classes of each image, best first."""
        count = min(5, self.bias.shape[1])
        parts = [
            self.scores(features[at : at + chunk], setting).topk(count, dim=1).indices
            for at in range(0, len(features), chunk)
        ]
        return torch.cat(parts)

    def right(self, features: Tensor, labels: Tensor, *, chunk: int = 8192) -> Tensor:
        """float64 [G]: accuracy of each classifier; 0 if it has diverged."""
        groups, width, classes = self.weight.shape
        flat = self.weight.transpose(0, 1).reshape(width, groups * classes)
        hits = torch.zeros(groups, dtype=torch.float64, device=labels.device)
        for at in range(0, len(features), chunk):
            x = (features[at : at + chunk].to(self.mean) - self.mean) * self.scale
            scores = torch.addmm(self.bias.flatten(), x, flat).view(len(x), groups, classes)
            hits += (scores.argmax(dim=2) == labels[at : at + chunk, None]).sum(dim=0)
        finite = self.weight.isfinite().flatten(1).all(dim=1) & self.bias.isfinite().all(dim=1)
        return torch.where(finite, hits / len(features), 0.0)


def standardisation(features: Tensor, *, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Mean [D] and 1 / standard deviation [D] of features [N, D], float32; a constant feature gets 1.

    The reference implementation computes them on the validation split (PAPER.md section 6), we on the features that
    the classifier is trained on.
    """
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for at in range(0, len(features), chunk):
        total += features[at : at + chunk].double().sum(dim=0)
    mean = total / len(features)
    squares = torch.zeros_like(total)
    for at in range(0, len(features), chunk):
        squares += (features[at : at + chunk].double() - mean).square().sum(dim=0)
    deviation = (squares / len(features)).sqrt()
    constant = deviation <= 1e-6 * mean.abs().clamp(min=1e-6)
    return mean.float(), torch.where(constant, 1.0, 1 / deviation.clamp(min=1e-30)).float()


def fit(
    features: Tensor,
    labels: Tensor,
    settings: Sequence[Setting],
    *,
    classes: int,
    epochs: float,
    batch_size: int = 512,
    momentum: float = 0.9,
    seed: int = 0,
    rows: Tensor | None = None,
    progress: Callable[[float], None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Classifiers:
    """Train one classifier per setting: SGD with momentum on the mean cross-entropy, cosine learning-rate schedule.

    Each equals torch.optim.SGD on its own zero-initialised linear layer with the same batches. A short last batch is
    dropped unless it is the only one.

    Args:
        features: float [N, D], on the device or on the CPU (then each batch is copied over).
        labels: int64 [N], each 0 or more, on the device.
        settings: G of them.
        classes: C.
        epochs: passes over the rows, may be fractional.
        batch_size: images per step.
        momentum: of SGD.
        seed: of the order.
        rows: int64, the rows to train on; None takes all.
        progress: called with the number of epochs done, after each epoch.
        dtype: to compute in.

    Raises:
        InputError: there are no settings or images, or `batch_size` is below 1.
    """
    rows = torch.arange(len(features), device=labels.device) if rows is None else rows
    if not settings:
        raise InputError("There are no settings to train: give at least one learning rate and weight decay.")
    if batch_size < 1 or not len(rows):
        raise InputError(f"batch_size is {batch_size} for {len(rows)} images but both must be at least 1.")
    batch_size = min(batch_size, len(rows))
    steps_per_epoch = len(rows) // batch_size
    total = max(1, round(epochs * steps_per_epoch))
    some = features if len(rows) == len(features) else features[rows.to(features.device)]
    mean, scale = (value.to(labels.device, dtype) for value in standardisation(some))
    device, groups, width = labels.device, len(settings), features.shape[1]
    weight = torch.zeros(width, groups * classes, dtype=dtype, device=device)
    bias = torch.zeros(groups * classes, dtype=dtype, device=device)
    velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    peak = torch.tensor([s.lr for s in settings], dtype=dtype, device=device).repeat_interleave(classes)  # [G * C]
    decay = torch.tensor([s.weight_decay for s in settings], dtype=dtype, device=device).repeat_interleave(classes)
    decays = any(s.weight_decay for s in settings)
    generator = torch.Generator().manual_seed(seed)
    order = rows
    for step in range(total):
        place = step % steps_per_epoch
        if place == 0:
            order = rows[torch.randperm(len(rows), generator=generator).to(device)]
        batch = order[place * batch_size : (place + 1) * batch_size]
        x = (features[batch.to(features.device)].to(device, dtype) - mean) * scale  # [B, D]
        scores = torch.addmm(bias, x, weight).view(batch_size, groups, classes)
        error = scores.softmax(dim=2)  # gradient of cross-entropy: probabilities minus the one-hot labels
        error.scatter_add_(
            2,
            labels[batch].view(-1, 1, 1).expand(-1, groups, 1),
            error.new_full((1, 1, 1), -1.0).expand(batch_size, groups, 1),
        )
        error = error.div_(batch_size).view(batch_size, groups * classes)
        rate = peak * (0.5 * (1 + math.cos(math.pi * step / total)))
        velocity.mul_(momentum).addmm_(x.T, error)
        if decays:
            velocity.addcmul_(weight, decay)
        bias_velocity.mul_(momentum).add_(error.sum(dim=0))
        weight.addcmul_(velocity, rate, value=-1)
        bias.addcmul_(bias_velocity, rate, value=-1)
        if progress is not None and (place == steps_per_epoch - 1 or step == total - 1):
            progress((step + 1) / steps_per_epoch)
    return Classifiers(
        weight=weight.view(width, groups, classes).transpose(0, 1),
        bias=bias.view(groups, classes),
        mean=mean,
        scale=scale,
    )


@dataclass(frozen=True, kw_only=True)
class Race:
    """Result of `race`.

    Attributes:
        order: numbers of the settings, best first.
        accuracy: held-out accuracy of each setting in its last round.
        rounds: epochs and number of settings of each round.
    """

    order: list[int]
    accuracy: list[float]
    rounds: list[tuple[float, int]]


def race(
    features: Tensor,
    labels: Tensor,
    settings: Sequence[Setting],
    *,
    classes: int,
    held_out: Tensor,
    rounds: Sequence[tuple[float, float]],
    batch_size: int = 512,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Race:
    """Find the best setting by successive halving: all are trained for a few epochs, the better ones for more.

    Source: Jamieson and Talwalkar, Non-stochastic best arm identification (AISTATS 2016). Each round runs a complete
    schedule, so that settings are compared after their learning rate has decayed.

    Args:
        features: float [N, D].
        labels: int64 [N].
        settings: G of them.
        classes: C.
        held_out: bool [N], the images on which settings are compared, excluded from training.
        rounds: epochs, and fraction of the previous round's settings that take part (at least one).
        batch_size: images per step.
        seed: of the order.
        progress: called with a line before each round.
    """
    trained, tested = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    alive, accuracy, done = list(range(len(settings))), [0.0] * len(settings), []
    ranking = alive
    for epochs, share in rounds:
        alive = alive[: max(1, math.ceil(share * len(alive)))]
        done.append((epochs, len(alive)))
        if progress is not None:
            progress(f"{len(alive)} settings for {epochs:g} epochs")
        classifiers = fit(
            features,
            labels,
            [settings[n] for n in alive],
            classes=classes,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            rows=trained,
        )
        for n, value in zip(
            alive, classifiers.right(features[tested.to(features.device)], labels[tested]).tolist(), strict=True
        ):
            accuracy[n] = value
        alive = sorted(alive, key=lambda n: -accuracy[n])
        ranking = alive + [n for n in ranking if n not in alive]
    return Race(order=ranking, accuracy=accuracy, rounds=done)


def stratified(labels: Tensor, share: float, *, seed: int) -> Tensor:
    """bool [N]: a random fraction of the images of each class, at least one of each class that has two or more.

    Args:
        labels: int64 [N] on the CPU.
        share: fraction between 0 and 1.
        seed: of the sample.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero()[:, 0]
        count = min(max(1, round(share * len(members))), len(members) - 1) if len(members) > 1 else 0
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen

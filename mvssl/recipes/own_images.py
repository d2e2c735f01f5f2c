"""A recipe for own photographs, fitted to their number and size and to the machine."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.recipes import Fitted, Situation, fitted_by
from mvssl.recipes.byol import byol_resnet50_200ep
from pipelines.progress import counted
from pipelines.views.presets import paper_views

FEW = 1_000
"""Below this number of images, the log advises to start from pretrained weights."""

_SIZES = (224, 192, 160, 128, 96, 64, 32)
_SMALL = "resnet10_half"  # on few cores: 2.3 times as fast as resnet18 in bf16, and it learns (fit_photos)
_SMALL_PASSES = 1_000_000  # image passes of a run of it on two cores
_CPU_PASSES = 250_000  # of another backbone: some hours with ResNet-18 and views of 64 and 32 pixels
_GPU_PASSES = 40_000_000  # of a run on GPUs: 800 epochs of 50,000 images, as usual for CIFAR
_FEW_RATES = {  # learning rates for a batch of 64 of short runs of narrow ResNets (fit_photos)
    ("mocov3", "lars"): 5.0,
    ("byol", "lars"): 1.5,
    ("mocov3", "adamw"): 3e-3,
    ("byol", "adamw"): 1e-3,
}
_SMALLEST_BATCH = 32  # BatchNorm's statistics get noisy below


def fit_photos(situation: Situation) -> Fitted:
    """The recipe `photos` for this situation, with a line on each choice; `situation.given` is kept.

    Sources of the choices:

    - Views no larger than the images and, on a CPU, than it computes in time: for little data, lower resolution costs
      little accuracy (Cao and Wu, Rethinking self-supervised learning: small is beautiful, arXiv 2103.13559).
    - More epochs for fewer images, so that the number of updates does not shrink with the data: with that,
      pre-training on a tenth of ImageNet or on COCO works as on all of it (El-Nouby et al., arXiv 2112.10740).
    - From pretrained weights a quarter of the passes: training on own images then converges many times faster (Reed et
      al., Self-supervised pretraining improves self-supervised pretraining, arXiv 2103.12718).
    - ResNet by default: vision transformers need more images or extra losses (Liu et al., arXiv 2106.03746).
    - Learning rate in proportion to the batch for LARS and the ViT recipe (Goyal et al., arXiv 1706.02677; the paper),
      to its square root for AdamW otherwise (Malladi et al., arXiv 2205.10287). LARS is for long runs with batches of
      256 and more (You et al., arXiv 1708.03888); AdamW needs fewer steps.
    - On a CPU, for a ResNet from random weights, MoCo v3 with LARS: of the 207 tuned runs of
      benchmarks/results/paper_small_cpu.jsonl (benchmarks/PAPER_RESULTS.md) its kNN is the highest, 31.4 % against 28.5
      of BYOL with LARS and 26.5 with AdamW. The learning rates are those that were tuned there for batches of 64.
    - On few cores a ResNet-10 of half the width with a 3x3 stem of stride 2: at equal CPU time it learns more than
      ResNet-18, whose maps end at 2x2 and 1x1 (mvssl/recipes/README.md, with commands). bf16 makes its
      step 1.8 times as fast where the CPU has instructions for it.
    - EMA momentum lower in shorter runs, so that the target follows within the run: the average should span a fraction
      of the training, not a fixed number of steps (Busbridge et al., How to scale your EMA, arXiv 2307.13813).
    """
    pretrained = bool(situation.text("backbone.pretrained"))
    size, why_size = _view_size(situation)
    default = _default_backbone(situation, size)
    name = situation.text("backbone.name") or default
    size, local = fitting_sizes(name, size)
    batch = situation.number("batch_size") or _batch(situation)
    epochs = situation.number("epochs") or _epochs(situation, name, pretrained=pretrained)
    recipe = _recipe(situation, name, size=size, local=local, batch=max(2, batch), epochs=max(1, epochs))
    why_batch = f"{situation.images // recipe.batch_size:,} steps an epoch"
    while not situation.number("batch_size") and recipe.batch_size // situation.ranks > _SMALLEST_BATCH:
        if situation.fits(recipe):
            break
        smaller = recipe.batch_size // 2 // situation.ranks * situation.ranks
        recipe = _recipe(situation, name, size=size, local=local, batch=smaller, epochs=epochs)
        why_batch = "what fits into the GPU's memory"
    return Fitted(recipe=recipe, notes=_notes(situation, recipe, default, why_size=why_size, why_batch=why_batch))


@fitted_by(fit_photos)
def photos() -> Recipe:
    """Multi-task BYOL, on a CPU MoCo v3, for own photographs, fitted to the images and the machine when a run starts.

    Source: ours, with no published accuracy; `fit_photos` has the sources of each choice. What is shown without --data
    is for 50,000 large images and one GPU. On a CPU: a narrow ResNet-10 and views of 64 pixels.
    Cost: an hour or two on two cores, about a night on one GPU; not measured on a GPU.
    Command: mvssl-train --data PHOTOS --out RUN
    """
    return fit_photos(Situation(images=50_000, short_side=224, device="cuda")).recipe


def _recipe(situation: Situation, name: str, *, size: int, local: int, batch: int, epochs: int) -> Recipe:
    """The recipe with what follows from these choices."""
    on_gpu, pretrained = situation.device == "cuda", bool(situation.text("backbone.pretrained"))
    vit, steps = _patch(name) is not None, epochs * max(1, situation.images // batch)
    on_few = not on_gpu and not pretrained and "resnet" in name  # a ResNet from nothing on a CPU, where passes are few
    method = situation.text("method") or ("mocov3" if on_few else "byol")
    long_run = not (vit or pretrained) and batch >= 256 and steps >= 50_000
    short = on_few and (method, "lars") in _FEW_RATES
    kind = situation.text("optimizer.kind") or ("lars" if long_run or short else "adamw")
    warmup = float(f"{min(10.0, max(0.05 * epochs, 1.0 if pretrained else 0.0)):.3g}")
    span = min(250, max(100 if pretrained else 30, round(math.sqrt(steps))))  # steps that the target averages
    heads = Head(hidden=(4096 if on_gpu else 1024,), out=256, output_norm=method == "mocov3")
    optimizer = _optimizer(kind, batch=batch, vit=vit, pretrained=pretrained, warmup=min(warmup, epochs))
    if on_few and (method, kind) in _FEW_RATES:
        times = batch / 64
        peak = _FEW_RATES[method, kind] * (times if kind == "lars" and times < 1 else math.sqrt(times))
        optimizer = replace(optimizer, base_lr=float(f"{peak * 256 / batch:.3g}"))
    in_bf16 = situation.bf16 and name == _SMALL and not on_gpu and not situation.is_given("views")
    every = max(1, epochs // 20)
    return replace(
        byol_resnet50_200ep(),
        name="photos",
        method=method,
        views=paper_views(size=size, local_size=local, blur_kernel=max(5, 2 * (round(size / 10) // 2) + 1)),
        backbone=Backbone(
            name=name,
            drop_path=0.1 if vit and on_gpu and not pretrained else 0.0,
            init="timm" if pretrained else "release",
        ),
        projector=replace(heads, hidden=heads.hidden * 2) if vit else heads,
        predictor=heads,
        optimizer=optimizer,
        epochs=epochs,
        batch_size=batch,
        target_decay=round(1 - 1 / span, 3),
        temperature=1.0 if method == "mocov3" else None,
        precision="bf16" if in_bf16 else "auto",
        evaluation=Evaluation(
            every_epochs=every, resize=round(size * 8 / 7 / 8) * 8, crop=size, max_train=128_000 if on_gpu else 20_000
        ),
    )


def _optimizer(kind: str, *, batch: int, vit: bool, pretrained: bool, warmup: float) -> Optimizer:
    """Optimiser of this kind; base rates are for a batch of 256."""
    if kind == "lars":
        return Optimizer(kind="lars", base_lr=0.4, weight_decay=1.5e-6, warmup_epochs=warmup)
    if kind == "sgd":
        base = 0.005 if pretrained else 0.05
        return Optimizer(kind="sgd", base_lr=base, weight_decay=1e-4, warmup_epochs=warmup)
    peak = (1e-4 if pretrained else 3e-4 if vit else 1e-3) * math.sqrt(batch / 256)
    if vit and not pretrained:
        peak = 3e-4 * batch / 256 if batch >= 256 else peak
    return Optimizer(
        kind="adamw",
        base_lr=float(f"{peak * 256 / batch:.3g}"),
        weight_decay=0.1 if vit else 0.05,
        clip_grad_norm=0.5 if vit else None,
        warmup_epochs=warmup,
    )


def _default_backbone(situation: Situation, size: int) -> str:
    """Name of the backbone for views of this size, if none is given."""
    pretrained = bool(situation.text("backbone.pretrained"))
    if situation.device == "cuda":
        return "resnet50_small" if size <= 64 and not pretrained else "resnet50"
    return _SMALL if size <= 64 and not pretrained else "resnet18"


def _view_size(situation: Situation) -> tuple[int, str]:
    """Side of the global views in pixels, and why."""
    if situation.device == "cuda":
        most, why = 224, "the paper's size"
    else:
        cores = situation.cores
        most, why = (128 if cores >= 32 else 96 if cores >= 12 else 64), f"what {_cores(cores)} compute in time"
    if situation.short_side < most:
        most, why = situation.short_side, "no larger than the images"
    return next((size for size in _SIZES if size <= most), _SIZES[-1]), why


def _patch(name: str) -> int | None:
    """Edge of the patches of a vision transformer in pixels, from its name; None for other networks."""
    found = re.search(r"patch(\d+)", name)
    return int(found[1]) if found else None


def fitting_sizes(name: str, size: int) -> tuple[int, int]:
    """Sides of global and local views in pixels that a backbone takes, near `size` and three sevenths of it.

    Patches divide both, and 8 too, as `ViewSpec` wants: 224 and 112 for patches of 14 pixels, 224 and 96 for 16.
    """
    step = math.lcm(_patch(name) or 16, 8)
    return max(step, size // step * step), max(step, round(size * 3 / 7 / step) * step)


def _batch(situation: Situation) -> int:
    """Images per step over all ranks, a power of two for each rank: about 16 steps an epoch or more."""
    images, ranks = situation.images, situation.ranks
    most = 64 if situation.device == "cpu" else 1024 if images >= 500_000 else 512 if images >= 100_000 else 256
    wanted = min(most, max(_SMALLEST_BATCH, images // 16), max(2, images // 2))
    return (1 << max(1, (wanted // ranks).bit_length() - 1)) * ranks


def _epochs(situation: Situation, name: str, *, pretrained: bool) -> int:
    """Passes over the images: more for fewer images."""
    on_gpu = situation.device == "cuda"
    per_pair = _SMALL_PASSES if name == _SMALL else _CPU_PASSES
    passes = _GPU_PASSES if on_gpu else per_pair * max(1, situation.cores // 2)
    least, most = (100, 800) if on_gpu else (10, 400)
    if pretrained:
        passes, least, most = passes // 4, least // 4, most // 4
    return min(most, max(least, passes // max(1, situation.images)))


def _cores(count: int) -> str:
    return f"{count} CPU cores" if count > 1 else "one CPU core"


def _notes(situation: Situation, recipe: Recipe, default: str, *, why_size: str, why_batch: str) -> tuple[str, ...]:
    """Lines on what was chosen and why; choices that were given are called so."""
    name, optimizer, on_gpu = recipe.backbone.name, recipe.optimizer, situation.device == "cuda"
    reasons = {
        _SMALL: "narrow and shallow: what few cores train in hours; ResNet-50 needs a GPU",
        "resnet18": "small enough for a CPU; ResNet-50 needs a GPU",
        "resnet50": "the paper's",
        "resnet50_small": "with a 3x3 stem for small images",
    }

    def because(field: str, why: str) -> str:
        changed = "with the changes of the options" if field in ("views", "optimizer") else "given"
        return changed if situation.is_given(field) else why

    why_method = "the best of short runs on a CPU" if recipe.method == "mocov3" else "the paper's"
    where = "GPU" if on_gpu else _cores(situation.cores)
    passes, images = recipe.epochs * situation.images, counted(situation.images, "image")
    pretrained = situation.text("backbone.pretrained")
    weights = f"from the weights {pretrained}" if pretrained else "from random weights"
    sizes = f"{recipe.views[0].size} and {recipe.views[2].size} pixels"
    in_bf16 = ", in bf16 (the CPU has instructions for it)" if recipe.precision == "bf16" else ""
    notes = [
        f"photos is fitted to {images} (short side {situation.short_side} pixels in the median) and "
        f"{'a ' * on_gpu}{where}; options override each choice:",
        f"  backbone {name} ({because('backbone.name', reasons.get(default, ''))}), {weights}{in_bf16}",
        f"  views of {sizes} ({because('views', why_size)})",
        f"  {counted(recipe.epochs, 'epoch')}, {passes:,} image passes "
        f"({because('epochs', 'the fewer images, the more epochs')})",
        f"  batch {recipe.batch_size} ({because('batch_size', why_batch)})",
        f"  {recipe.method} ({because('method', why_method)})",
        f"  {optimizer.kind}, learning rate {recipe.learning_rate:.3g} for this batch, warm-up of "
        f"{optimizer.warmup_epochs:g} epochs, EMA momentum {recipe.target_decay:g} "
        f"({because('optimizer', 'by steps, batch and kind of backbone')})",
    ]
    if situation.images < FEW and not pretrained:
        notes.append(
            f"{images}: few to learn from alone (fewer than {FEW:,}): add images, with or without "
            "labels, or start from known weights with --backbone.pretrained true."
        )
    elif situation.images < FEW:
        notes.append(
            f"{images}: few (fewer than {FEW:,}): compare with mvssl-eval knn --untrained whether "
            "training on them improved the pretrained weights."
        )
    return tuple(notes)

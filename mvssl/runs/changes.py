"""What of a recipe may change when its run is resumed, and what each change means for the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mvssl.config.recipe import Recipe
from mvssl.config.serialize import changed_fields, to_dict
from pipelines.progress import counted
from pipelines.runtime import InputError, invalid

ALLOWED = "accumulate, precision and evaluation may change, epochs with --extend"


@dataclass(frozen=True, kw_only=True)
class Computed:
    """How steps are computed, as far as it may change within a run.

    Attributes:
        recipe: of the run.
        precision: its precision on the device of the run.
        ranks: number of processes.
    """

    recipe: Recipe
    precision: Literal["fp32", "bf16", "fp16"]
    ranks: int

    @property
    def micro_batch(self) -> int:
        """Images that share BatchNorm statistics: those of a micro-batch, of all ranks if they are synchronised."""
        recipe = self.recipe
        return recipe.batch_size // recipe.accumulate // (1 if recipe.sync_batchnorm != "none" else self.ranks)


def resumed_recipe(begun: Recipe, recipe: Recipe, *, extend: bool, run: str) -> Recipe:
    """The recipe with which a run that was begun with another one resumes: `recipe`, with the run's own names.

    Args:
        begun: the recipe of the run so far.
        recipe: the one that is asked for.
        extend: whether it may have more epochs.
        run: the run's folder, for errors.

    Raises:
        InputError: a field differs that determines the numbers; names all of them.
    """
    recipe = _with_normalisation_of(begun, with_names_of(begun, recipe))
    changed = {
        name: values for name, values in changed_fields(to_dict(begun), to_dict(recipe)).items() if not may_change(name)
    }
    if changed.keys() - {"epochs"}:
        told = "; ".join(f"{name}: {was!r} -> {now!r}" for name, (was, now) in changed.items())
        raise InputError(
            f"The run in {run} was started with another recipe ({told}): resume it with the same recipe and overrides "
            f"({ALLOWED}), or start a new run with another --out (--init-from loads its weights)."
        )
    if changed and not extend:
        raise InputError(
            f"The run in {run} was started for {begun.epochs} epochs and not {recipe.epochs}: leave --epochs out to "
            "finish it as it is, or add --extend to train it for more."
        )
    if recipe.epochs < begun.epochs:
        raise invalid("epochs", recipe.epochs, f"more than the {begun.epochs} of the run", "raise --epochs")
    return recipe


def may_change(name: str) -> bool:
    """Whether a field of a recipe, such as evaluation.k, may change within a run."""
    return name in ("accumulate", "precision") or name.startswith("evaluation.")


def with_names_of(begun: Recipe, recipe: Recipe) -> Recipe:
    """The recipe with the name of another one and the names of its views, which change no numbers."""
    views = recipe.views
    if len(views) == len(begun.views):
        views = tuple(replace(view, name=own.name) for view, own in zip(views, begun.views, strict=True))
    return replace(recipe, name=begun.name, views=views)


def _with_normalisation_of(begun: Recipe, recipe: Recipe) -> Recipe:
    """The recipe with the normalisation that the run took from its pretrained weights, unless it states one."""
    own, backbone = begun.backbone, recipe.backbone
    if own.pretrained is None or own.pretrained != backbone.pretrained:
        return recipe
    return replace(recipe, backbone=replace(backbone, mean=backbone.mean or own.mean, std=backbone.std or own.std))


def record_changes(options: Mapping[str, Any], before: Recipe, recipe: Recipe, *, step: int) -> dict[str, Any]:
    """The options of a run's config.json, whose `changes` say which field became what at which step.

    Args:
        options: as they are; changes at this step and later ones, which no checkpoint holds, are left out.
        before: the recipe of the steps before.
        recipe: that of the steps from `step` on.
        step: number of steps done.
    """
    kept = [change for change in options.get("changes", ()) if change["step"] < step]
    fields = changed_fields(to_dict(before), to_dict(recipe))
    new = [
        {"step": step, "field": name, "was": was, "now": now} for name, (was, now) in fields.items() if may_change(name)
    ]
    rest = {name: value for name, value in options.items() if name != "changes"}
    return rest | ({"changes": kept + new} if kept + new else {})


def describe_changes(before: Computed, now: Computed, *, step: int, batchnorm: bool) -> list[str]:
    """A sentence on each change from a step on.

    Args:
        before: how the steps before were computed.
        now: how those from `step` on are computed.
        step: number of steps done; 0 for a run that starts again.
        batchnorm: whether the network has BatchNorm.
    """
    fields = changed_fields(to_dict(before.recipe), to_dict(now.recipe))
    if step == 0:
        return [
            f"{name} is {value!r} instead of {was!r}: no checkpoint was saved, so the run starts again with it"
            for name, (was, value) in fields.items()
            if may_change(name)
        ]
    since = f"from step {step} on"
    told = _of_batches(before, now, since=since, batchnorm=batchnorm)
    if now.precision != before.precision:
        told.append(f"precision: {since} {now.precision} instead of {before.precision}: the numbers differ by rounding")
    elif "precision" in fields:
        told.append(f"precision is {now.recipe.precision!r} {since}, which is {now.precision} as before")
    return told + _of_evaluations(fields, before.recipe, since=since)


def _of_batches(before: Computed, now: Computed, *, since: str, batchnorm: bool) -> list[str]:
    """Sentences on another number of micro-batches, or of ranks where that changes BatchNorm statistics."""
    was, accumulate = before.recipe.accumulate, now.recipe.accumulate
    field = f"accumulate is {accumulate} instead of {was}"
    if batchnorm and now.micro_batch != before.micro_batch:
        cause = (
            field if accumulate != was else f"{counted(now.ranks, 'process', 'processes')} instead of {before.ranks}"
        )
        return [
            f"{cause}: BatchNorm statistics are over micro-batches of {now.micro_batch} images {since} instead of "
            f"{before.micro_batch}"
        ]
    if accumulate == was:
        return []
    samples = ", and stochastic depth samples differently" if now.recipe.backbone.drop_path > 0 else ""
    return [f"{field} {since}: the numbers differ by rounding{samples}"]


def _of_evaluations(fields: Mapping[str, tuple[Any, Any]], before: Recipe, *, since: str) -> list[str]:
    """A sentence on each changed field of the evaluation."""
    told = []
    for name, (was, value) in fields.items():
        if not name.startswith("evaluation."):
            continue
        meaning = ""
        if name == "evaluation.k":
            meaning = ": kNN is comparable with earlier values of the same k"
        elif name not in ("evaluation.every_epochs", "evaluation.probe") and before.evaluation.every_epochs:
            meaning = ": kNN and probe from here on are not comparable with earlier values"
        told.append(f"{name} is {value} instead of {was} {since}{meaning}")
    return told

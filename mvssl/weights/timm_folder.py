"""A backbone as the folder that timm and its hub loader take: config.json, model.safetensors and a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer

from mvssl.config.serialize import to_dict
from mvssl.models import small_resnets, wide_resnets
from mvssl.models.backbones import ReferencePositions
from mvssl.runs.data_record import DataRecord
from mvssl.runs.jsonl import read_metrics
from mvssl.runs.results import conditions_of, describe, read_result
from mvssl.weights.backbone_file import float_tensors, head_count
from mvssl.weights.load import LoadedBackbone, own_normalisation
from pipelines.names import NAME, visible
from pipelines.runtime import InputError, installed_version
from pipelines.views.spec import sizes_by_task

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_CITATION = """@article{deplaen2026multitask,
  title   = {Self-Supervised Learning with a Multi-Task Latent Space Objective},
  author  = {De Plaen, Pierre-Fran{\\c{c}}ois and Jha, Abhishek and Van Gool, Luc and Tuytelaars, Tinne and
             Proesmans, Marc},
  journal = {arXiv preprint arXiv:2602.05845},
  year    = {2026}
}"""


@dataclass(frozen=True, kw_only=True)
class CardFields:
    """What the model card states and nobody but its author knows.

    Attributes:
        licence: identifier of the weights' licence as the hub lists them, such as mit; None: not stated.
    """

    licence: str | None = None

    def __post_init__(self) -> None:
        if self.licence is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", self.licence):
            raise InputError(
                f"license is {self.licence!r} but must be an identifier such as mit or cc-by-nc-4.0: correct it.",
                field="license",
            )


def folder_files(loaded: LoadedBackbone, card: CardFields) -> dict[str, bytes]:
    """The files by name; `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the same features as `loaded`.

    A run's card states recipe, number of images and measured accuracies, but no path of the machine.
    """
    config = _config(loaded)
    backbone, _, _ = own_normalisation(loaded.backbone)
    return {
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS: save(float_tensors(backbone), metadata={"format": "pt"}),  # of two keys the order would be random
        CARD: _card(loaded, config, card).encode(),
    }


def _config(loaded: LoadedBackbone) -> dict[str, Any]:
    """config.json as timm reads it: architecture, arguments, and how images are prepared."""
    backbone, mean, std = own_normalisation(loaded.backbone)
    crop, resize = loaded.evaluation.crop, loaded.evaluation.resize
    known = timm.get_pretrained_cfg(loaded.architecture, allow_unregistered=True)
    # What is true of the architecture whatever its weights are; all else of timm's entry describes timm's weights.
    pretrained: dict[str, Any] = {
        name: getattr(known, name)
        for name in ("first_conv", "classifier")
        if known is not None and getattr(known, name, None) is not None
    }
    pretrained |= {
        "tag": "mvssl",
        "custom_load": False,
        "input_size": [3, crop, crop],
        "fixed_input_size": False,
        "interpolation": loaded.evaluation.interpolation,
        "crop_pct": crop / resize,
        "crop_mode": "center",
        "mean": list(mean),
        "std": list(std),
        "num_classes": 0,
        "pool_size": None,
    }
    arguments: dict[str, Any] = {}
    if isinstance(backbone, VisionTransformer):
        arguments["dynamic_img_size"] = True  # as in training: the position embedding follows the image
        if (heads := head_count(backbone, loaded.architecture)) is not None:
            arguments["num_heads"] = heads
    return {
        "architecture": loaded.architecture.partition(".")[0],
        "num_classes": 0,
        "num_features": getattr(backbone, "num_features", None),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": pretrained,
    }


def _card(loaded: LoadedBackbone, config: Mapping[str, Any], card: CardFields) -> str:
    """README.md with the hub's fields at its top."""
    head = [
        "---",
        f"license: {card.licence or 'unknown'}",
        "library_name: timm",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in ("image-feature-extraction", "timm", "self-supervised-learning", "mvssl")),
        "---",
    ]
    architecture = config["architecture"]
    parts = [
        f"# {architecture}, pre-trained without labels by mvssl",
        f"{architecture}, {config['num_features']} features an image, no classifier, "
        f"{sum(p.numel() for p in loaded.backbone.parameters()) / 1e6:.1f} million parameters.",
        "## Training",
        *_training(loaded),
        *_accuracies(loaded),
        "## Use",
        _usage(architecture),
        *_notes(loaded, config),
        "## Citation",
        f"```bibtex\n{_CITATION}\n```",
    ]
    return "\n".join(head) + "\n\n" + "\n\n".join(parts) + "\n"


def _training(loaded: LoadedBackbone) -> Iterator[str]:
    recipe, folder = loaded.recipe, loaded.folder
    if recipe is None or folder is None:
        yield f"Weights of another program, exported by mvssl {installed_version()}: {_text(loaded.about)}."
        return
    views = ", ".join(f"{_text(task or 'target')} {size}" for task, size in sizes_by_task(recipe.views).items())
    rows = {
        "method": f"{recipe.method}, {len(recipe.views)} views an image ({views} pixels), "
        f"{'one predictor per view type' if recipe.predictors == 'per-view' else 'one predictor for all views'}",
        "recipe": _text(recipe.name),
        "data": _images(loaded),
        "length": f"{recipe.epochs} epochs of batch {recipe.batch_size}; {_text(loaded.about)}",
        "optimiser": f"{recipe.optimizer.kind}, learning rate {recipe.learning_rate:g}",
        "program": f"mvssl {installed_version()}, torch {torch.__version__}, timm {timm.__version__}",
    }
    yield "\n".join(f"- **{name}**: {text}" for name, text in rows.items())
    yield "The whole recipe:"
    yield f"```json\n{json.dumps(to_dict(recipe), indent=2)}\n```"


def _text(name: str) -> str:
    """A name of others as text of a model card: neither markup, nor a link, nor a cell of a table."""
    return re.sub(r"[<>&|`\[\]*\\]", lambda found: f"&#{ord(found[0])};", visible(name, NAME))


def _images(loaded: LoadedBackbone) -> str:
    """Number of images and the name of their folder, without its path."""
    assert loaded.folder is not None
    record = DataRecord.load(loaded.folder.data)
    data = loaded.folder.option("data")
    name = f" in {_text(data.name)}" if data is not None and data.name else ""
    count = f"{len(record.keys):,} images" if record is not None else "images"
    return f"{count}{name}"


def _accuracies(loaded: LoadedBackbone) -> Iterator[str]:
    """Table of results of mvssl-eval that were measured on this network, and the online kNN's."""
    if loaded.folder is None:
        return
    rows, ways = [], []
    for path in sorted(loaded.folder.evaluations.glob("*.json")):
        try:
            result = read_result(path)
        except InputError:  # not a result, or damaged: the card says what is known
            continue
        if result["network"] != loaded.network:
            continue
        best = result["results"].get("best", result["results"])
        low, high = best["top1_interval_95"]
        rows.append(f"| {_text(result['evaluation'])} | {best['top1']:.1%} ({low:.1%} to {high:.1%}) |")
        ways.append(f"{_text(result['evaluation'])}: {describe(conditions_of(result))}")
    online = _online_knn(loaded) if loaded.network == "online" else None
    if online is not None:
        step, k, accuracy = online
        rows.append(f"| kNN during training, k = {k}, step {step} | {accuracy:.1%} |")
    if rows:
        yield "## Measured accuracy"
        yield "\n".join(["| evaluation of frozen features | top-1 (95 % interval) |", "|---|---|", *rows])
        if ways:
            yield "\n".join(f"- {way}" for way in ways)


def _online_knn(loaded: LoadedBackbone) -> tuple[int, int, float] | None:
    """Step, k and top-1 accuracy of the last online kNN; None if there was none."""
    assert loaded.folder is not None
    if not loaded.folder.metrics.exists():
        return None
    rows = [row for row in read_metrics(loaded.folder.metrics) if row["kind"] == "knn"]
    if not rows:
        return None
    first = loaded.evaluation.k[0]
    value = rows[-1].get("top1", rows[-1].get(f"top1/{first}"))
    return None if value is None else (rows[-1]["step"], first, float(value))


def _usage(architecture: str) -> str:
    register = [
        f"import {module.__name__}  # registers the name with timm"
        for module in (small_resnets, wide_resnets)
        if architecture in module.NAMES
    ]
    code = [
        "import timm",
        *register,
        'backbone = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:USER/NAME"',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone))",
        "features = backbone(transform(image)[None])",
    ]
    return "```python\n" + "\n".join(code) + "\n```"


def _notes(loaded: LoadedBackbone, config: Mapping[str, Any]) -> Iterator[str]:
    prepared = config["pretrained_cfg"]
    yield (
        f"Images are resized ({prepared['interpolation']}) to {loaded.evaluation.resize} pixels, cropped to "
        f"{loaded.evaluation.crop} and normalised by mean {prepared['mean']} and standard deviation {prepared['std']}."
    )
    if isinstance(loaded.backbone, ReferencePositions):
        yield (
            f"At sizes other than {loaded.backbone.patch_embed.img_size[0]} pixels timm interpolates position "
            "embeddings in another way than in training: features differ slightly there."
        )


def check_push(name: str) -> None:
    """Check what `push` needs before anything is computed or written.

    Raises:
        InputError: huggingface_hub is missing, the name is none, or no account is logged in.
    """
    try:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id
    except ImportError as error:
        raise InputError("push needs huggingface_hub, which is not installed: pip install huggingface_hub.") from error
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(
            f"push is {name!r} but must be NAME or USER/NAME of letters, digits, - . and _: correct it.", field="push"
        ) from error
    if get_token() is None:
        raise InputError(
            "push needs an account of the hub: run `hf auth login`, or set HF_TOKEN to a token that may write."
        )


def push(files: Mapping[str, bytes], name: str, *, private: bool = False) -> str:
    """Upload the files to the hub's repository `name` (USER/NAME, or NAME alone), which is created if need be.

    A model card that is there already is kept. Returns the repository's address. Endpoint, token and cache are those of
    huggingface_hub (HF_ENDPOINT, HF_TOKEN, `hf auth login`).

    Raises:
        InputError: `check_push` fails, or the hub refuses or cannot be reached.
    """
    check_push(name)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="mvssl", library_version=installed_version())
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        kept = api.file_exists(address.repo_id, CARD)
        operations = [
            CommitOperationAdd(path_in_repo=file, path_or_fileobj=content)
            for file, content in files.items()
            if not (kept and file == CARD)
        ]
        api.create_commit(
            address.repo_id, operations, commit_message=f"Backbone exported by mvssl {installed_version()}"
        )
    except Exception as error:  # its HTTP libraries raise types of their own, which changed between versions
        raise InputError(f"push of {name!r} failed ({_reason(error)}): {_remedy(error)}.") from error
    return f"{address}" + (f" (its {CARD} is kept)" if kept else "")


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _reason(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return visible(text[:300])


def _remedy(error: Exception) -> str:
    status = _status(error)
    if status == 401:
        return "log in again (`hf auth login`), or set HF_TOKEN to a valid token"
    if status in (403, 404):
        return "use a token that may write, and a name of your own account or organisation"
    if status == 429 or (status is not None and status >= 500):
        return "the hub is busy or down; the same command later uploads what is missing"
    return "check the network and HF_ENDPOINT; the folder written by --out can be uploaded later with `hf upload`"

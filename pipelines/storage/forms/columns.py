"""Finds the columns of images and labels of an Arrow schema, as Parquet files and `datasets` have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.files import parse_json
from pipelines.runtime import InputError
from pipelines.storage.file_index import begins_as_image
from pipelines.storage.forms.base import IMAGE_NAMES, LABEL_NAMES, NO_LABEL, Labels, Request, need, number_labels

LOOKED_AT = 16  # rows whose first bytes tell a column of images from others
_MORE_LABELS = (*LABEL_NAMES, "fine_label", "label_name", "class_name", "synset", "wnid")
_METADATA = b"huggingface"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table.

    Attributes:
        image: name of the images.
        is_struct: they are structs with `bytes`.
        has_path: these have a `path` too.
        label: name of the labels; None for none.
        names: class names by label, if the metadata say them.
        others: other columns that may be labels, for the user.
    """

    image: str
    is_struct: bool
    has_path: bool
    label: str | None
    names: tuple[str, ...] | None
    others: tuple[str, ...] = ()

    @property
    def leaf(self) -> str:
        """The column of the bytes."""
        return f"{self.image}.bytes" if self.is_struct else self.image

    def __str__(self) -> str:
        label = "no labels" if self.label is None else f"label column {self.label!r}"
        more = f", not {', '.join(map(repr, self.others))}" if self.others else ""
        return f"image column {self.image!r}, {label}{more}"


def find_columns(schema: Any, *, where: object, request: Request, heads: dict[str, list[bytes]]) -> Columns:
    """Choose the columns.

    Args:
        schema: Arrow's; the metadata of `datasets` name classes.
        where: the data, for messages.
        request: ``--image`` and ``--label`` choose columns.
        heads: first bytes of some values of each column of bytes, from `image_columns`.

    Raises:
        InputError: there is no column of images, or there are several; or a chosen one cannot be used.
    """
    features = features_of(schema)
    candidates = image_columns(schema)
    images = [name for name in candidates if any(map(begins_as_image, heads.get(name, ())))]
    if request.image is not None:
        image = _given(schema, request.image, where, images)
    elif len(images) == 1:
        image = images[0]
    elif images:
        usual = [name for name in IMAGE_NAMES if name in images]
        marked = [name for name in images if _kind(features, name) == "Image"]
        best = marked if len(marked) == 1 else usual[:1]
        if not best:
            raise InputError(
                f"{where} has several columns of images ({', '.join(images)}): choose one, such as --image {images[0]}."
            )
        image = best[0]
    elif candidates and not any(heads.get(name) for name in candidates):
        raise InputError(
            f"{where} holds no images: {', '.join(candidates)} has no rows, or only empty ones; give files with images."
        )
    else:
        raise InputError(
            f"{where} has no column of images (encoded bytes, or a struct with `bytes`); its columns are "
            f"{_described(schema)}: give files with images."
        )
    kind = schema.field(image).type
    label, others = _label(schema, features, request, where)
    names = features.get(label, {}).get("names") if label is not None else None
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{where} has class names of {label!r} that are no list of texts: correct its metadata.")
    return Columns(
        image=image,
        is_struct=_is_struct(kind),
        has_path=_is_struct(kind) and kind.get_field_index("path") >= 0,
        label=label,
        names=None if names is None else tuple(names),
        others=tuple(others),
    )


def image_columns(schema: Any) -> list[str]:
    """Columns that may hold images: bytes, or structs with `bytes`."""
    return [field.name for field in schema if _is_bytes(field.type) or _is_struct(field.type)]


def features_of(schema: Any) -> dict[str, Any]:
    """The features that `datasets` keeps in a schema's metadata; {} if there are none."""
    try:
        content = parse_json((schema.metadata or {})[_METADATA])
        features = content["info"]["features"]
        return {name: one for name, one in features.items() if isinstance(one, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def labels_of(columns: Columns, values: Any, *, where: object) -> Labels:
    """Labels of an Arrow array or chunked array of the label column."""
    kind = str(values.type)
    if kind.startswith("dictionary"):
        values = values.cast(values.type.value_type)
    if kind == "bool":
        values = values.cast("int8")
    if kind in ("float", "double", "halffloat"):
        pc = need("pyarrow.compute", "Reading labels")
        whole = pc.fill_null(values, -1)
        if not pc.all(pc.equal(whole, pc.floor(whole))).as_py():
            raise InputError(
                f"{where} has fractions as labels in {columns.label!r}: name another with --label, or use --label none."
            )
        values = values.cast("int64")
    if values.null_count == 0 and str(values.type) in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"):
        return number_labels(np.asarray(values.cast("int64")), where=where, names=columns.names)
    return number_labels(values.to_pylist(), where=where, names=columns.names)


def _given(schema: Any, name: str, where: object, images: Sequence[str]) -> str:
    if name in images:
        return name
    if schema.get_field_index(name) < 0:
        raise InputError(
            f"--image is {name!r} but must be a column of {where} ({', '.join(schema.names)}): choose one of these.",
            field="--image",
        )
    raise InputError(
        f"--image is {name!r} but must be a column of encoded images, and in {where} it is {schema.field(name).type} "
        f"and begins as no image: choose another one{' (' + ', '.join(images) + ')' if images else ''}.",
        field="--image",
    )


def _label(schema: Any, features: dict[str, Any], request: Request, where: object) -> tuple[str | None, list[str]]:
    """The label column, and others that may be meant."""
    usable = [field.name for field in schema if _is_label(field.type)]
    if request.label == NO_LABEL:
        return None, []
    if request.label is not None:
        if request.label in usable:
            return request.label, []
        kind = f", and it is {schema.field(request.label).type}" if request.label in schema.names else ""
        raise InputError(
            f"--label is {request.label!r} but must be a column of integers or texts of {where} "
            f"({', '.join(usable) or 'it has none'}){kind}: choose one of these, or none.",
            field="--label",
        )
    marked = [name for name in usable if _kind(features, name) == "ClassLabel"]
    order = {name: n for n, name in enumerate(_MORE_LABELS)}
    usual = sorted((name for name in usable if name.lower() in order), key=lambda name: order[name.lower()])
    first = [name for name in usual if name in marked] or marked or usual
    return (first[0], [name for name in marked if name != first[0]]) if first else (None, [])


def _kind(features: dict[str, Any], name: str) -> str:
    return str(features.get(name, {}).get("_type", ""))


def _is_bytes(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view") or str(kind).startswith("fixed_size_binary")


def _is_struct(kind: Any) -> bool:
    if not str(kind).startswith("struct"):
        return False
    at = kind.get_field_index("bytes")
    return at >= 0 and _is_bytes(kind.field(at).type)


def _is_label(kind: Any) -> bool:
    words = ("int", "uint", "string", "large_string", "bool", "dictionary", "float", "double", "halffloat")
    return str(kind).startswith(words)


def _described(schema: Any) -> str:
    """Names and types of columns, in a few words."""
    shown = []
    for field in list(schema)[:12]:
        text = str(field.type)
        nested = (
            " (nested: images must be bytes of their own)" if text.startswith(("list", "large_list", "fixed")) else ""
        )
        shown.append(f"{field.name}: {text[:60]}{nested}")
    return json.dumps(", ".join(shown), ensure_ascii=False)[1:-1] or "none"

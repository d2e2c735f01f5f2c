"""JSON files with a checksum of their own content, which shows a flipped bit or a forgotten edit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.files import read_json, write_whole

CHECKSUM = "checksum"  # name of the entry


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def write_checked(path: Path, content: Mapping[str, Any]) -> None:
    """Write a whole JSON file with its checksum."""
    write_json(path, with_checksum(content))


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with their checksum."""
    return {**content, CHECKSUM: _checksum(content)}


def read_checked(path: Path) -> dict[str, Any]:
    """The content of a JSON file, without its checksum; files of earlier versions have none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object (see `read_json`), or its checksum is that of another content.
    """
    content = read_object(path)
    check_checksum(content)
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file with its checksum, which is not compared; raises as `read_checked`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def check_checksum(content: dict[str, Any]) -> None:
    """Take the checksum out of the content of a file; ValueError if it is that of another content."""
    stored = content.pop(CHECKSUM, None)
    if stored is not None and stored != _checksum(content):
        raise ValueError(f'its content has another checksum; if you have edited it, delete its "{CHECKSUM}"')


def _checksum(content: Mapping[str, Any]) -> str:
    """Hash of JSON values, in whatever order and layout the file has them."""
    plain = json.loads(json.dumps({name: value for name, value in content.items() if name != CHECKSUM}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]

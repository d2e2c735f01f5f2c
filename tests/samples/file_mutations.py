"""Damages and lies for files of any kind, from a seed: flipped bits, cut and spliced bytes, other values in JSON."""

from __future__ import annotations

import json
import random
from typing import Any

EVIL: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, -(2**63), 10**9, 10**30, 10**400, 0.5, -0.0, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "../../a",
        "/etc/passwd",
        "\0",
        "\ud800",
        "[/b]\x1b[1m\n",
        "9" * 5000,
        "x" * 9000,
    ),
    *([], {}, [[]], [None], ["a"], {"a": 1}, [1] * 2000, {"a": {"b": [1, 2]}}),
)
_NUMBERS = (
    b"\0" * 4,
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\0" * 8,
    b"\xff" * 8,
    b"\xff" * 7 + b"\x7f",
    b"[" * 3000,
)


def mutated(content: bytes, seed: int) -> bytes:
    """The content with one to four changes."""
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 4)):
        kind = chance.random()
        if kind < 0.5 and (changed := _other_value(content, chance)) is not None:
            content = changed
        else:
            content = _other_bytes(content, chance)
    return content


def _other_bytes(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return chance.randbytes(20)
    at, to = sorted(chance.randrange(len(content)) for _ in range(2))
    match chance.randrange(7):
        case 0:
            return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
        case 1:
            return content[:at]
        case 2:
            return content[:at] + content[to:]
        case 3:
            return content[:to] + content[at:]
        case 4:
            number = chance.choice(_NUMBERS)
            return content[:at] + number + content[at + len(number) :]
        case 5:
            return content[:at] + chance.choice(_NUMBERS) + content[at:]
        case _:
            length = min(chance.randrange(1, 64), len(content) - at)
            return content[:at] + chance.randbytes(length) + content[at + length :]


def _other_value(content: bytes, chance: random.Random) -> bytes | None:
    """JSON or a line of JSON with another value, a new name, or one that is missing; None if it is no JSON."""
    lines = content.splitlines(keepends=True) if content[:1] == b"{" and b"}\n{" in content else [content]
    number = chance.randrange(len(lines))
    try:
        value = json.loads(lines[number])
        places = list(_places(value))
        if not places:
            return None
        inner, key = chance.choice(places)
        if chance.random() < 0.15:
            del inner[key]
        else:
            inner[key] = chance.choice(EVIL)
        if chance.random() < 0.05:
            value = chance.choice(EVIL)
        lines[number] = json.dumps(value).encode() + b"\n" * lines[number].endswith(b"\n")
    except (ValueError, RecursionError):
        return None
    return b"".join(lines)


def _places(value: Any) -> Any:
    """Every container below a value, with each of its keys."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield value, key
        yield from _places(one)

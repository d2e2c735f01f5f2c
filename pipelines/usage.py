"""Wrong usage of a command in one sentence, from the box that tyro prints about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

from pipelines.names import shortened, visible

_LONGEST = 100  # characters of a word in a sentence
_COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
_KINDS = {"INT": "whole number", "FLOAT": "number", "STR": "text", "PATH": "path"}


def sentence(box: str, words: Sequence[str], prog: str, read_help: Callable[[], str]) -> str:
    """What is wrong with the words of a command, and the remedy; "" if the box is of no known kind.

    Args:
        box: as printed by tyro, in any width.
        words: the words that were parsed.
        prog: name of the command.
        read_help: gives the text of its --help.
    """
    lines = [line.strip(" \t│|") for line in box.splitlines()]
    rule = next((number for number, line in enumerate(lines[2:], 2) if re.fullmatch("[─-]{5,}.*", line)), len(lines))
    text, remedy = " ".join(filter(None, lines[:rule])), f"see {prog} --help"
    if "Unrecognized options: " in text:
        unknown = _unknown_options(words, read_help())
        stray = shortened(text.partition("Unrecognized options: ")[2].strip(), _LONGEST)
        what = f"has no option {', '.join(unknown)}" if unknown else f"has no use for {visible(stray)}"
        return f"{prog} {what}: {remedy}."
    if found := re.search(r"invalid choice (.+) for argument '(\S+)'\. Expected one of \((.*?),?\)", text):
        choices = [choice.strip("'") for choice in found[3].split(", ")]
        choices = sorted(choices) if "None" in choices else choices  # tyro's are in the order of a set
        near = difflib.get_close_matches(found[1].strip("'").lower(), choices, n=1)
        remedy = f"did you mean {near[0]}?" if near else "choose one of these."
        return f"{found[2]} is {shortened(found[1], _LONGEST)} but must be one of {', '.join(choices)}: {remedy}"
    if found := re.search(r"Missing value for argument '(\S+)'\. Expected (\d+)", text):
        values, count = _values(words, found[1]), int(found[2])
        allowed = "have one" if count == 1 else f"be {_COUNTS.get(count, count)} values"
        return f"{found[1]} {_given(values)} but must {allowed}: {remedy}."
    if "Missing from " in text:
        missing = " and ".join(_missing(box))
        return f"{missing} {'are' if ' and ' in missing else 'is'} missing: {remedy}." if missing else ""
    found = re.search(r"Error parsing (\S+): (.*)", text)
    if found is None:
        return ""
    option, reason = found[1].partition("/")[0], found[2].strip()
    if " but must be " in reason or re.match("[A-Z][a-z]", option):  # of a dataclass, which wrote it
        return reason
    values = _values(words, option)
    form = re.search(r"no type matching (.*?) could be instantiated", reason)
    helped = re.search(rf"^[ │|]*{re.escape(option)}[ ,](.*)$", box.partition("Argument helptext:")[2], re.MULTILINE)
    allowed = _form(form[1] if form else helped[1].strip(" │|") if helped else "")
    for kind, words_of_python in (("whole number", "invalid literal for int()"), ("number", "string to float")):
        if words_of_python in reason and form is None:
            allowed = f"a {kind}"  # whatever the option calls its value
    return f"{option} {_given(values)} but must be {allowed}: {remedy}."


def _given(values: Sequence[str]) -> str:
    return f"is {shortened(repr(' '.join(values)), _LONGEST)}" if values else "has no value"


def empty_argument(words: Sequence[str]) -> str:
    """The options, or the first position, with an empty value."""
    named = []
    for before, word in zip(("", *words), words, strict=False):
        option, is_given, value = word.partition("=")
        if option.startswith("--") and is_given and not value.strip():
            named.append(option)
        elif before.startswith("--") and not word.strip():
            named.append(before)
    first = next((number for number, word in enumerate(words, start=1) if not word.strip()), 0)
    return " or ".join(named) or f"argument {first}"


def _form(metavar: str) -> str:
    """A form of values as tyro writes it, such as {None}|{FLOAT FLOAT} or [INT [INT ...]], in words."""
    kinds: list[str] = []
    for part in metavar.split("|"):
        names = re.findall(r"[A-Z]+\b", part)
        if part.strip() == "{None}":
            continue
        if not names or any(name not in _KINDS for name in names):
            return f"{metavar or 'another value'}"
        if part.strip().startswith("["):  # the "..." may be in a line of its own
            each = list(dict.fromkeys(_KINDS[name] for name in names))
            kinds.append(f"{each[0]}s" if len(each) == 1 else f"a {' and a '.join(each)}, once or more")
        else:
            kinds.append(f"{_COUNTS.get(len(names), len(names))} {_KINDS[names[0]]}{'s' * (len(names) > 1)}")
    return " or ".join([*kinds, *(["None"] if "{None}" in metavar else [])])


def _values(words: Sequence[str], option: str) -> list[str]:
    """The values of an option, where it is given last."""
    values: list[str] = []
    taking = False
    for word in words:
        name, is_given, value = word.partition("=")
        if word.startswith("--"):
            taking = name.replace("_", "-") == option.replace("_", "-")
            values = ([value] if is_given else []) if taking else values
        elif taking:
            values.append(word)
    return values


def _missing(box: str) -> list[str]:
    """Names of the arguments that are missing."""
    within = re.split("[─-]{5,}", box.partition("Missing from ")[2])[0]
    listed = [line.strip("│|").rstrip() for line in within.splitlines()[1:]]
    first = next((line for line in listed if line.strip()), "")
    indent = len(first) - len(first.lstrip())
    return [line.split()[0] for line in listed if line[:indent].isspace() and line[indent : indent + 1].strip()]


def _unknown_options(words: Sequence[str], text: str) -> list[str]:
    """The options among the words that a help text does not list, each with the nearest one that it does."""
    known = dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9]", text))
    unknown = []
    for word in dict.fromkeys(word.partition("=")[0] for word in words if re.match(r"--?[^\W\d]", word)):
        plain = word.replace("_", "-")
        if plain in known or plain == "-h":
            continue
        plain = plain.lstrip("-")[:100]
        near = [option for option in known if option.endswith(f".{plain}")]  # --base-lr
        near = near or [f"--{name}" for name in difflib.get_close_matches(plain, [name[2:] for name in known], n=1)]
        near = near or [option for option in known if option.endswith(f"-{plain}")]  # --lr
        unknown.append(visible(word, 100) + (f" (did you mean {near[0]}?)" if near else ""))
    return unknown

"""Names that others may give to files, classes, tasks and runs, for tests of everything that shows names."""

from __future__ import annotations

import re
import unicodedata

from hypothesis import strategies as st

PIECES = (
    *("[/x]", "[bold]", "[link=http://x]y[/link]", ":smile:", "{}", "{0.x}", "%s", "%(a)s", "%", "\\", "\\n", "\\x1b"),
    *(
        "\x1b[31m",
        "\x1b]0;title\x07",
        "\x9b31m",
        "\a",
        "\b",
        "\r",
        "\n",
        "\r\n",
        "\t",
        "\v",
        "\f",
        "\0",
        "\x7f",
        "\x85",
    ),
    *("\u202e", "\u2066", "\u200b", "\u200d", "\ufeff", "\u2028", "\u00ad", "\U000e0041", "\u3164"),
    *("\udce9", "\ud83d"),
    *("$x^2$", "$", "\\$", "_", "#", "*", "<script>alert(1)</script>", "</title>", "]]>", "<!--"),
    *("&amp;", "&", '"'),
    *(
        "'",
        "=1+1",
        "+1",
        "-1",
        "-x",
        "--out",
        "@a",
        "\uff1d1",
        " =1",
        ",",
        ";",
        "a,=1",
        " ",
        "  ",
        "日本",
        "😀",
        "é",
        "e\u0301",
    ),
    *("a" * 60, "x" * 9000, "."),
)
"""What some reader of text takes for more than text, or some display does not show."""

names = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
)
"""Any text, and what is made of `PIECES`."""

UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of characters that control something or are not seen."""


def unseen(text: str, *, lines: bool = False) -> list[str]:
    """Characters of a text that control something or are not seen; line ends only without `lines`."""
    return [c for c in text if unicodedata.category(c) in UNSEEN and not (lines and c in "\r\n")]


def read_back(shown: str) -> str:
    """The text that escapes such as ``\\n``, ``\\x1b`` and ``\\u202e`` stand for, by Python's own rules."""
    escape = re.compile(r"\\(?:[nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
    return escape.sub(lambda found: found[0].encode().decode("unicode_escape"), shown)

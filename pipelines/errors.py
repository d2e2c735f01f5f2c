"""The one error type for what a user can put right."""

from __future__ import annotations


class InputError(ValueError):
    """A value, file or folder given by the user cannot be used; the message is a sentence with the remedy.

    Command-line programs print the message without a traceback and exit with code 1.
    """


def invalid(field: str, value: object, allowed: str, remedy: str) -> InputError:
    """Build the error for a field that has a value it must not have.

    Args:
        field: name of the field as the user writes it, e.g. ``ViewSpec.size``.
        value: the value that was given.
        allowed: what is allowed, to be read after "must be".
        remedy: what to do, an imperative without a full stop.
    """
    return InputError(f"{field} is {value!r} but must be {allowed}: {remedy}.")

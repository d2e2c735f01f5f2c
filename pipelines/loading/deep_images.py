"""States the range of values of a source's deep images, or stops where it would have to be guessed."""

from __future__ import annotations

from pipelines.decode.limits import ImageLimits
from pipelines.runtime import InputError
from pipelines.storage.deep_sample import measure_sample, warn_if_black_or_white
from pipelines.storage.image_facts import facts_of
from pipelines.storage.source import Source
from pipelines.value_range import ValueRange


def state_value_range(
    source: Source,
    stated: ValueRange | None,
    *,
    default: ValueRange | None = None,
    limits: ImageLimits | None = None,
) -> None:
    """Keep the range of values, and limits, with the source, for all who decode its images.

    Args:
        source: the images.
        stated: the range that the user states.
        default: the range to take if neither the user nor the conversion of the data states one.
        limits: of images; None for the defaults.

    Raises:
        InputError: the data were converted with another range than `stated`; or no range is known, and a sample of the
            images shows that they do not use their bits.
    """
    facts = facts_of(source)
    facts.limits = limits or ImageLimits()
    if facts.value_range is not None:
        if stated not in (None, facts.value_range):
            raise InputError(
                f"value_range is {str(stated)!r} but must be {str(facts.value_range)!r}, with which {source.location} "
                "was converted: leave --value-range out, or convert the data again with it.",
                field="value_range",
            )
        return
    facts.value_range = stated or default
    if facts.value_range is None:
        _check_sample(source)
    elif stated is not None:
        warn_if_black_or_white(source, stated)


def pixels_of(source: Source) -> str:
    """The source's fingerprint, with the range of its values and other limits if any: equal pixels, equal text."""
    facts = facts_of(source)
    others = [facts.value_range] if facts.value_range is not None else []
    changed = [facts.limits] if facts.limits != ImageLimits() else []
    return " ".join(map(str, (source.fingerprint, *others, *changed)))


def _check_sample(source: Source) -> None:
    """Check that an evenly spread sample of the images needs no range."""
    found = [(key, measured) for key, measured in measure_sample(source) if not measured.is_black]
    if not found or any(measured.uses_16_bits for _, measured in found):
        return  # an image of fewer bits among those of 16 is refused when it is decoded
    key, largest = max(found, key=lambda item: item[1].high)
    values = f"values from {largest.low:.6g} to {largest.high:.6g}"
    if largest.fits_16_bits:
        bits = int(largest.suggestion().high).bit_length()
        values = f"values up to {largest.high:.0f}, {bits} bits in a file of 16, which would be nearly black"
    raise InputError(
        f"value_range is not stated but must be for images such as {key} of {source.location} ({values}): add "
        f"{largest.suggestion().option()}, or convert the images with mvssl-convert, which measures it.",
        field="value_range",
    )

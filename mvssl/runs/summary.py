"""summary.json: how far a run came, how fast, what its bottleneck was, and which images could not be decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from mvssl.runs.checked_json import write_json
from pipelines.checks import check_types
from pipelines.files import read_json
from pipelines.runtime import InputError


@dataclass(frozen=True, kw_only=True)
class Summary:
    """State of a run when it finished, stopped or diverged.

    Attributes:
        step: optimiser steps done.
        total_steps: optimiser steps of the whole run.
        stopped_by: name of the signal or limit that stopped it, or "divergence" or "collapse"; None if it is finished.
        images_per_second: source images/s since the run was started or resumed, evaluations and saves left out.
        data_wait: fraction of that time in which the step waited for a batch.
        bottleneck: a sentence (`mvssl.monitor.bottleneck`).
        bad_images: reason by key of the undecodable images that rank 0 met, since the beginning of the run.
    """

    step: int
    total_steps: int
    stopped_by: str | None = None
    images_per_second: float
    data_wait: float
    bottleneck: str
    bad_images: Mapping[str, str] = field(default_factory=dict)


def write_summary(path: Path, summary: Summary) -> None:
    """Write summary.json; undecodable images that an earlier part of the run noted there are kept.

    Raises:
        InputError: the earlier file is damaged.
        OSError: the file cannot be written; an earlier one is untouched.
    """
    earlier = read_summary(path)
    known = earlier.bad_images if earlier is not None else {}
    write_json(path, asdict(summary) | {"bad_images": {**known, **summary.bad_images}})


def read_summary(path: Path) -> Summary | None:
    """Contents of summary.json; None for runs that are going on, were killed, or are older than this file.

    Raises:
        InputError: the file is damaged.
    """
    try:
        held = read_json(path)
        summary = Summary(**{each.name: held[each.name] for each in fields(Summary)})
        check_types(summary, "")
        if not isinstance(summary.bad_images, dict):
            raise ValueError("bad_images is no table")
        if not all(isinstance(reason, str) for reason in summary.bad_images.values()):
            raise ValueError("bad_images has a reason that is no text")
        return summary
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it, the run does not need it.") from error

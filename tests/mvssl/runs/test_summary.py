"""summary.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mvssl.runs.summary import Summary, read_summary, write_summary
from pipelines.runtime import InputError

SUMMARY = Summary(
    step=4,
    total_steps=12,
    stopped_by="SIGTERM",
    images_per_second=100.5,
    data_wait=0.25,
    bottleneck="the bottleneck is decoding",
    bad_images={"a.jpg": "truncated"},
)


def test_a_resumed_run_keeps_the_undecodable_images_of_its_first_part(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    assert read_summary(path) is None
    write_summary(path, SUMMARY)
    assert read_summary(path) == SUMMARY
    finished = replace(SUMMARY, step=12, stopped_by=None, bad_images={"b.jpg": "no JPEG"})
    write_summary(path, finished)
    assert read_summary(path) == replace(finished, bad_images={"a.jpg": "truncated", "b.jpg": "no JPEG"})


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"step": 1})])
def test_a_damaged_summary_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"summary\.json is damaged .*: delete it"):
        read_summary(path)


def test_a_finished_run_has_a_summary(finished: Path) -> None:
    summary = read_summary(finished / "summary.json")
    assert summary is not None
    assert (summary.step, summary.total_steps, summary.stopped_by, summary.bad_images) == (12, 12, None, {})
    assert summary.bottleneck.startswith("the bottleneck is")

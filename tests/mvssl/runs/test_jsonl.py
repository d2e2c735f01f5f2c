"""JSON Lines files: cut back to a checkpoint, and readable after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvssl.runs.jsonl import JsonLines, complete_bytes, read_jsonl
from pipelines.runtime import InputError


def test_json_lines_are_cut_back_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1})
    size = lines.sync()
    lines.write({"step": 2})
    lines.close()
    with path.open("ab") as file:
        file.write(b'{"step": 3')  # a kill during a write
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]
    lines = JsonLines(path, keep_bytes=size)
    lines.write({"step": 20})
    lines.close()
    assert [row["step"] for row in read_jsonl(path)] == [1, 20]


def test_a_metrics_file_shorter_than_its_checkpoint_says_is_not_padded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n')
    with pytest.raises(InputError, match=r"has 12 bytes but had 100"):
        JsonLines(path, keep_bytes=100)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_line_is_not_appended_to_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "throughput.jsonl"
    assert complete_bytes(path) == 0
    path.write_bytes(b'{"step": 1}\n{"st')
    lines = JsonLines(path, keep_bytes=complete_bytes(path))
    lines.write({"step": 2})
    lines.close()
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]


def test_nan_is_never_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        lines.write({"loss": float("nan")})
    lines.close()

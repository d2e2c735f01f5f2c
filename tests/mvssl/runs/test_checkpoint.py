"""Checkpoints: atomic, verified, and the last good one survives everything."""

from __future__ import annotations

import json
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from mvssl.runs import checkpoint
from pipelines.runtime import InputError

STATE: dict[str, Any] = {"weights": torch.arange(1000.0), "nested": {"list": [1, 2.5, "three"]}}


def save(root: Path, step: int, **more: Any) -> Path:
    return checkpoint.save(root, step=step, state=STATE, meta={"data": "abc"}, keep=more.pop("keep", 2))


def test_round_trip_and_last_link(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save(tmp_path, 7)
    loaded = checkpoint.load(tmp_path / "last")
    assert loaded.meta["step"] == 7
    assert loaded.meta["data"] == "abc"
    assert torch.equal(loaded.state["weights"], STATE["weights"])
    assert loaded.state["nested"] == STATE["nested"]
    plain = torch.load(tmp_path / "last" / "state.pt", weights_only=True)
    assert torch.equal(plain["weights"], loaded.state["weights"])


def test_keeps_the_newest_only(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000003", "step-00000010"]


def test_a_flipped_bit_is_noticed_and_the_earlier_one_offered(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)
    with pytest.raises(InputError, match=r"damaged.*ln -sfn step-00000001 .*last"):
        checkpoint.load(tmp_path / "last")
    (tmp_path / "last").unlink()
    (tmp_path / "last").symlink_to("step-00000001")
    assert checkpoint.load(tmp_path / "last").meta["step"] == 1


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2) / "state.pt"
    damaged.write_bytes(b"")
    save(tmp_path, 2)
    assert checkpoint.load(tmp_path / "last").meta["step"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-00000001", "step-00000002"]


def test_the_remedy_is_right_for_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        save(Path("checkpoints"), step)
    (tmp_path / "checkpoints" / "last" / "state.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"ln -sfn step-00000001 checkpoints/last"):
        checkpoint.load(Path("checkpoints/last"))


def test_a_lost_link_is_not_a_lost_run(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "last").unlink()
    with pytest.raises(InputError, match=r"ln -sfn step-00000003"):
        checkpoint.load(tmp_path / "last")


def test_later_checkpoints_of_a_run_set_back_are_not_counted(tmp_path: Path) -> None:
    for step in (8, 12):
        save(tmp_path, step)
    for step in (9, 10):
        save(tmp_path, step)
    kept = sorted(p.name for p in tmp_path.glob("step-*"))
    assert kept == ["step-00000009", "step-00000010", "step-00000012"]


@pytest.mark.parametrize("damage", ["truncate", "delete", "no-json", "bad-json"])
def test_every_damage_gives_an_error_message(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, 2)
    state, meta = path / "state.pt", path / "checkpoint.json"
    match damage:
        case "truncate":
            state.write_bytes(state.read_bytes()[:100])
        case "delete":
            state.unlink()
        case "no-json":
            meta.unlink()
        case "bad-json":
            meta.write_text("{")
    with pytest.raises(InputError, match=r"damaged.*no earlier one"):
        checkpoint.load(tmp_path / "last")


def test_another_format_is_refused(tmp_path: Path) -> None:
    meta = save(tmp_path, 2) / "checkpoint.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 99}))
    with pytest.raises(InputError, match="format 99 but this version of mvssl reads format 2"):
        checkpoint.load(tmp_path / "last")


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoint.load(tmp_path / "last")


def test_a_full_disk_keeps_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails inside the real torch.save, which reports something else."""
    save(tmp_path, 1)
    written = 0

    class FullDisk(FileIO):
        def write(self, data: Any) -> int:
            nonlocal written
            written += len(data)
            if written > 1000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    def open_full(path: Path, mode: str = "r") -> Any:
        return FullDisk(path, mode) if mode == "wb" else real_open(path, mode)

    real_open = Path.open
    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(
        InputError, match=r"step 2 could not be written.*No space left.*intact \(step-00000001\).*--resume"
    ):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "last").meta["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-00000001"]


def test_a_half_written_checkpoint_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    temporary = tmp_path / ".writing-00000002"
    temporary.mkdir()
    (temporary / "state.pt").write_bytes(b"half")
    assert checkpoint.load(tmp_path / "last").meta["step"] == 1
    save(tmp_path, 2)
    assert not temporary.exists()
    assert checkpoint.load(tmp_path / "last").meta["step"] == 2

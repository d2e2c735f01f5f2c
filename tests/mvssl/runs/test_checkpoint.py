"""Checkpoints: atomic, verified, and the last good one survives everything."""

from __future__ import annotations

import json
import shutil
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from mvssl.runs import checkpoint
from pipelines.runtime import InputError

STATE: dict[str, Any] = {"weights": torch.arange(1000.0), "nested": {"list": [1, 2.5, "three"]}}


def save(root: Path, step: int, **more: Any) -> Path:
    return checkpoint.save(root, step=step, state=STATE, meta={"data": "abc"}, **{"keep": 2, **more})


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


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("step-*"))


def test_the_best_one_is_kept_in_addition(tmp_path: Path) -> None:
    for step, best in ((1, [1]), (2, [1, 2]), (3, [1, 3, 2]), (4, [1, 4, 3, 2])):
        save(tmp_path, step, best=best)
    assert names(tmp_path) == ["step-00000001", "step-00000003", "step-00000004"]
    assert checkpoint.load(tmp_path / "best").meta["step"] == 1
    save(tmp_path, 5, best=[5, 1, 4, 3, 2])
    assert names(tmp_path) == ["step-00000004", "step-00000005"]
    assert checkpoint.load(tmp_path / "best").meta["step"] == 5
    save(tmp_path, 6)
    assert not (tmp_path / "best").is_symlink()
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_the_best_one_is_the_best_that_is_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert checkpoint.link_best(tmp_path, [9, 1, 2]) == 1
    assert (tmp_path / "best").resolve() == (tmp_path / "step-00000001").resolve()
    assert checkpoint.link_best(tmp_path, [9]) is None
    assert not (tmp_path / "best").is_symlink()


def test_checkpoints_by_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, best=[1, 2])
    for name, step in (("last", 2), ("best", 1), ("2", 2), ("step-00000001", 1)):
        assert checkpoint.load(checkpoint.find(tmp_path, name)).meta["step"] == step
    for name in ("3", "newest", "../x", ""):
        with pytest.raises(InputError, match=rf"^checkpoint is '{name}' but must be one of last, best, 1, 2: choose"):
            checkpoint.find(tmp_path, name)
    (tmp_path / "best").unlink()
    with pytest.raises(InputError, match=r"'best' but must be one of last, 1, 2: it is kept from the first evaluation"):
        checkpoint.find(tmp_path, "best")
    with pytest.raises(InputError, match="one of none yet"):
        checkpoint.find(tmp_path / "empty", "best")


class Killed(BaseException):
    """Ends a process at once."""


def kill_at(patch: pytest.MonkeyPatch, operation: int) -> None:
    """Let the process die before its file operation of this number."""
    done = [0]

    def dying(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            done[0] += 1
            if done[0] > operation:
                raise Killed
            return original(*arguments, **options)

        return call

    for owner, name in (
        (Path, "mkdir"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "symlink_to"),
        (Path, "unlink"),
        (shutil, "rmtree"),
        (checkpoint, "write_checked"),
        (checkpoint, "sync_folder"),
    ):
        patch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize("order", [[3, 1, 2], [1, 3, 2], [2, 3, 1]])
def test_a_kill_at_any_operation_leaves_a_best_one_and_resuming_restores_it(tmp_path: Path, order: list[int]) -> None:
    """Step 3 is saved and killed; the resumed run links again, saves it again, and has what was never killed."""

    def ranking(step: int) -> list[int]:
        return [each for each in order if each <= step]

    whole = tmp_path / "whole"
    for step in (1, 2, 3):
        save(whole, step, keep=1, best=ranking(step))
    for operation in range(40):
        root = tmp_path / str(operation)
        save(root, 1, keep=1, best=ranking(1))
        save(root, 2, keep=1, best=ranking(2))
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, operation)
            try:
                save(root, 3, keep=1, best=ranking(3))
                break
            except Killed:
                pass
        assert checkpoint.load(root / "best").meta["step"] in (ranking(2)[0], ranking(3)[0])
        stands = checkpoint.load(root / "last").meta["step"]
        assert checkpoint.link_best(root, ranking(stands)) == ranking(stands)[0]
        assert checkpoint.load(root / "best").meta["step"] == ranking(stands)[0]
        if stands < 3:
            save(root, 3, keep=1, best=ranking(3))
        assert checkpoint.load(root / "best").meta["step"] == order[0]
        assert checkpoint.load(root / "last").meta["step"] == 3
        save(root, 4, keep=1, best=[*order, 4])
        assert set(names(root)) == {f"step-{order[0]:08d}", "step-00000004"}
    else:
        pytest.fail("40 operations do not suffice")
    assert operation > 8

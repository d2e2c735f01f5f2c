"""What a run reports: metrics between log points, lines on disk, lines on the screen, pictures."""

from __future__ import annotations

import io
import logging
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from mvssl.distributed import World
from mvssl.monitor.console import LiveDisplay, PlainDisplay, Status, duration, indexing_progress, make_display, run_log
from mvssl.monitor.loggers import JsonLines, NoWriter, complete_bytes, make_tensorboard_writer, read_jsonl
from mvssl.monitor.pictures import plot_losses
from mvssl.training.monitor import MetricBuffer
from mvssl.training.step import StepOutput
from pipelines.runtime import InputError

STATUS = Status(
    step=30,
    steps=120,
    epoch=2,
    epochs=6,
    losses={"global": 1.25, "local": 0.5},
    learning_rate=0.4,
    target_decay=0.996,
    images_per_second=1500.0,
    views_per_image=5,
    wait_fraction=0.0125,
    memory_gib=3.5,
    seconds_left=3725.0,
)
SHOWN = (
    "2/6",
    "30/120",
    "1:02:05",
    "global 1.2500",
    "local 0.5000",
    "1,500 images/s",
    "7,500 views/s",
    "data-wait 1.2 %",
)


def output(loss: float, losses: list[float], grad_norm: float = 0.5) -> StepOutput:
    return StepOutput(
        losses=torch.tensor(losses),
        loss=torch.tensor(loss),
        embedding=torch.zeros(2, 2),
        grad_norm=torch.tensor(grad_norm),
        lr=0.1,
        tau=0.9,
    )


def test_buffer_takes_the_mean_over_the_ranks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a checkpoint comes between two log points, and in the run that goes on from it."""
    monkeypatch.setattr(World, "mean", lambda self, values: values / 2)  # a mean that shows when it is taken
    buffer = MetricBuffer()
    buffer.add(output(4.0, []), torch.arange(4))
    buffer.average(World())
    again = MetricBuffer()
    again.load_state_dict(buffer.state_dict(), torch.device("cpu"))
    for one in (buffer, again):
        one.add(output(8.0, []), torch.arange(4))
        one.average(World())
        assert one.rows()[:, 1].tolist() == [2.0, 4.0]
        one.clear()
        one.add(output(6.0, []), torch.arange(4))
        one.average(World())
        assert one.rows()[:, 1].tolist() == [3.0]


def test_buffer_averages_what_it_saw_and_survives_a_checkpoint() -> None:
    buffer = MetricBuffer()
    for step in range(3):
        buffer.add(output(float(step), [float(step), 10.0 * step]), torch.arange(4) + step)
    again = MetricBuffer()
    again.load_state_dict(buffer.state_dict(), torch.device("cpu"))
    for one in (buffer, again):
        assert one.rows().tolist() == [[0.5, 0.0, 0.0, 0.0], [0.5, 1.0, 1.0, 10.0], [0.5, 2.0, 2.0, 20.0]]
        assert one.non_finite(last_step=7) is None
    buffer.clear()
    assert len(buffer) == 0
    assert buffer.non_finite(last_step=7) is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_buffer_finds_the_first_step_that_is_not_finite(poison: float) -> None:
    buffer = MetricBuffer()
    for step in range(5):
        task = poison if step in (2, 4) else 1.0
        buffer.add(output(1.0, [1.0, task]), torch.tensor([step, 10 + step]))
    failure = buffer.non_finite(last_step=20)  # the buffer holds steps 16 to 20
    assert failure is not None
    assert failure.step == 18
    assert failure.index == [2, 12]


def test_buffer_finds_a_gradient_that_is_not_finite_where_asked() -> None:
    buffer = MetricBuffer()
    for step in range(3):
        buffer.add(output(1.0, [1.0], grad_norm=float("inf") if step == 1 else 1.0), torch.tensor([step]))
    failure = buffer.non_finite(last_step=3)
    assert failure is not None
    assert (failure.step, failure.grad_norm, failure.index) == (2, float("inf"), [1])
    assert buffer.non_finite(last_step=3, gradients=False) is None


def test_json_lines_are_cut_back_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1})
    size = lines.sync()
    lines.write({"step": 2})
    lines.close()
    with path.open("ab") as file:
        file.write(b'{"step": 3')  # a kill in the middle of a write
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


def test_a_torn_line_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "throughput.jsonl"
    assert complete_bytes(path) == 0
    path.write_bytes(b'{"step": 1}\n{"st')
    lines = JsonLines(path, keep_bytes=complete_bytes(path))
    lines.write({"step": 2})
    lines.close()
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]


def test_what_json_cannot_hold_is_never_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        lines.write({"loss": float("nan")})
    lines.close()


def test_plain_line_shows_everything() -> None:
    text = io.StringIO()
    display = make_display(Console(file=text, width=60), steps=120, done=0)
    assert isinstance(display, PlainDisplay)
    display.show(STATUS)
    display.close()
    line = text.getvalue()
    assert line.count("\n") == 1
    for words in (*SHOWN, "lr 0.4", "decay 0.99600", "memory 3.50 GiB"):
        assert words in line


def test_live_panel_shows_the_same() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=140, color_system=None)
    display = make_display(console, steps=120, done=0)
    assert isinstance(display, LiveDisplay)
    display.show(STATUS)
    display.close()
    for words in (*SHOWN, "lr 0.4", "target decay 0.99600"):
        assert words in text.getvalue()


def test_indexing_speaks_up_only_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.5, 3.0, 5.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    text = io.StringIO()
    show = indexing_progress(Console(file=text), Path("photos"))
    for found in (10, 2000, 3000, 4000):
        show(found)
    assert text.getvalue() == "indexing photos: 2,000 images so far\nindexing photos: 4,000 images so far\n"


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3600, -5)] == ["0:00", "1:00", "1:01", "1:00:00", "0:00"]


def test_log_goes_to_file_and_console_and_leaves_no_handler(tmp_path: Path) -> None:
    text, logger = io.StringIO(), logging.getLogger("mvssl")
    before = list(logger.handlers)
    with run_log(tmp_path / "train.log", Console(file=text, width=200)):
        logger.debug("for the file")
        logging.getLogger("mvssl.data").warning("image [a/b.jpg] is bad")
    assert logger.handlers == before
    assert text.getvalue() == "warning: image [a/b.jpg] is bad\n"
    log = (tmp_path / "train.log").read_text()
    assert "for the file" in log
    assert "WARNING image [a/b.jpg] is bad" in log


def test_loss_picture_of_no_and_of_some_steps(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    plot_losses(lines.path, tmp_path / "empty.png")
    for step in range(1, 20):
        lines.write({"kind": "train", "step": step, "loss": 1.0, "loss/global": 2.0 / step, "loss/local": 3.0 / step})
    lines.write({"kind": "knn", "step": 19, "top1": 0.5})
    lines.sync()
    plot_losses(lines.path, tmp_path / "losses.png")
    with Image.open(tmp_path / "empty.png") as empty, Image.open(tmp_path / "losses.png") as full:
        assert full.size == empty.size
        assert full.tobytes() != empty.tobytes()
    lines.close()
    assert not list(tmp_path.glob(".*"))


def test_without_tensorboard_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    writer = make_tensorboard_writer(tmp_path / "tensorboard", first_step=0)
    assert isinstance(writer, NoWriter)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "tensorboard").exists()

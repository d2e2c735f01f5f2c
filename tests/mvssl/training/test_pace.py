"""Pace of a run: speed since log points and the first step, pauses, time left; the clock is the test's."""

from __future__ import annotations

import pytest

from mvssl.training.pace import Pace


def test_speed_counts_from_log_points_and_leaves_start_up_and_pauses_out() -> None:
    now = [0.0]
    pace = Pace(step=0, batch_size=8, clock=lambda: now[0])
    assert not pace.started
    now[0] = 60.0  # compiles
    pace.stepped(1, 5.0)
    assert pace.started
    assert pace.recent(1, 5.0).images_per_second == pytest.approx(8 / 60)
    now[0] = 64.0
    pace.stepped(3, 6.0)
    recent = pace.recent(3, 6.0)
    assert (recent.images_per_second, recent.data_wait) == (4.0, 0.25)  # 16 images in 4 s, 1 s of waiting
    assert pace.seconds_left(3, 13) == 20.0  # 2 s a step
    logged = pace.log_point(3, 6.0)  # all three steps
    assert (logged.seconds, logged.images_per_second) == (64.0, 24 / 64)
    with pace.pause():
        now[0] = 1000.0
    now[0] = 1004.0
    assert pace.recent(4, 6.0).images_per_second == 2.0
    assert pace.seconds == 68.0
    assert pace.seconds_left(4, 6) == pytest.approx(16 / 3)  # 8 s for three steps


def test_other_ranks_wait_is_no_negative_one() -> None:
    now = [0.0]
    pace = Pace(step=10, batch_size=8, clock=lambda: now[0])
    now[0] = 1.0
    pace.log_point(11, 5.0)  # the longest wait of any rank
    now[0] = 2.0
    assert pace.recent(12, 0.5).data_wait == 0.0

"""Progress over items, and within an item over the steps of its task."""

import io
import logging

import pytest
from rich.console import Console

from bitgenome.common.steps import Step, steps
from bitgenome.observe import progress
from bitgenome.observe.progress import Advance, track, tracked, tracker


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_single_long_task_shows_its_steps_and_the_time_left() -> None:
    clock = Clock()
    advance = Advance(1, clock)
    advance.hear([Step(0, 30, "block")])
    clock.now = 100.0
    advance.hear([Step(5, 30, "block")])
    assert advance.line("calibrating") == "calibrating: 0 of 1 (block 6 of 30), 100 s, about 500 s left"


def test_a_task_that_goes_on_from_its_middle_is_timed_from_there() -> None:
    clock = Clock()
    advance = Advance(1, clock)
    advance.hear([Step(20, 30, "block")])
    clock.now = 10.0
    advance.hear([Step(25, 30, "block")])
    assert advance.seconds_left == pytest.approx(10.0)


def test_each_part_of_a_single_task_is_timed_by_itself() -> None:
    clock = Clock()
    advance = Advance(1, clock)
    for now, step in [(0, Step(0, 2, "block")), (1000, Step(2, 2, "block")), (1000, Step(0, 4, "window"))]:
        clock.now = now
        advance.hear([step])
    clock.now = 1002
    advance.hear([Step(1, 4, "window")])
    assert advance.seconds_left == pytest.approx(6.0)


def test_steps_of_tasks_that_run_together_count_as_parts_of_all() -> None:
    clock = Clock()
    advance = Advance(4, clock)
    clock.now = 10.0
    advance.hear([Step(1, 2, "tensor"), Step(1, 4, "tensor")])
    assert advance.done == pytest.approx(0.75)
    advance.item()
    assert (advance.done, advance.seconds_left) == (1, pytest.approx(30.0))


@pytest.mark.parametrize("terminal", [False, True])
def test_steps_within_a_task_are_shown(
    terminal: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120)
    with caplog.at_level(logging.INFO):
        assert tracked(tracker(console), "calibrating", lambda: sum(steps([1, 2, 4], 3, "block"))) == 7
    said = shown.getvalue() if terminal else caplog.text
    assert "calibrating" in said and ("block" in said or terminal)


def test_lines_come_ever_more_seldom(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "Advance", lambda total: Advance(total, clock))
    with caplog.at_level(logging.INFO):
        for _ in track(range(601), 601, "working", Console(file=io.StringIO())):
            clock.now += 1.0
    assert [int(line.split(":")[1].split()[0]) for line in caplog.messages] == [
        10, 30, 70, *range(130, 600, 60), 601,
    ]  # fmt: skip

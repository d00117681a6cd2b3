"""Shows progress and time left: as a rich bar on a terminal, as an occasional plain line in a log.

Progress is counted in items, and within an item in the steps that its task tells (bitgenome.common.steps): a stage of
one task that takes an hour shows its blocks.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bitgenome.common.steps import Step, heard_by
from bitgenome.observe.logs import shows

log = logging.getLogger(__name__)

FIRST_LINE_S, LINE_EVERY_S = 10.0, 60.0  # the time between two lines doubles from the first to the second
T = TypeVar("T")
Track = Callable[[Iterable[Any], int, str], Iterator[Any]]  # shows progress over an iterable


class Advance:
    """Counts what is done of ``total`` items, steps within them included, and estimates how long the rest takes.

    ``clock`` returns seconds.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic):
        self.total = total
        self.items = 0
        self.step: Step | None = None  # of a task that runs, the one with the least left to do
        self._within = 0.0  # items, by the steps of the tasks that run
        self._clock = clock
        self.started = self._since = clock()
        self._before = 0.0  # items done at ``_since``

    @property
    def done(self) -> float:
        """Items done, with the parts done of those that run."""
        return min(self.total, self.items + self._within)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.started

    def hear(self, running: Sequence[Step]) -> None:
        """Take in the last steps of the tasks that run."""
        step = max(running, key=lambda step: step.fraction)
        self._within = sum(step.fraction for step in running)
        first = self.total == 1 and (self.step is None or (self.step.unit, self.step.total) != (step.unit, step.total))
        self.step = step
        if first:  # of a single task each part is timed by itself, and may begin in its middle
            self._since, self._before = self._clock(), self.done

    def item(self) -> None:
        """Count one item more."""
        self.items += 1
        self._within, self.step = 0.0, None

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the rate so far; None until something is done."""
        done = self.done - self._before
        return (self._clock() - self._since) / done * (self.total - self.done) if done > 0 else None

    def line(self, what: str) -> str:
        """Return the state of ``what`` in one line."""
        within = f" ({self.step})" if self.step else ""
        left = "" if self.seconds_left is None else f", about {self.seconds_left:.0f} s left"
        return f"{what}: {self.items} of {self.total}{within}, {self.seconds:.0f} s{left}"


def track(items: Iterable[T], total: int, what: str, console: Console) -> Iterator[T]:
    """Yield ``items`` while showing how many of ``total`` are done and how long the rest will take.

    ``what`` names the work. Without a terminal lines are logged, at first after FIRST_LINE_S seconds and at last every
    LINE_EVERY_S.
    """
    advance = Advance(total)
    shown = _Bar(what, total, console) if console.is_terminal and shows(logging.INFO) else _Lines(what, advance)

    def hear(running: Sequence[Step]) -> None:
        advance.hear(running)
        shown.show(advance)

    source = iter(items)
    with shown.context:
        while True:
            with heard_by(hear):  # not while the caller works on an item
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item
            advance.item()
            shown.show(advance)


def tracker(console: Console) -> Track:
    """Return ``track`` for ``console``."""
    return partial(track, console=console)


def tracked(track: Track, what: str, work: Callable[[], T]) -> T:
    """Return the result of ``work``, a single long task of this process, while ``track`` shows its steps."""
    (result,) = track((work() for _ in range(1)), 1, what)
    found: T = result
    return found


class _Lines:
    """Logs a line when it is time, and at the end, unless that is one of a single short task."""

    context: AbstractContextManager[Any] = nullcontext()

    def __init__(self, what: str, advance: Advance):
        self._what = what
        self._every = FIRST_LINE_S
        self._next = advance.seconds + self._every

    def show(self, advance: Advance) -> None:
        ended = advance.items == advance.total and (advance.total > 1 or advance.seconds >= FIRST_LINE_S)
        if advance.seconds >= self._next or ended:
            log.info("%s", advance.line(self._what))
            self._every = min(LINE_EVERY_S, 2 * self._every)
            self._next = advance.seconds + self._every


class _Bar:
    """Shows a bar on a terminal."""

    def __init__(self, what: str, total: int, console: Console):
        columns: tuple[ProgressColumn, ...] = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        columns += (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.context = Progress(*columns, console=console, transient=True, speed_estimate_period=600)
        self._what = what
        self._task = self.context.add_task(what, total=total)

    def show(self, advance: Advance) -> None:
        what = f"{self._what} ({advance.step})" if advance.step else self._what
        self.context.update(self._task, completed=advance.done, description=what)
